"""What Megatron's parser assumes unless a flag says otherwise: the imported model's architecture,
and what every run of ours needs. So a short command line runs, and a user's flag still wins.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any

from megatron_tsft.checkpoint.card import ModelCard
from megatron_tsft.checkpoint.mapping import padded_vocab_size
from megatron_tsft.errors import UserError
from megatron_tsft.plan.command_line import CommandLine

TP = "tensor_model_parallel_size"

EVERY_RUN = {
    "calculate_per_token_loss": True,  # gradients over the global number of supervised tokens
    "dataloader_type": "single",  # its order is a function of the consumed samples alone
    "tokenizer_type": "NullTokenizer",  # the data is tokenized already
    "log_interval": 1,
    # a number that is not finite ends the step at once, on the rank that has it; Megatron's own way
    # (--rerun-mode validate_results) looks at no first step, and saves before it ends with 16 or 17
    "rerun_mode": "disabled",
    "initial_loss_scale": 2.0**12,  # Megatron's 2^32 skips the first twenty steps of fp16
    # a resumed run follows its flags, also where --train-iters has grown
    "override_opt_param_scheduler": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    # the other optimizer formats resume wrong in bf16, silently, or not with other ranks
    "dist_ckpt_optim_fully_reshardable": True,
}
WITHOUT_TE = {
    "transformer_impl": "local",
    "no_persist_layer_norm": True,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
}
EXPERTS = {  # for a model with experts, unless a flag says otherwise
    # Megatron's default takes no batches of varying length
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none",  # an auxiliary loss belongs to pre-training
}
ON_CPU = WITHOUT_TE | {
    "distributed_backend": "gloo",
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "num_workers": 0,  # packs are cheap to cut; workers would take the cores from the ranks
}
SAVE_INTERVAL = 200
# an interval beyond any run: Megatron saves and evaluates once more when training is over
NEVER = 1 << 30


def engine_installed() -> bool:
    """Whether Transformer Engine is there."""
    return importlib.util.find_spec("transformer_engine") is not None


def check_card(line: CommandLine, card: ModelCard, folder: str) -> None:
    """Raise UserError where a flag says another architecture than the imported model."""
    architecture = card.megatron_arguments | {"vocab_size": card.vocab_size}
    for name, value in architecture.items():
        if name in line.given and line.given[name] != value:
            raise UserError(
                f"{line.option(name)} says {line.given[name]}, the model in {folder} has {value}:"
                " leave the flag out"
            )


def parser_defaults(
    card: ModelCard, model: str, device: str, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Destinations of Megatron's parser -> what they are where the command line says nothing.

    Args:
        card: of the model that is trained, or asked.
        model: its folder.
        device: "cuda" or "cpu".
        given: the flags on the command line.
    """
    values = EVERY_RUN | card.megatron_arguments
    if card.megatron_arguments.get("num_experts"):
        values |= EXPERTS
        # Megatron trains experts on tensor-parallel ranks only so
        values["sequence_parallel"] = given.get(TP, 1) > 1
    if device == "cpu":
        values |= ON_CPU
    else:
        if not engine_installed():
            values |= WITHOUT_TE
        # NVIDIA's Apex, by its own module
        if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
            values["gradient_accumulation_fusion"] = False
    values["vocab_size"] = card.vocab_size
    multiple = given.get("make_vocab_size_divisible_by", card.make_vocab_size_divisible_by)
    values["make_vocab_size_divisible_by"] = multiple
    # given outright, because NullTokenizer would count one token more
    values["padded_vocab_size"] = padded_vocab_size(card.vocab_size, multiple * given.get(TP, 1))
    values["pretrained_checkpoint"] = model
    if "use_checkpoint_opt_param_scheduler" in given:
        del values["override_opt_param_scheduler"]
    if "save" in given:
        values["load"] = given["save"]  # a run that finds its own checkpoint resumes
    return values | {"save_interval": SAVE_INTERVAL, "eval_interval": NEVER}
