"""Names that a file in a folder gives of others: they stay in the folder."""

import os
from pathlib import Path

from megatron_tsft.errors import UserError
from megatron_tsft.trust import trusted
from megatron_tsft.typed import shown


def inside(folder: Path, name: str) -> Path:
    """The file of that name in a folder.

    Raises:
        UserError: the name or a link leads out of the folder, and folders are not trusted.
    """
    path = folder / name
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass  # whoever wants to read it says so
    except (OSError, ValueError) as error:  # too long, or with a character that names cannot have
        raise UserError(
            f"{folder} names {shown(name)}, as no file can be called ({error}): copy it again"
        ) from error
    if not trusted() and leaves(folder, path):
        raise UserError(
            f"{path} is named in {folder} and lies outside of it: copy the file itself there, or,"
            " if you trust whoever wrote the folder, pass --trust (runs: --tsft-trust)"
        )
    return path


def check_links(folder: Path) -> None:
    """Look at everything in a folder that is going to be copied.

    Raises:
        UserError: a link leads out of it, and folders are not trusted.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            inside(folder, str(path.relative_to(folder)))


def leaves(folder: Path, path: Path) -> bool:
    """Whether a path below a folder leads out of it, by its name or by a link.

    The hub's cache is one folder: there, a model's files are links to its own `blobs`.
    """
    # Path.resolve raises where a link names itself
    home, real = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    if real.is_relative_to(home):
        return False
    cache = home.parent.parent
    own = home.parent.name == "snapshots" and cache.name.startswith("models--")
    return not (own and real.is_relative_to(cache / "blobs"))
