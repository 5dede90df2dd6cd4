"""Checksums of a checkpoint's files, so that a damaged one is noticed before it is used.

Every folder has lists of its own: a checkpoint of its data, the folder around it of the model card
and of the Hugging Face files that an export takes. An import writes both; of a run's checkpoint
each rank lists the files that it wrote, when they are on disk, beside the training. A checkpoint
whose lists are not whole (the run was killed right behind the save) is told by the sizes that its
.metadata needs, as one without lists is.
"""

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_tsft.atomic import write_text
from megatron_tsft.errors import DamagedError
from megatron_tsft.inside import inside
from megatron_tsft.plain_json import read_json
from megatron_tsft.typed import typed

HOW = ("full", "sizes", "none")
LIST, LISTS = "tsft_files.{:05d}.json", "tsft_files.*.json"
FORMAT_VERSION = 1
ALGORITHM = "xxh3_128"
CHUNK = 1 << 20  # bytes read at once: a buffer that stays in a core's cache
THREADS = 4


@dataclass(frozen=True)
class Listed:
    """A file as it was written: its bytes, and 32 hex digits over them."""

    size: int
    checksum: str


@dataclass(frozen=True)
class FileList:
    """A list as it is on disk; files: name -> how it was written."""

    format_version: int
    algorithm: str
    files: dict[str, Listed]


def checksum(path: Path, progress: Callable[[int], Any] = lambda size: None) -> str:
    """32 hex digits over a file; `progress` is called with the bytes of each chunk."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            progress(count)
    return digest.hexdigest()


def write_list(folder: Path, names: Iterable[str], part: int = 0) -> None:
    """List files of a folder as they are now; `part` numbers the lists of several ranks.

    Raises:
        OSError: a file cannot be read, or the list not written.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        paths = {name: folder / name for name in sorted(names)}
        files = {
            name: Listed(paths[name].stat().st_size, value)
            for name, value in zip(paths, pool.map(checksum, paths.values()), strict=True)
        }
    values = asdict(FileList(FORMAT_VERSION, ALGORITHM, files))
    write_text(folder / LIST.format(part), json.dumps(values, indent=1) + "\n")


def data_files(checkpoint: Path) -> list[str]:
    """The files of a checkpoint that belong into lists: not the lists, and not one that another
    rank is writing, which has a name of its own until it is whole."""
    lists = {path.name for path in checkpoint.glob(LISTS)}
    return sorted(
        path.name
        for path in checkpoint.iterdir()
        if path.name not in lists and not path.name.startswith(".tsft_files") and path.is_file()
    )


def read_lists(folder: Path) -> dict[str, Listed]:
    """All files that are listed in a folder.

    Raises:
        DamagedError: a list is damaged.
    """
    found: dict[str, Listed] = {}
    for path in sorted(folder.glob(LISTS)):
        try:
            values = typed(read_json(path), FileList, "")
            if (values.format_version, values.algorithm) != (FORMAT_VERSION, ALGORITHM):
                raise ValueError(f"{values.algorithm}, version {values.format_version}")
            found |= values.files
        except (ValueError, OSError) as error:
            raise DamagedError(f"{path} is damaged ({error}): {remedy(folder)}", folder) from error
    return found


def remedy(folder: Path) -> str:
    """What to do about a damaged folder."""
    if folder.name.startswith("iter_"):
        return "copy it again, or use another one (--ckpt-step N, export: --iteration N)"
    return "copy the folder again, or import the model again with --overwrite"


def check_folder(
    directory: Path,
    checkpoint: Path,
    how: str = "full",
) -> list[str]:
    """`check_files` of a folder and of one checkpoint in it; returns what of the checkpoint is not
    listed."""
    check_files(directory, how)
    return check_files(checkpoint, how)


def check_files(
    folder: Path,
    how: str = "full",
    *,
    share: tuple[int, int] = (0, 1),
    progress: Callable[[int], Any] = lambda size: None,
) -> list[str]:
    """Compare a folder's files with its lists; returns the names that are not listed.

    Args:
        folder: a checkpoint, or what is around one.
        how: "full" reads every byte, "sizes" none, "none" looks at nothing.
        share: (i, n) reads every n-th file from the i-th on.
        progress: called with the bytes of each chunk that was read.

    Raises:
        DamagedError: the first file that is missing or not what was written, by name.
    """
    if how == "none":
        return []
    listed = read_lists(folder)
    for name, entry in listed.items():
        path = inside(folder, name)
        size = path.stat().st_size if path.is_file() else None
        if size != entry.size:
            state = "is missing" if size is None else f"has {size} bytes instead of {entry.size}"
            raise DamagedError(f"{path} {state}: {remedy(folder)}", folder)
    if how == "full":
        # the largest first, so that shares and threads end together
        ordered = sorted(listed, key=lambda name: (-listed[name].size, name))
        mine = ordered[share[0] :: share[1]]
        with ThreadPoolExecutor(THREADS) as pool:
            found = pool.map(lambda name: checksum(folder / name, progress), mine)
            for name, value in zip(mine, found, strict=True):
                if value != listed[name].checksum:
                    raise DamagedError(
                        f"{folder / name} is damaged (its checksum differs): {remedy(folder)}",
                        folder,
                    )
    return [name for name in data_files(folder) if name not in listed]
