"""Names that a file in a folder gives of others: they stay in the folder."""

from pathlib import Path

from megatron_tsft.errors import UserError
from megatron_tsft.trust import trusted


def inside(folder: Path, name: str) -> Path:
    """The file of that name in a folder.

    Raises:
        UserError: the name or a link leads out of the folder, and folders are not trusted.
    """
    path = folder / name
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
    home, real = folder.resolve(), path.resolve()
    if real.is_relative_to(home):
        return False
    cache = home.parent.parent
    own = home.parent.name == "snapshots" and cache.name.startswith("models--")
    return not (own and real.is_relative_to(cache / "blobs"))
