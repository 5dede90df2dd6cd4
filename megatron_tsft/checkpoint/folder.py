"""Megatron's checkpoint folder: its tracker file, its checkpoints, and whether one is whole."""

from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from megatron_tsft.checkpoint.pickles import check_objects, load_description
from megatron_tsft.errors import UserError
from megatron_tsft.inside import inside

TRACKER = "latest_checkpointed_iteration.txt"


def latest_checkpoint(directory: Path | str, iteration: int | None = None) -> Path:
    """The folder of the checkpoint that the tracker file names, or of `iteration`; it is whole, and
    none of its pickles makes what a checkpoint has no need of.

    Raises:
        UserError: no folder, no tracker, a tracker that says neither a number nor "release", or a
            checkpoint that is missing, was cut short or holds another pickle (pickles.py).
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory} does not exist: name a Megatron checkpoint folder")
    if iteration is None:
        tracker = directory / TRACKER
        if not tracker.is_file():
            raise UserError(
                f"{directory} has no {TRACKER}: no checkpoint was completed there, name another"
                " folder"
            )
        text = tracker.read_text().strip()
        if text != "release" and not text.isdecimal():
            raise UserError(
                f"{tracker} says {text!r}: it must say 'release' or an iteration, correct it"
            )
        path = directory / (text if text == "release" else f"iter_{int(text):07d}")
    else:
        path = directory / f"iter_{iteration:07d}"
    if not path.is_dir():
        present = sorted(
            p.name for p in directory.iterdir() if p.name == "release" or p.name.startswith("iter_")
        )
        raise UserError(
            f"{path} does not exist: {directory} holds {', '.join(present) or 'no checkpoint'}"
        )
    check_objects(path, read_metadata(path))
    return path


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
            raise UserError(f"{checkpoint} has no {name}: not a torch_dist checkpoint, or {hint}")
    try:
        metadata = load_description(checkpoint / ".metadata")
    except UserError:
        raise
    except Exception as error:  # a damaged pickle may raise almost anything
        raise UserError(f"{checkpoint / '.metadata'} cannot be read ({error}): {hint}") from error
    ends: dict[str, int] = {}
    storage: dict[Any, Any] = metadata.storage_data or {}
    for info in storage.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        file = inside(checkpoint, name)
        if not file.is_file() or file.stat().st_size < end:
            raise UserError(f"{file} is missing or shorter than {end} bytes: {hint}")
    return metadata
