"""Whether a run that resumes reads the packs that the saved one has left, and not others."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tsft.data.pieces import LONG_SAMPLES
from megatron_tsft.errors import UserError
from megatron_tsft.plan.packs import Packs

SAVED = "tsft_packs"  # the name in the arguments that Megatron keeps in its checkpoints


@dataclass(frozen=True)
class Resumed:
    """A checkpoint that a run goes on from, counting on in its data.

    Attributes:
        checkpoint: its folder.
        load: what --load has to be for a new run from its weights.
        before: the arguments it was saved with, by destination.
    """

    checkpoint: Path
    load: str
    before: Mapping[str, Any]

    @property
    def anew(self) -> str:
        """What else to do, for messages."""
        return (
            f"or start anew from its weights with --load {self.load} --finetune and another --save"
        )


def facts_of_packs(packs: Packs) -> dict[str, Any]:
    """What decides the packs and their order, by the flag that says so; kept in the run's
    checkpoints."""
    rules, whole = packs.rules, sum(packs.shares)
    parts = zip(packs.members, packs.shares, strict=True)
    return {
        "--seq-length": rules.seq_length,
        "--seed": rules.seed,
        "--tsft-document-multiple": rules.document_multiple,
        # where nothing is too long, the flag decides nothing
        "--tsft-long-samples": rules.long_samples
        if any(part.pieces.long for part in packs.members)
        else LONG_SAMPLES[0],
        "--tsft-data": [
            f"{part.data.card.fingerprint}:{share / whole:.9g}" for part, share in parts
        ],
    }


def check_same_packs(resumed: Resumed, packs: Packs, batch: int, context: int) -> None:
    """Raise UserError where conversations would be read twice or never.

    Args:
        resumed: what is resumed.
        packs: this run's.
        batch: its global batch size.
        context: its context-parallel size.
    """
    before = resumed.before
    # checkpoints of earlier versions do not say what data they saw
    old = {"--seq-length": before.get("seq_length"), "--seed": before.get("seed")}
    saved = before.get(SAVED, old | {"--tsft-document-multiple": 1})
    for flag, now in facts_of_packs(packs).items():
        if saved.get(flag, now) != now:
            _refuse(resumed, flag, saved[flag], now, context)
    if len(packs.members) > 1:
        return  # a mixture's epochs are not filled up to whole steps
    count, sizes = packs.members[0].packs, (before.get("global_batch_size", batch), batch)
    # where the first epoch ends, masked packs included
    ends = {-(-count // size) * size for size in sizes}
    if len(ends) > 1 and before.get("consumed_train_samples", 0) > min(ends):
        raise UserError(
            f"{resumed.checkpoint} was trained with --global-batch-size {sizes[0]}, now it is"
            f" {sizes[1]}: after the first epoch that moves where epochs end, and conversations"
            f" would be read twice or never. Pass --global-batch-size {sizes[0]}, {resumed.anew}"
        )


def _refuse(resumed: Resumed, flag: str, then: Any, now: Any, context: int) -> None:
    """Say which flag makes other packs, and what to pass instead."""
    said, fix = f"with {flag} {then}, now it is {now}", f"Pass {flag} {then}"
    if flag == "--tsft-data":
        said, fix = "on other --tsft-data, or with other shares", "Pass the same"
    elif flag == "--tsft-document-multiple" and context > 1 and then % (2 * context):
        fits = [str(n) for n in range(1, then + 1) if n == 1 or then % (2 * n) == 0]
        fix = (
            f"Such conversations are cut for --context-parallel-size {' or '.join(fits)}: pass it"
            f" and {flag} {then}"
        )
    raise UserError(
        f"{resumed.checkpoint} was trained {said}: conversations would be read twice or never."
        f" {fix}, {resumed.anew}"
    )
