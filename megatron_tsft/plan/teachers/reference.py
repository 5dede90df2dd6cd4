"""The reference: the student's own imported weights, frozen, or what it was some steps ago."""

from pathlib import Path

from megatron_tsft.checkpoint.folder import latest_checkpoint
from megatron_tsft.errors import UserError
from megatron_tsft.plan.checked import check_weights
from megatron_tsft.plan.config import TsftConfig
from megatron_tsft.plan.flags import Flags
from megatron_tsft.plan.teachers.definition import Kind, Request, Riding, Teacher, identity_of


def check_shapes(kind: str, flags: Flags) -> None:
    """Raise UserError where experts' batches cannot have the shapes of a model that rides along."""
    name = "moe_token_dispatcher_type"
    if name in flags.named and flags.moe_token_dispatcher_type == "allgather":
        raise UserError(
            f"--tsft-teacher {kind} makes stages send shapes of their own, which"
            " --moe-token-dispatcher-type allgather does not take: leave the flag out"
        )


def _check(config: TsftConfig, flags: Flags) -> None:
    check_shapes("reference", flags)
    refresh = config.reference_refresh
    if refresh < 0:
        raise UserError(f"--tsft-reference-refresh {refresh}: pass a number of steps, at least 1")
    if not refresh:
        return
    if flags.overlap_param_gather:
        raise UserError(
            "--tsft-reference-refresh copies the weights before the first layer runs, when"
            " --overlap-param-gather may still be gathering them: leave one of them out"
        )
    if flags.finetune:
        raise UserError(
            "--tsft-reference-refresh with --finetune: the first steps' reference could not be had"
            " again on resume; export the weights, import them, and pass them as --tsft-model"
        )
    every = flags.save_interval
    if flags.save and every and every % refresh and refresh % every:
        raise UserError(
            f"--save-interval {every} and --tsft-reference-refresh {refresh}: one must be a"
            " multiple of the other, so that a resumed run finds the weights that were the"
            " reference"
        )


def _find(request: Request) -> Teacher:
    refresh = request.config.reference_refresh
    text = f"the imported model{f', anew every {refresh} steps' if refresh else ''}"
    checkpoint = _checkpoint(request) if refresh else request.start.base
    return Teacher(
        "reference",
        text,
        identity_of("reference", request.start.base, request.student, refresh),
        riding=Riding(request.student, checkpoint or request.start.base),
        refresh=refresh,
        evaluates=checkpoint is not None,
    )


def _checkpoint(request: Request) -> Path | None:
    """The weights that are the reference when a run starts or goes on; None where the run is over
    and they were not kept.

    Raises:
        UserError: the weights of the last refresh were not kept.
    """
    start, refresh = request.start, request.config.reference_refresh
    if start.checkpoint is None:
        return start.base
    step = start.step
    over = step >= (request.flags.train_iters or step + 1)
    last = step - step % refresh
    if last == step and not over:
        return start.base  # the next micro-batch takes the student's weights
    if last == step:  # no micro-batch comes, but an evaluation: by the reference of the last step
        last -= refresh
    if last <= 0:
        return start.base
    # the run before this one may have kept them
    for folder in filter(None, (start.folder, request.flags.load)):
        if (Path(folder) / f"iter_{last:07d}").is_dir():
            checkpoint = latest_checkpoint(folder, last)
            if checkpoint != start.checkpoint:  # which was looked at
                check_weights(folder, checkpoint, request.config.verify, request.ranks)
            return checkpoint
    if over:
        return None
    raise UserError(
        f"the reference of step {step} is the weights of step {last}, which {start.folder} has no"
        f" longer: resume from a step that is a multiple of {refresh} (--ckpt-step), or keep"
        " checkpoints"
    )


KIND = Kind(
    "reference",
    "the imported --tsft-model, frozen",
    _find,
    fields=("reference_refresh",),
    check=_check,
)
