"""Which of a run's checkpoints are kept (--tsft-keep-last, --tsft-keep-every)."""

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_tsft.checkpoint.folder import whole_iterations


@dataclass(frozen=True)
class Kept:
    """The newest `last` whole checkpoints (0: all), and those of each `every`-th step (0: none)."""

    last: int = 0
    every: int = 0

    def delete_others(self, save: Path, newest: int) -> list[int]:
        """Delete whole checkpoints that are not kept; returns their iterations.

        Whatever is not whole is left: it is being written, or tells of a failure; a link is left,
        too. A folder first loses its name, so that one that is half deleted is none.

        Args:
            save: the run's folder.
            newest: the iteration that was just completed; younger ones, of a run that went on from
                an older checkpoint, are not touched.
        """
        if not self.last:
            return []
        for left in save.glob(".deleted-iter_*"):
            shutil.rmtree(left, ignore_errors=True)
        whole = [number for number in whole_iterations(save) if number <= newest]
        deleted = []
        for number in whole[self.last :]:
            folder = save / f"iter_{number:07d}"
            if folder.is_symlink() or (self.every and number % self.every == 0):
                continue
            aside = save / f".deleted-{folder.name}"
            with contextlib.suppress(OSError):
                folder.rename(aside)
                shutil.rmtree(aside)
                deleted.append(number)
        return deleted
