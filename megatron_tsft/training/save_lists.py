"""Lists of checksums for a run's checkpoints: each rank lists the files that it wrote, in a thread
beside the training."""

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.training import checkpointing, training

from megatron_tsft import console
from megatron_tsft.checkpoint.manifest import LISTS, data_files, write_list
from megatron_tsft.training.old_checkpoints import Kept

ALL = Kept()


def own_files(checkpoint: Path, rank: int) -> list[str]:
    """What a rank wrote: `__<rank>_<i>.distcp`; rank 0 also what describes all of them."""
    return [
        name
        for name in data_files(checkpoint)
        if name.startswith(f"__{rank}_") or (rank == 0 and not name.startswith("__"))
    ]


class SaveLists:
    """The lists of one rank."""

    def __init__(self, save: Path, rank: int, kept: Kept) -> None:
        self._save, self._rank, self._kept = save, rank, kept
        self._deleting = threading.Lock()
        self._threads: list[threading.Thread] = []

    def before(self, iteration: int) -> None:
        """A save begins; lists of an earlier one of that iteration are of other files."""
        if self._rank == 0:
            for path in self._folder(iteration).glob(LISTS):
                path.unlink(missing_ok=True)

    def after(self, iteration: int) -> None:
        """A save is on disk, on all ranks."""
        thread = threading.Thread(target=self._write, args=(iteration,), daemon=True)
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        thread.start()

    def join(self) -> None:
        """Wait for what is being written."""
        for thread in self._threads:
            thread.join()

    def _folder(self, iteration: int) -> Path:
        return self._save / f"iter_{iteration:07d}"

    def _write(self, iteration: int) -> None:
        folder = self._folder(iteration)
        try:
            write_list(folder, own_files(folder, self._rank), self._rank)
        except OSError as error:
            if not folder.is_dir():
                return  # a later save has removed it (--save-retain-interval)
            console.say(f"{folder} has no checksums of rank {self._rank}: {error}")
            return
        if self._rank == 0:
            with self._deleting:
                self._kept.delete_others(self._save, iteration)


@contextlib.contextmanager
def listing(
    save: str | None,
    rank: int,
    kept: Kept = ALL,
    before: Callable[[Any, Any], bool] = lambda model, optimizer: True,
) -> Any:
    """Inside, Megatron's saves are followed by lists; at the end all are written.

    Args:
        save: the run's folder.
        rank: of this process.
        kept: which checkpoints stay.
        before: is asked with the model's chunks and the optimizer whether to save; it may raise.

    Megatron has no hook behind a save: the names that its loop calls are wrapped
    (training/training.py imports `save_checkpoint`; checkpointing.py hands an asynchronous save to
    `schedule_async_save`, whose last function runs when all ranks have written).
    """
    if not save:
        yield
        return
    lists = SaveLists(Path(save), rank, kept)
    save_checkpoint, schedule = training.save_checkpoint, checkpointing.schedule_async_save
    pending: list[int] = []  # the iteration whose asynchronous save is being scheduled

    def saved(iteration: int, *args: Any, **kwargs: Any) -> Any:
        if not before(*args[:2]):
            return None
        lists.before(iteration)
        pending[:] = [iteration]
        result = save_checkpoint(iteration, *args, **kwargs)
        if pending:  # nothing was handed over: it is on disk
            lists.after(iteration)
        return result

    def scheduled(request: Any) -> Any:
        if pending:
            iteration = pending.pop()
            request.add_finalize_fn(lambda: lists.after(iteration))
        return schedule(request)

    training.save_checkpoint, checkpointing.schedule_async_save = saved, scheduled
    try:
        yield
    finally:
        training.save_checkpoint = save_checkpoint
        checkpointing.schedule_async_save = schedule
        lists.join()
