"""What a run is told: its command line as Megatron's parser read it, and its place among the
ranks."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_tsft.plan.config import TsftConfig


@dataclass(frozen=True)
class Ranks:
    """This process among all of the job, as torchrun numbers them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @staticmethod
    def of_environment() -> "Ranks":
        """From the variables that torchrun sets; without them one process alone."""
        names = {"rank": "RANK", "size": "WORLD_SIZE"}
        names |= {"local_rank": "LOCAL_RANK", "local_size": "LOCAL_WORLD_SIZE"}
        return Ranks(
            **{k: int(os.environ[name]) for k, name in names.items() if name in os.environ}
        )


@dataclass(frozen=True)
class CommandLine:
    """A command line, read but not yet understood.

    Attributes:
        argv: the words.
        given: argparse destination -> value, of the flags that are on it; defaults are left out.
        options: destination -> the first flag that sets it, for messages.
        config: our own flags.
        ranks: where this process stands.
    """

    argv: tuple[str, ...]
    given: Mapping[str, Any]
    options: Mapping[str, str]
    config: TsftConfig
    ranks: Ranks = Ranks()

    def option(self, destination: str) -> str:
        """The flag of a destination, for messages."""
        return self.options.get(destination, f"--{destination.replace('_', '-')}")
