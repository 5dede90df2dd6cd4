"""A synchronous save starts a manager process; with the repair it starts none and writes the
same."""

import multiprocessing
import tempfile
from typing import Any

from megatron_tsft.upstream import save_queue
from tests.fresh import fresh
from tests.upstream.source import check_lines


def save_twice() -> dict[str, Any]:
    """Children of the process after a save, and what a load gives back: before and after the
    repair."""
    from megatron_tsft import cpu

    cpu.install()
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)

    def save_and_load() -> tuple[int, list[float]]:
        before = len(multiprocessing.active_children())
        with tempfile.TemporaryDirectory() as folder:
            weights = torch.arange(6.0)
            dist_checkpointing.save({"w": ShardedTensor.from_rank_offsets("w", weights)}, folder)
            empty = ShardedTensor.from_rank_offsets("w", torch.zeros(6))
            loaded: Any = dist_checkpointing.load({"w": empty}, folder)
        return len(multiprocessing.active_children()) - before, loaded["w"].tolist()

    result: dict[str, Any] = {"applies": [save_queue.applies()], "upstream": save_and_load()}
    save_queue.apply()
    result["applies"].append(save_queue.applies())
    return result | {"repaired": save_and_load()}


def test_a_save_starts_no_process() -> None:
    result = fresh(save_twice)
    assert result["applies"] == [True, False]
    assert result["upstream"] == [1, [0, 1, 2, 3, 4, 5]]
    assert result["repaired"] == [0, [0, 1, 2, 3, 4, 5]]


def test_the_docstring_names_the_right_line() -> None:
    lines = {
        ("core/dist_checkpointing/strategies/filesystem_async.py", 65): "ctx.Manager().Queue()"
    }
    check_lines(save_queue, lines)
