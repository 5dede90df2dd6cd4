"""Megatron's checkpoint folder: its tracker file, its checkpoints, and whether one is whole."""

from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from megatron_tsft.atomic import write_text
from megatron_tsft.checkpoint.manifest import checksum, read_lists
from megatron_tsft.checkpoint.pickles import check_objects, load_description
from megatron_tsft.errors import DamagedError, UserError
from megatron_tsft.inside import inside

TRACKER = "latest_checkpointed_iteration.txt"
DIGITS = 18  # of an iteration, the most


def tracked(directory: Path | str) -> str | None:
    """What the tracker file says, "release" or an iteration; None where it is missing or torn."""
    path = Path(directory) / TRACKER
    try:
        with path.open("rb") as file:
            text = file.read(64).decode().strip() if path.is_file() else ""
    except (OSError, UnicodeDecodeError):
        return None
    iteration = text.isascii() and text.isdecimal() and len(text) <= DIGITS
    return text if text == "release" or iteration else None


def whole_iterations(directory: Path | str) -> list[int]:
    """The iterations whose checkpoints are complete, the newest first."""
    found = []
    for path in Path(directory).glob("iter_*"):
        said = path.name.removeprefix("iter_")
        if said.isascii() and said.isdecimal():
            try:
                read_metadata(path)
            except UserError:
                continue  # a save was interrupted there
            found.append(int(said))
    return sorted(found, reverse=True)


def tracked_folder(directory: Path | str) -> Path | None:
    """The checkpoint that the tracker file names; None where it is missing or torn, or that is not
    there."""
    said = tracked(directory)
    path = None if said is None else _named(directory, said)
    return path if path is not None and path.is_dir() else None


def _named(directory: Path | str, said: str) -> Path:
    """The checkpoint of what a tracker file says."""
    return Path(directory) / ("release" if said == "release" else f"iter_{int(said):07d}")


def mend_tracker(directory: Path | str, *, write: bool) -> str:
    """Make the tracker file of a run's folder name the newest whole checkpoint, where it is missing
    or torn, or names one that is not there: a kill while Megatron writes it leaves that. Returns
    what was done, "" for nothing.

    write: whether this process writes the file; all of a job's come to the same.
    """
    directory = Path(directory)
    if tracked_folder(directory) is not None:
        return ""
    whole = whole_iterations(directory)
    if not whole:
        begun = sorted(path.name for path in directory.glob("iter_*"))
        if not begun:
            return ""
        return f"{directory}: {', '.join(begun)} is not whole, its save was interrupted"
    said = tracked(directory)
    if write:
        write_text(directory / TRACKER, str(whole[0]))
    state = "was missing or torn" if said is None else f"named {said}, which is not there"
    return f"{directory / TRACKER} {state}: it names iteration {whole[0]} now, the newest whole one"


def latest_checkpoint(directory: Path | str, iteration: int | None = None) -> Path:
    """The folder of the checkpoint that the tracker file names, or of `iteration`; it is whole, and
    none of its pickles makes what a checkpoint has no need of. Where the tracker file is missing or
    torn, the newest whole iteration.

    Raises:
        UserError: no folder, no tracker, a tracker that says neither a number nor "release", or a
            checkpoint that is missing, was cut short or holds another pickle (pickles.py).
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory} does not exist: name a Megatron checkpoint folder")
    path = directory / f"iter_{iteration:07d}" if iteration is not None else _newest(directory)
    if not path.is_dir():
        present = sorted(
            p.name for p in directory.iterdir() if p.name == "release" or p.name.startswith("iter_")
        )
        raise UserError(
            f"{path} does not exist: {directory} holds {', '.join(present) or 'no checkpoint'}"
        )
    check_objects(path, read_metadata(path))
    return path


def _newest(directory: Path) -> Path:
    """The checkpoint to take from a folder; it need not be there."""
    if (path := tracked_folder(directory)) is not None:
        return path
    if whole := whole_iterations(directory):
        return directory / f"iter_{whole[0]:07d}"
    tracker, said = directory / TRACKER, tracked(directory)
    if not tracker.is_file():
        raise UserError(
            f"{directory} has no {TRACKER}: no checkpoint was completed there, name another folder"
        )
    if said is None:
        raise UserError(
            f"{tracker} says {tracker.read_bytes()[:40]!r}: it must say 'release' or an iteration,"
            " correct it"
        )
    return _named(directory, said)


def read_metadata(checkpoint: Path | str) -> Metadata:
    """The `.metadata` of one torch_dist checkpoint folder; every data file is there and long
    enough.

    Raises:
        UserError: the folder is no torch_dist checkpoint, saving it was interrupted, its pickle is
            not one of pickles.py, or it names a file outside the folder.
    """
    checkpoint = Path(checkpoint)
    hint = "saving it was interrupted, or the copy is incomplete: use another iteration"
    for name in ("metadata.json", ".metadata"):
        if not (checkpoint / name).is_file():
            raise DamagedError(
                f"{checkpoint} has no {name}: not a torch_dist checkpoint, or {hint}", checkpoint
            )
    try:
        metadata = load_description(checkpoint / ".metadata")
    except UserError as refusal:
        listed = read_lists(checkpoint).get(".metadata")
        if listed is not None and checksum(checkpoint / ".metadata") != listed.checksum:
            raise DamagedError(
                f"{refusal}. Its checksum differs from that of what was saved", checkpoint
            ) from refusal
        raise
    except Exception as error:  # a damaged pickle may raise almost anything
        raise DamagedError(
            f"{checkpoint / '.metadata'} cannot be read ({error}): {hint}", checkpoint
        ) from error
    ends: dict[str, int] = {}
    storage: dict[Any, Any] = metadata.storage_data or {}
    for info in storage.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        file = inside(checkpoint, name)
        if not file.is_file() or file.stat().st_size < end:
            raise DamagedError(f"{file} is missing or shorter than {end} bytes: {hint}", checkpoint)
    return metadata
