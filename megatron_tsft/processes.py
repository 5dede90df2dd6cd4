"""What the kernel says of other processes (Linux: man 5 proc_pid_stat)."""

import contextlib
import os
from pathlib import Path

STATES = {"Z": "dead", "X": "dead", "T": "stopped", "t": "stopped"}


def state_of(pid: int) -> tuple[str, str]:
    """(alive, stopped or dead, the start time in clock ticks or "") of a process of this machine;
    one that nobody has waited for yet is dead."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        if Path("/proc/self/stat").exists():
            return "dead", ""
        try:  # no /proc: macOS
            os.kill(pid, 0)
        except ProcessLookupError:
            return "dead", ""
        except OSError:
            pass
        return "alive", ""
    # the name, in parentheses, may hold anything
    fields = text.rpartition(")")[2].split()
    return STATES.get(fields[0], "alive"), fields[19]


def children_of(pid: int) -> list[int] | None:
    """The children of all threads of a process; None where this kernel does not say."""
    files = list(Path(f"/proc/{pid}/task").glob("*/children"))
    children: list[int] = []
    for file in files:
        with contextlib.suppress(OSError):  # a thread may have ended
            children += map(int, file.read_text().split())
    return children if files else None
