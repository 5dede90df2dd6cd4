"""Whether two folders hold the same weights, by names, sizes and samples of every file."""

import hashlib
from pathlib import Path

SAMPLE = 1 << 20  # bytes at the beginning, in the middle and at the end of each file


def weights_fingerprint(folder: Path, *patterns: str, architecture: object = None) -> str:
    """16 hex digits over the files of `folder` that match any pattern; another training run of the
    same model gives others. `architecture` counts too, by its repr."""
    digest = hashlib.sha256(repr(architecture).encode())
    for path in sorted(
        {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    ):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for place in (0, max(size - SAMPLE, 0) // 2, max(size - SAMPLE, 0)):
                file.seek(place)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]
