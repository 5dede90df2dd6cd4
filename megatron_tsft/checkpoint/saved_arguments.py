"""The arguments that a run's checkpoint was saved with, read without Megatron and without running
anything that the file names."""

import io
from pathlib import Path
from typing import Any

from megatron_tsft.checkpoint.folder import read_metadata
from megatron_tsft.checkpoint.pickles import load_object
from megatron_tsft.errors import UserError

COMMON = "common_state"  # Megatron's name for all that is no tensor
LEGACY_FILE = "common.pt"  # where older versions of Megatron keep it


def saved_arguments(checkpoint: Path) -> dict[str, Any]:
    """Argparse destination -> value, of the run that saved this checkpoint.

    Raises:
        UserError: they are not there, or cannot be read.
    """
    try:
        common = load_object(_bytes_of(checkpoint))
        while isinstance(common, list | io.BytesIO):  # a list of one, or bytes in bytes
            common = common[0] if isinstance(common, list) else load_object(common)
        return dict(vars(common["args"]))
    except UserError:
        raise
    except Exception as error:  # a damaged pickle may raise almost anything
        raise UserError(
            f"{checkpoint} does not say what arguments it was saved with ({error!r:.200}): the copy"
            " is incomplete, use another checkpoint"
        ) from error


def _bytes_of(checkpoint: Path) -> io.BytesIO:
    """The file, or the part of one, that holds what is no tensor."""
    if (checkpoint / LEGACY_FILE).is_file():
        return io.BytesIO((checkpoint / LEGACY_FILE).read_bytes())
    storage: dict[Any, Any] = read_metadata(checkpoint).storage_data or {}
    place = next(info for index, info in storage.items() if index.fqn.split("/")[0] == COMMON)
    with (checkpoint / place.relative_path).open("rb") as file:
        file.seek(place.offset)
        return io.BytesIO(file.read(place.length))
