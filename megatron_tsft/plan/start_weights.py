"""Which weights a run starts from: compared with the model, tensor by tensor, before they are
loaded."""

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_tsft.checkpoint.card import CARD_FILE, ModelCard
from megatron_tsft.checkpoint.folder import (
    TRACKER,
    latest_checkpoint,
    mend_tracker,
    read_metadata,
    tracked,
    whole_iterations,
)
from megatron_tsft.checkpoint.keys import compare_keys
from megatron_tsft.checkpoint.saved_arguments import saved_arguments
from megatron_tsft.checkpoint.units import expected_keys, extra_states
from megatron_tsft.data import prepared
from megatron_tsft.errors import DamagedError, UserError
from megatron_tsft.plan.checked import check_weights
from megatron_tsft.plan.command_line import Ranks
from megatron_tsft.plan.config import TsftConfig
from megatron_tsft.plan.flags import Flags
from megatron_tsft.plan.meeting import Meeting
from megatron_tsft.plan.same_packs import Resumed
from megatron_tsft.teacher import format as cache

# the file that tells a folder that other commands made
KINDS = {
    prepared.CARD_FILE: "a prepared data set",
    cache.CARD_FILE: "a teacher cache",
    cache.PLAN_FILE: "an unfinished teacher cache",
    "config.json": "a Hugging Face model",
    "release": "an imported model",
}


@dataclass(frozen=True)
class StartWeights:
    """Where a run's weights come from.

    Attributes:
        base: the imported model's checkpoint.
        checkpoint: of a run, which is loaded instead; None where there is none.
        folder: that run's folder, which `--load` has to be.
        resuming: --save holds it, which wins over --load and --finetune.
        anew: only its weights are taken.
        fresh_optimizer: no state of the optimizer is loaded.
        resumed: the checkpoint whose place in the data the run goes on from, or None.
        instead: the iteration that is loaded in place of newer ones, which are damaged; None where
            the tracker file or the user decides.
        notes: what a person should know of it.
    """

    base: Path
    checkpoint: Path | None = None
    folder: str | None = None
    resuming: bool = False
    anew: bool = False
    fresh_optimizer: bool = True
    resumed: Resumed | None = None
    instead: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Steps that the checkpoint was trained; 0 for imported weights."""
        return 0 if self.checkpoint is None else step_of(self.checkpoint)


def step_of(checkpoint: Path) -> int:
    """Steps that a checkpoint was trained; 0 for imported weights."""
    name = checkpoint.name
    return int(name.removeprefix("iter_")) if name.startswith("iter_") else 0


def find_whole_weights(
    config: TsftConfig,
    card: ModelCard,
    flags: Flags,
    ranks: Ranks,
    meeting: Meeting | None = None,
    *,
    engine: bool,
) -> StartWeights:
    """`find_start_weights`, with every file compared with its checksum; where the newest checkpoint
    of the run's own folder is damaged, the newest whole one before it.

    meeting: where the ranks agree which one that is; without it, a damaged one is an error.

    Raises:
        UserError: as `find_start_weights`; or a file is damaged, and no checkpoint can take its
            place.
    """
    meeting, agreed = meeting or Meeting(), meeting is not None or ranks.size == 1
    folders = filter(None, (flags.save, flags.load if "load" in flags.named else None))
    # rank 0 writes, before the others look
    notes: list[str] = meeting.share(
        lambda: [
            note
            for f in folders
            if (note := mend_tracker(f, write=ranks.rank == 0 and not config.check))
        ]
    )
    instead: int | None = None
    while True:
        start, unlisted, damage = StartWeights(Path(config.model)), list[str](), None
        try:
            start = find_start_weights(config.model, card, flags, engine=engine, iteration=instead)
            if start.checkpoint is not None and start.folder is not None:
                unlisted = check_weights(start.folder, start.checkpoint, config.verify, ranks)
        except DamagedError as error:
            damage = [str(error), str(error.checkpoint)]
        # each rank has read its share of the files
        found = next(filter(None, meeting.gather(damage)), None)
        if found is None:
            break
        text, damaged = found[0], Path(found[1])
        older = [n for n in whole_iterations(damaged.parent) if n < step_of(damaged)]
        own = bool(flags.save) and damaged.parent == Path(flags.save or "")
        if not own or flags.ckpt_step or not older or not agreed:
            error = DamagedError(text, damaged)
            error.met_here_alone = not agreed
            raise error
        instead = older[0]
        notes.append(f"WARNING: {text}; iteration {instead} takes its place")
    if unlisted and config.verify == "full":
        notes.append(f"{start.checkpoint}: only sizes tell of {', '.join(sorted(unlisted))}")
    check_weights(config.model, start.base, config.verify, ranks)
    return replace(start, instead=instead, notes=tuple(notes))


def find_start_weights(
    model: str, card: ModelCard, flags: Flags, *, engine: bool, iteration: int | None = None
) -> StartWeights:
    """Compare the weights that will be loaded with the model, key by key.

    Megatron itself loads a checkpoint that lacks keys of the model and reports success.

    Args:
        model: the imported model's folder.
        card: its card.
        flags: of the run.
        engine: the layers are Transformer Engine's.
        iteration: in place of the one that the flags and the tracker file name.

    Raises:
        UserError: --load finds nothing, or a checkpoint is incomplete, without the optimizer state
            to resume from, saved by local layers and wanted by Transformer Engine's, or another
            model's.
    """
    base = latest_checkpoint(model)
    compare_keys(expected_keys(card), base)
    save, load = flags.save, flags.load if "load" in flags.named else None
    if save and Path(save).exists() and not Path(save).is_dir():
        raise UserError(f"--save {save} is no folder: name another")
    if save and Path(save).resolve() == Path(model).resolve():
        raise UserError(
            f"--save {save} is the folder of --tsft-model: name another, or the imported model is"
            " lost"
        )
    _check_save(save)
    resuming = bool(save) and load != save and _has_checkpoint(save)
    if load and load != save and not resuming and not _has_checkpoint(load):
        raise UserError(
            f"--load {load}: there is no {TRACKER}; name a folder that a run saved to, or leave"
            " --load out"
        )
    folder = save if resuming or not load else load
    for other in dict.fromkeys(filter(None, (folder, save))):
        if (Path(other) / CARD_FILE).is_file() and ModelCard.load(other) != card:
            raise UserError(
                f"{other} belongs to another model than {model}: choose another --save or --load"
            )
    if not folder or not _has_checkpoint(folder):
        return StartWeights(base)
    # where both are given, these flags of Megatron's are for the start from --load
    again = resuming and load is not None
    wanted = None if again else flags.ckpt_step
    checkpoint = latest_checkpoint(folder, iteration or wanted)
    compare_keys(expected_keys(card), checkpoint)
    anew = flags.finetune and not resuming
    fresh = anew or bool(flags.no_load_optim and not again)
    _check_states(checkpoint, folder, card, engine=engine, optimizer=not fresh)
    resumed: Resumed | None = None
    if checkpoint.name != "release" and not anew:
        resumed = Resumed(checkpoint, folder, saved_arguments(checkpoint))
        if not fresh and card.megatron_arguments.get("num_experts"):
            _check_expert_optimizer(resumed, flags.expert_model_parallel_size)
    fresh = fresh or checkpoint.name == "release"
    return StartWeights(base, checkpoint, folder, resuming, anew, fresh, resumed)


def _check_save(save: str | None) -> None:
    """Raise UserError where --save is a folder of another kind, which a run would litter."""
    for name, kind in KINDS.items():
        if save and (Path(save) / name).exists():
            raise UserError(f"--save {save} is {kind} ({name} is there): name another folder")


def _has_checkpoint(folder: str | None) -> bool:
    if not folder:
        return False
    return tracked(folder) is not None or bool(whole_iterations(folder))


def _check_states(
    checkpoint: Path, folder: str, card: ModelCard, *, engine: bool, optimizer: bool
) -> None:
    """Raise UserError where a checkpoint lacks what Transformer Engine's layers or the optimizer
    will ask it for."""
    keys = read_metadata(checkpoint).state_dict_metadata
    norm_states = [key for key in extra_states(card) if "layernorm._extra_state" in key]
    lacking = [key for key in norm_states if key not in keys] if engine else []
    if lacking:  # Megatron would stop at the first of them; the other way round it loads
        raise UserError(
            f"{checkpoint} was saved by Megatron's local layers and lacks what Transformer Engine's"
            f" ask for (e.g. {lacking[0]}): pass --transformer-impl local, or export it with"
            " tools/convert_checkpoint.py and import that (the optimizer's state stays behind)"
        )
    saved = any(key.startswith(("optimizer", "chained_")) for key in keys)
    if checkpoint.name == "release" or not optimizer or saved:
        return
    before = saved_arguments(checkpoint)  # plain descent has no tensors
    if before.get("optimizer") != "sgd" or before.get("no_save_optim"):
        raise UserError(
            f"{checkpoint} was saved without optimizer state: pass --load {folder} --finetune and"
            " another --save"
        )


def _check_expert_optimizer(resumed: Resumed, now: int) -> None:
    """Raise UserError where experts are parallel in the run (over `now` ranks) and not in the
    checkpoint, or the other way round.

    Megatron has a second optimizer for parallel experts, and cannot make two out of one
    (core/optimizer/optimizer.py, ChainedOptimizer.load_state_dict).
    """
    then = resumed.before.get("expert_model_parallel_size", 1)
    if (then > 1) != (now > 1):
        raise UserError(
            f"{resumed.checkpoint} was saved with --expert-model-parallel-size {then}: its"
            f" optimizer does not resume with {now}. Pass {'one above 1' if then > 1 else '1'},"
            f" {resumed.anew}"
        )
