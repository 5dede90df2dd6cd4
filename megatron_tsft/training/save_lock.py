"""One run at a time in a save folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_tsft import console
from megatron_tsft.errors import UserError
from megatron_tsft.lock import STALE, Lock, hold

LOCK_FILE = ".tsft_lock"


@contextlib.contextmanager
def only_run_in(save: str) -> Iterator[Lock]:
    """Inside, no other run saves to this folder, which is made where it is missing. A run that is
    about to end (it was stopped, or its torchrun was killed) is waited for.

    Raises:
        UserError: another run lives there, or the folder cannot be written.
    """
    folder = Path(save)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(
                hold(
                    folder / LOCK_FILE,
                    f"--save {save}",
                    patience=STALE,
                    say=lambda text: console.say(text),
                )
            )
        except OSError as error:
            raise UserError(
                f"--save {save} cannot be written ({error.strerror}): name another folder, or mend"
                " its permissions"
            ) from error
        try:
            yield lock
        finally:
            stack.close()
            with contextlib.suppress(OSError):  # a run that was refused leaves nothing
                for path in made:
                    path.rmdir()
