"""The one exception that means "the user can fix this": a line on the screen, exit status 2."""

from pathlib import Path


class UserError(ValueError):
    """Bad input or a combination that cannot work; the message is one line that says what was
    wrong, with the value, and what to do.

    met_here_alone: other ranks do not know of it, so this one must say it at once.
    met_by_all: the ranks have agreed on it, so rank 0 says it.
    """

    met_here_alone = False
    met_by_all = False

    def __init__(self, message: str):
        # torch raises a data loader worker's error once more, with the worker's traceback for a
        # message (torch/_utils.py, ExceptionWrapper): what the user needs is its last line
        if message.startswith("Caught UserError in "):
            message = message.strip().splitlines()[-1].partition("UserError: ")[2]
        super().__init__(message)


class DamagedError(UserError):
    """A checkpoint is not what was written; another one may take its place."""

    def __init__(self, message: str, checkpoint: Path):
        super().__init__(message)
        self.checkpoint = checkpoint


class Interrupted(BaseException):
    """A signal ended the command, and no library is to catch it; the message says what has become
    of the work."""

    def __init__(self, number: int, message: str = ""):
        super().__init__(message)
        self.number = number
