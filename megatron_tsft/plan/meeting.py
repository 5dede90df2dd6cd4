"""Where the ranks of a job meet before Megatron starts: a few words through torchrun's store, no
collective."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from megatron_tsft.plan.command_line import Ranks

# a rank that compares checksums comes late, and one that fails is ended by torchrun
PATIENCE = timedelta(days=1)
CALL = 30.0  # seconds between the first rank's time-out and the last one's


class Meeting:
    """One process alone: what `share` and `gather` give is its own."""

    def torchs_store(self, patience: timedelta) -> Any:
        """The store for torch's process group, which meets there, too; None: its own."""
        return None

    def share(self, what: Callable[[], Any]) -> Any:
        """What rank 0 makes of it (JSON), on all ranks."""
        return what()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (JSON), in their order, on all ranks."""
        return [value]

    def absent(self) -> dict[int, str]:
        """The ranks that do not say within half a minute that they ask, too -> their hosts."""
        return {}


class StoreMeeting(Meeting):
    """Several ranks, which call the same methods in the same order."""

    def __init__(self, ranks: Ranks):
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        whole, *_ = next(rendezvous("env://", ranks.rank, ranks.size))
        whole.set_timeout(PATIENCE)
        # what torchrun starts again may meet the same store
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._ranks, self._times, self._whole = ranks, 0, whole
        self._store = PrefixStore(f"tsft/{attempt}", whole)
        self._torchs = PrefixStore(f"torch/{attempt}", whole)
        self._store.set(f"host/{ranks.rank}", socket.gethostname())

    def torchs_store(self, patience: timedelta) -> Any:
        """The store for torch's process group; ours is not for use afterwards."""
        self._whole.set_timeout(patience)
        return self._torchs

    def share(self, what: Callable[[], Any]) -> Any:
        """What rank 0 makes of it (JSON), on all ranks."""
        key = self._key()
        if self._ranks.rank == 0:
            value = what()
            self._store.set(key, json.dumps(value))
            return value
        return json.loads(self._store.get(key))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (JSON), in their order, on all ranks."""
        key, ranks = self._key(), self._ranks
        self._store.set(f"{key}/{ranks.rank}", json.dumps(value))
        # rank 0 reads them, so that a large job does not ask for the square of its ranks
        return self.share(
            lambda: [json.loads(self._store.get(f"{key}/{rank}")) for rank in range(ranks.size)]
        )

    def absent(self) -> dict[int, str]:
        """The ranks that do not say within half a minute that they ask, too -> their hosts."""
        ranks = range(self._ranks.size)
        with contextlib.suppress(Exception):  # the store may have gone with its rank
            self._store.set(f"asks/{self._ranks.rank}", "1")
            deadline = time.monotonic() + CALL
            while time.monotonic() < deadline:
                missing = [rank for rank in ranks if not self._store.check([f"asks/{rank}"])]
                if not missing:
                    return {}
                time.sleep(1)
            return {rank: self._store.get(f"host/{rank}").decode() for rank in missing}
        return {}

    def _key(self) -> str:
        self._times += 1
        return str(self._times)


def meet(ranks: Ranks) -> Meeting:
    """Where the ranks of this job meet."""
    return StoreMeeting(ranks) if ranks.size > 1 else Meeting()
