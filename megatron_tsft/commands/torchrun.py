"""torchrun, with the error that stopped a run as the last line on the screen, and with ranks that
may save when it is stopped.

torchrun's own summary ends in a frame of twenty lines with the error somewhere inside. This takes
the same flags, starts the same agent (torch/distributed/run.py) and says last what the first rank
that failed has written of its error.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_tsft.entry import INTERRUPTED

PATIENCE = 24 * 3600  # seconds for a save; whoever wants less says it twice

MEANS = {  # a signal that ended a rank
    signal.SIGKILL: "; SIGKILL often means that memory ran out",
    signal.SIGBUS: "; SIGBUS means that a file which is mapped into memory (prepared data, a"
    " teacher cache) was cut or cannot be read any more, or that /dev/shm is full",
}


def main(argv: list[str] | None = None) -> int:
    """Start the ranks and wait; the exit status is that of the first rank that failed, or 128 and
    the signal's number."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    said: list[str] = []
    try:
        with ranks_may_save(said):
            run(parse_args(sys.argv[1:] if argv is None else argv))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(last_words(rank, failure), file=sys.stderr, flush=True)
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException as error:
        text = said[0] if said else f"error: stopped by {error.sigval.name}"
        print(text, file=sys.stderr, flush=True)
        return 128 + error.sigval
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


@contextlib.contextmanager
def ranks_may_save(said: list[str]) -> Iterator[None]:
    """Inside, the agent waits for its ranks after it has handed a signal on to them, where torch's
    kills them after 30 seconds (elastic/multiprocessing/api.py, SubprocessContext._close); a second
    signal kills them. What they said last is added to `said`."""
    from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext

    close = SubprocessContext._close

    def patient(self: Any, death_sig: signal.Signals, timeout: int = 30) -> None:
        if not isinstance(sys.exception(), SignalException):  # a rank has failed
            close(self, death_sig, timeout)
            return
        text = f"{death_sig.name}: the ranks save and end; the same signal again kills them"
        print(text, file=sys.stderr, flush=True)
        try:
            close(self, death_sig, PATIENCE)
        except SignalException:
            close(self, signal.SIGKILL, timeout)
            raise
        said.extend(words_of(self.error_files))

    SubprocessContext._close = patient
    try:
        yield
    finally:
        SubprocessContext._close = close


def words_of(files: Mapping[int, str]) -> list[str]:
    """What ranks wrote into their error files, the first rank's first."""
    found = []
    for _, name in sorted(files.items()):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found.append(str(json.loads(Path(name).read_text())["message"]["message"]))
    return found


def last_words(rank: int, failure: Any) -> str:
    """One line of a torch ProcessFailure: what the rank said, or how it ended."""
    message = failure.message  # what the rank wrote into its error file, or torch's own words
    text = message["message"] if isinstance(message, dict) else message
    error_line = next((line for line in text.splitlines() if line.startswith("error")), "")
    if error_line:
        return error_line
    how = f"exit status {failure.exitcode}"
    if failure.exitcode < 0:
        how = f"signal {failure.signal_name()}"
    node = os.environ.get("HOSTNAME", "this node")
    means = MEANS.get(-failure.exitcode, "")
    place = f"rank {rank} (local rank {failure.local_rank} of {node})"
    return f"error: {place} ended with {how}{means}"


if __name__ == "__main__":
    sys.exit(main())
