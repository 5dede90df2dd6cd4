"""Whether a run that resumes is the one that was saved: what it cannot honour is refused, and what
it can is said."""

import hashlib
from collections.abc import Mapping
from typing import Any

from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.errors import UserError
from megatron_tsft.plan.flags import Flags
from megatron_tsft.plan.run_objectives import RunObjectives
from megatron_tsft.plan.same_packs import Resumed
from megatron_tsft.plan.teachers.definition import Teacher

SAVED = "tsft_run"  # the name in the arguments that Megatron keeps in its checkpoints

# Megatron's flags that a checkpoint's optimizer belongs to: destination -> what to call its values
OPTIMIZER = {
    "optimizer": lambda value: f"--optimizer {value or 'adam'}",
    "use_distributed_optimizer": lambda value: (
        "--use-distributed-optimizer" if value else "the plain optimizer"
    ),
}
# those that a run may change when it resumes, and that change what it computes
SAID = """
global_batch_size micro_batch_size train_iters train_samples lr_decay_style lr_warmup_iters
lr_decay_iters lr_warmup_fraction min_lr clip_grad adam_beta1 adam_beta2 adam_eps sgd_momentum
weight_decay fp8 fp8_recipe tensor_model_parallel_size pipeline_model_parallel_size
context_parallel_size expert_model_parallel_size data_parallel_size transformer_impl
main_grads_dtype grad_reduce_in_bf16 deterministic_mode recompute_granularity
""".split()


def facts_of_run(
    objectives: RunObjectives, teacher: Teacher, data: list[PreparedData]
) -> dict[str, str]:
    """What decides a run's targets, by the flag that says so; kept in its checkpoints."""
    return {
        "--tsft-objective or --tsft-args": "; ".join(map(repr, objectives.members)),
        "--tsft-teacher": teacher.identity,
        "row weights in --tsft-data": "; ".join(part.weights_digest() for part in data),
        "chat template in --tsft-data": "; ".join(_digest(p.card.chat_template) for p in data),
    }


def check_same_run(resumed: Resumed, facts: Mapping[str, str], flags: Flags) -> None:
    """Raise UserError for another target, optimizer or precision than the checkpoint's."""
    before = resumed.before
    # checkpoints of earlier versions do not say what they aimed at
    for name, then in before.get(SAVED, {}).items():
        if (now := facts.get(name, then)) != then:
            shown = f" ({then}, now {now})" if name.startswith("--") else ""
            raise UserError(
                f"{resumed.checkpoint} was trained with another {name}{shown}: pass the same,"
                f" {resumed.anew}"
            )
    then, now = precision(before), precision(vars(flags))
    if then != now:
        raise UserError(
            f"{resumed.checkpoint} was trained in {then}, this run is in {now}: pass"
            f" {'--' + then if then != 'fp32' else 'neither --bf16 nor --fp16'}, {resumed.anew}"
        )
    if flags.no_load_optim:
        return
    for name, said in OPTIMIZER.items():
        then, now = said(before.get(name)), said(getattr(flags, name))
        if then != now:
            raise UserError(
                f"{resumed.checkpoint} was trained with {then}, this run has {now}: pass the same,"
                f" {resumed.anew}"
            )


def precision(values: Mapping[str, Any]) -> str:
    """Of a run's weights; values: by Megatron's destinations."""
    return next((name for name in ("bf16", "fp16") if values.get(name)), "fp32")


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What is another in a run that resumes, for the plan; "" for nothing.

    Args:
        before: the saved arguments, by Megatron's destinations.
        now: this run's, parsed.
    """
    found = []
    for name in SAID:
        if name in before and before[name] != now.get(name):
            found.append(f"--{name.replace('_', '-')} {before[name]}, now {now.get(name)}")
    return "; ".join(found)


def _digest(text: str | None) -> str:
    return "none" if text is None else hashlib.sha256(text.encode()).hexdigest()[:16]
