"""The session's model, data and rank server, and `train`, which runs a command on them."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import (
    BATCH,
    CACHE_TOOL,
    Cache,
    Run,
    Server,
    Train,
    World,
    check_ran,
    make_hf,
    write_rows,
)


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


@pytest.fixture(scope="session")
def train_in(server: Server, world: World) -> Callable[[Path], Train]:
    """train_in(folder): what `train` is, with its runs in `folder`."""
    return lambda folder: functools.partial(run_in, folder, server, world)


@pytest.fixture
def train(train_in: Callable[[Path], Train], tmp_path: Path) -> Train:
    """train(save, *flags, ranks=1, steps=3): a run on the session's model and data; a flag given
    twice: the last wins.

    It stops after `steps` without a checkpoint (writing one takes seconds) unless `keep` is set.
    """
    return train_in(tmp_path)


def run_in(
    folder: Path,
    server: Server,
    world: World,
    save: Path | str,
    *flags: str,
    ranks: int = 1,
    steps: int = 3,
    keep: bool = False,
    timeout: float = 600,
) -> Run:
    """One training command whose files are in `folder`."""
    save = folder / save
    argv = [
        "--tsft-model",
        str(world.base),
        "--tsft-data",
        str(world.train),
        "--tsft-device",
        "cpu",
    ]
    argv += [*BATCH.split(), "--save", str(save), "--train-iters", str(steps if keep else 1000)]
    argv += [] if keep else ["--exit-interval", str(steps), "--save-interval", "1000"]
    log = folder / f"{save.name}.log"
    codes = server.run(ranks, [*argv, *flags], log, timeout)
    logs = [Path(f"{log}.{rank}").read_text(errors="replace") for rank in range(ranks)]
    return Run(codes, logs, save)


@pytest.fixture(scope="session")
def cache(server: Server, world: World, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """cache(teacher, *flags, ranks=1, top_k=8): the folder of a teacher's cache of both data sets,
    made once."""
    made: dict[tuple, Path] = {}

    def make(teacher: Path, *flags: str, ranks: int = 1, top_k: int = 8) -> Path:
        key = (teacher, flags, ranks, top_k)
        if key not in made:
            folder = tmp_path_factory.mktemp("cache")
            argv = [
                "--teacher",
                str(teacher),
                "--data",
                str(world.train),
                str(world.held),
                "--output",
                str(folder),
            ]
            argv += ["--top-k", str(top_k), "--device", "cpu", *flags]
            codes = server.run(ranks, argv, folder.with_suffix(".log"), 600, str(CACHE_TOOL))
            logs = [
                Path(f"{folder.with_suffix('.log')}.{rank}").read_text(errors="replace")
                for rank in range(ranks)
            ]
            check_ran(Run(codes, logs, folder))
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def teacher(world: World) -> Path:
    """An imported teacher that is deeper, wider and has other heads than the student; its Hugging
    Face folder is beside it, teacher_hf."""
    from megatron_tsft.checkpoint.convert import import_hf

    shape: dict[str, Any] = {"num_hidden_layers": 8, "hidden_size": 96, "head_dim": 12}
    shape |= {"intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
    hf = make_hf(world.root / "teacher_hf", **shape)
    import_hf(hf, world.root / "teacher", progress=False)
    return world.root / "teacher"
