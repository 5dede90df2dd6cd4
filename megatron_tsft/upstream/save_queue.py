"""Every first save starts a process that imports the program again (seconds, 300 MB) and that
outlives a kill -9.

Upstream: megatron/core/dist_checkpointing/strategies/filesystem_async.py:65 makes a
`multiprocessing.Manager` for the queue of write results (0.19.2). An asynchronous save writes in
another process and needs it; a synchronous one writes in threads of its own process, where a plain
queue does the same. Applies: any device, for runs without --async-save.
"""

import queue
from typing import Any


def applies() -> bool:
    """The function is still Megatron's."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    return filesystem_async.get_write_results_queue.__module__ != __name__


def apply() -> None:
    """One plain queue for the process."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    results: queue.Queue[Any] = queue.Queue()

    def get_write_results_queue(mp_mode: str = "spawn") -> Any:
        """The queue of this process's synchronous saves."""
        return results

    filesystem_async.get_write_results_queue = get_write_results_queue
