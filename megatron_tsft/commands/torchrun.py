"""torchrun, with the error that stopped a run as the last line on the screen.

torchrun's own summary ends in a frame of twenty lines with the error somewhere inside. This takes
the same flags, starts the same agent (torch/distributed/run.py) and says last what the first rank
that failed has written of its error.
"""

import os
import signal
import sys
from typing import Any

from megatron_tsft.entry import INTERRUPTED


def main(argv: list[str] | None = None) -> int:
    """Start the ranks and wait; the exit status is that of the first rank that failed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(sys.argv[1:] if argv is None else argv))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(last_words(rank, failure), file=sys.stderr, flush=True)
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            return INTERRUPTED
        print(f"error: stopped by {error.sigval.name}", file=sys.stderr, flush=True)
        return 128 + error.sigval
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


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
    memory = "; SIGKILL often means that memory ran out" if failure.exitcode == -9 else ""
    place = f"rank {rank} (local rank {failure.local_rank} of {node})"
    return f"error: {place} ended with {how}{memory}"


if __name__ == "__main__":
    sys.exit(main())
