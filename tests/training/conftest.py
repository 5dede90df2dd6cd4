"""The session's model, data and rank server, and `train`, which runs a command on them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.runs import BATCH, Run, Server, Train, World, make_hf, write_rows


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    from megatron_tsft.checkpoint.convert import import_hf
    from megatron_tsft.data.prepare import prepare

    world = World(tmp_path_factory.mktemp("training"))
    import_hf(make_hf(world.hf), world.base, progress=False)
    for name, count, seed in (("train", 60, 0), ("held", 13, 1)):
        rows = write_rows(world.root / f"{name}.jsonl", count, seed)
        prepare(rows, world.hf, world.root / name, progress=False)
    return world


@pytest.fixture
def train(server: Server, world: World, tmp_path: Path) -> Train:
    """train(save, *flags, ranks=1, steps=3): a run on the session's model and data; a flag given twice: the last wins.

    It stops after `steps` without a checkpoint (writing one takes seconds) unless `keep` is set.
    """

    def run(
        save: Path | str, *flags: str, ranks: int = 1, steps: int = 3, keep: bool = False, timeout: float = 120
    ) -> Run:
        save = tmp_path / save
        argv = ["--tsft-model", str(world.base), "--tsft-data", str(world.train), "--tsft-device", "cpu"]
        argv += [*BATCH.split(), "--save", str(save), "--train-iters", str(steps if keep else 1000)]
        argv += [] if keep else ["--exit-interval", str(steps), "--save-interval", "1000"]
        log = tmp_path / f"{save.name}.log"
        codes = server.run(ranks, [*argv, *flags], log, timeout)
        logs = [Path(f"{log}.{rank}").read_text(errors="replace") for rank in range(ranks)]
        return Run(codes, logs, save)

    return run
