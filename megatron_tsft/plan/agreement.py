"""What one rank found, told to all of them before Megatron starts."""

import os
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from megatron_tsft.plan.command_line import Ranks

PATIENCE = timedelta(hours=2)  # a rank may have to read much
# the connections, kept: where torchrun has no store of its own, rank 0's serves the others, and
# torch's process group uses it again
_stores: list[Any] = []
_asked = 0


def told_to_all(ranks: Ranks, problem: str | None) -> str | None:
    """A problem that some rank has, on every rank; None where none has one. Every rank calls it,
    as often as the others. A plan for ranks that are not there (no launcher has set where they
    meet) is one process's own."""
    global _asked
    if ranks.size == 1 or "MASTER_ADDR" not in os.environ:
        return problem
    if not _stores:
        store, _, _ = next(iter(rendezvous("env://", ranks.rank, ranks.size)))
        _stores.append(store)
    _asked += 1
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"tsft/{attempt}/{_asked}", _stores[0])
    if problem is not None:
        store.set("problem", problem)
    if store.add("done", 1) == ranks.size:
        store.set("all", "done")
    store.wait(["all"], PATIENCE)
    return store.get("problem").decode() if store.check(["problem"]) else None
