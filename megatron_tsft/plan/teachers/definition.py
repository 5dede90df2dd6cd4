"""What a teacher is to a run: records that it gave before, or a frozen model that rides along."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tsft.checkpoint.card import ModelCard
from megatron_tsft.checkpoint.fingerprint import weights_fingerprint
from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.loss.records import Tail
from megatron_tsft.plan.command_line import Ranks
from megatron_tsft.plan.config import TsftConfig
from megatron_tsft.plan.flags import Flags
from megatron_tsft.plan.packs import RecordBook
from megatron_tsft.plan.start_weights import StartWeights


@dataclass(frozen=True)
class Riding:
    """A frozen model that is computed in the student's own pipeline pass.

    Attributes:
        card: its architecture.
        checkpoint: the folder with its torch_dist files.
        folder: for messages; "" for the student's own imported weights.
        token_map: its id of each of the student's tokens, -1 for none; None where both agree.
    """

    card: ModelCard
    checkpoint: Path
    folder: str = ""
    token_map: Sequence[int] | None = None


@dataclass(frozen=True)
class Teacher:
    """The second distribution of a run, found and checked.

    Attributes:
        kind: its name among the kinds.
        text: where it comes from, for the plan.
        identity: what makes another teacher of it; a run that resumes is held to it.
        records: what it said before, or None.
        riding: the model that is asked in every step, or None.
        tail: what records say of tokens outside their top-k.
        refresh: steps after which it takes the student's weights; 0 is never.
        evaluates: False where the evaluation that a finished run ended with cannot be had again.
    """

    kind: str
    text: str
    identity: str
    records: RecordBook | None = None
    riding: Riding | None = None
    tail: Tail = "uniform"
    refresh: int = 0
    evaluates: bool = True


def identity_of(kind: str, checkpoint: Path, card: ModelCard, *more: object) -> str:
    """`Teacher.identity` of a Megatron checkpoint: its weights, wherever they lie, and `more`."""
    architecture = sorted(card.megatron_arguments.items())
    weights = weights_fingerprint(checkpoint, "*.distcp", architecture=architecture)
    return " ".join([kind, weights, *(str(part) for part in more if part)])


@dataclass(frozen=True)
class Request:
    """What a kind is asked with: the run's flags, its model and weights, and the data that is
    read."""

    config: TsftConfig
    flags: Flags
    ranks: Ranks
    student: ModelCard
    start: StartWeights
    data: Sequence[PreparedData]


@dataclass(frozen=True)
class Kind:
    """One kind of teacher.

    Attributes:
        name: its value of --tsft-teacher.
        help: what T is, in a few words.
        fields: of TsftConfig that belong to it alone.
        needed: the one of them that it cannot be without, or "".
        top_k: it is known at its most likely tokens alone.
        check: raises UserError where flags cannot work with it; looks at no file.
        find: the teacher; raises UserError where it does not fit.
    """

    name: str
    help: str
    find: Callable[[Request], Teacher]
    fields: tuple[str, ...] = ()
    needed: str = ""
    top_k: bool = False
    check: Callable[[TsftConfig, Flags], None] = lambda config, flags: None
