"""The entry point under torchrun on GPUs takes the steps that it takes on a CPU in fp32, in every
precision there is.

Not run yet: the machines of this project have no GPU. On a CPU only the harness runs, with the
first of the tests. Tolerances are relative, of losses over three steps. fp32: as between layouts on
CPU (tests/training/test_parity.py), with room for other kernels. bf16: on a CPU it differs by up to
6e-3. FP8 has 3 bits of mantissa, a sixteenth of a number, in every product; its bound is there to
find a wrong scale or layout, not to measure rounding.
"""

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.runs import REPOSITORY, make_hf, write_rows

STEPS = 3
SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 64,
}  # halves are whole blocks of every FP8 recipe
BATCH = (
    "--seq-length 128 --micro-batch-size 2 --global-batch-size 4 --lr 1e-5 --lr-decay-style"
    " constant"
).split()
SFT = ("--tsft-objective", "sft")
GUIDED = ("--tsft-objective", "target-sft", "--tsft-args", "eta=0.5", "--tsft-teacher", "reference")
FP32, BF16, FP8 = 1e-4, 2e-2, 1e-1
LOCAL, ENGINE = ("--transformer-impl", "local"), ("--transformer-impl", "transformer_engine")
NONE = (0, 0)

on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
with_engine = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None,
    reason="Transformer Engine is not installed",
)
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
either_objective = pytest.mark.parametrize("objective", [SFT, GUIDED], ids=["sft", "guided"])
either_head = pytest.mark.parametrize("head", [(), ("--tsft-fuse-head",)], ids=["plain", "fused"])


def capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else NONE


def on_gpus_of(lowest: tuple[int, int], below: tuple[int, int]) -> Any:
    return pytest.mark.skipif(
        not lowest <= capability() < below,
        reason=f"compute capability {capability()} is not {lowest} to {below}",
    )


@dataclass(frozen=True)
class Start:
    """What every run starts from: an imported model and prepared data."""

    base: Path
    data: Path


Rows = list[dict[str, Any]]
Train = Callable[..., Rows]
Truth = Callable[[tuple[str, ...]], Rows]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    from megatron_tsft.checkpoint.convert import import_hf
    from megatron_tsft.data.prepare import prepare

    root = tmp_path_factory.mktemp("gpu")
    weights = make_hf(root / "hf", **SHAPE) / "model.safetensors"
    # four times as wide as what make_hf draws for: half as large, activations stay where they are
    halves = {name: w if "norm" in name else w / 2 for name, w in load_file(weights).items()}
    save_file(halves, weights, metadata={"format": "pt"})
    import_hf(root / "hf", root / "base", progress=False)
    prepare(write_rows(root / "train.jsonl", 60, 0), root / "hf", root / "data", progress=False)
    return Start(root / "base", root / "data")


@pytest.fixture(scope="module")
def train(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """train(device, *flags, ranks=1): rows of metrics.jsonl of a run of three steps from the same
    start."""
    return lambda device, *flags, ranks=1: run(
        start, tmp_path_factory.mktemp("run"), device, flags, ranks
    )


@pytest.fixture(scope="module")
def truth(train: Train) -> Truth:
    """truth(objective): the run on a CPU in fp32."""
    return functools.cache(lambda objective: train("cpu", *objective))


def run(
    start: Start,
    folder: Path,
    device: str,
    flags: tuple[str, ...],
    ranks: int,
    timeout: float = 300,
) -> Rows:
    """The entry point under torchrun, as the launcher starts it."""
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        "--rdzv-backend",
        "c10d",
    ]
    torchrun += ["--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    argv = [
        "--tsft-model",
        str(start.base),
        "--tsft-data",
        str(start.data),
        "--tsft-device",
        device,
        *BATCH,
    ]
    argv += ["--save", str(folder / "save"), "--train-iters", "1000", "--exit-interval", str(STEPS)]
    argv += ["--save-interval", "1000", *flags]
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": ""}
    with (folder / "log").open("w") as log:
        line = [sys.executable, *torchrun, "-m", "megatron_tsft.training.pretrain_gpt", *argv]
        process = subprocess.Popen(line, env=environment, stdout=log, stderr=log)
        try:
            code: int | str = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = f"no end after {timeout} s"
            process.send_signal(
                signal.SIGTERM
            )  # torchrun ends its ranks, which have sessions of their own
            process.wait(60)
    assert code == 0, f"{code}\n{(folder / 'log').read_text(errors='replace')[-5000:]}"
    return [
        json.loads(line) for line in (folder / "save" / "metrics.jsonl").read_text().splitlines()
    ]


def of_preset(recipe: str) -> list[str]:
    """The FP8 flags of the preset with this recipe."""
    (preset,) = (REPOSITORY / "launch" / "presets").glob(
        f"*-{recipe if recipe == 'mxfp8' else f'fp8-{recipe}'}.sh"
    )
    lines = [line.split() for line in preset.read_text().splitlines()]
    return [word for words in lines for word in words if words[0].startswith("--fp8")]


def check(rows: Rows, truth: Rows, tolerance: float, gradients: bool = True) -> None:
    """The same tokens, and losses and their parts as close as `tolerance`, gradient norms five
    times as far.

    gradients: False for a target that begins at the model's own predictions: its gradient is a
        small difference.
    """
    assert len(rows) == len(truth) == STEPS
    for row, true in zip(rows, truth, strict=True):
        assert row["tokens"] == true["tokens"]
        for key in ("loss", "nll", "entropy"):
            assert row[key] == pytest.approx(true[key], rel=tolerance), (row["step"], key)
        if gradients:
            assert row["grad_norm"] == pytest.approx(true["grad_norm"], rel=5 * tolerance), row[
                "step"
            ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "objective", "head"),
    [
        pytest.param("cpu", SFT, (), id="cpu"),  # the harness, where there is no GPU
        pytest.param("cuda", SFT, (), marks=on_a_gpu, id="sft"),
        pytest.param("cuda", SFT, ("--tsft-fuse-head",), marks=on_a_gpu, id="sft-fused"),
        pytest.param("cuda", GUIDED, ("--tsft-fuse-head",), marks=on_a_gpu, id="guided-fused"),
    ],
)
def test_bf16_in_local_layers(
    device: str, objective: tuple[str, ...], head: tuple[str, ...], train: Train, truth: Truth
) -> None:
    check(
        train(device, *objective, *LOCAL, "--bf16", *head),
        truth(objective),
        BF16,
        gradients=objective == SFT,
    )


class TestOnAGpu:
    """What a CPU cannot run."""

    pytestmark = [*on_a_gpu, pytest.mark.slow]

    @either_objective
    @either_head
    def test_fp32_in_local_layers(
        self, head: tuple[str, ...], objective: tuple[str, ...], train: Train, truth: Truth
    ) -> None:
        check(train("cuda", *objective, *LOCAL, *head), truth(objective), FP32)

    def test_gradients_reduced_in_bf16(self, train: Train, truth: Truth) -> None:
        """What the presets set."""
        flags = (
            "--bf16 --grad-reduce-in-bf16 --use-distributed-optimizer --overlap-grad-reduce"
            " --overlap-param-gather"
        )
        check(train("cuda", *SFT, *LOCAL, *flags.split()), truth(SFT), BF16)

    @with_engine
    @either_objective
    @either_head
    def test_bf16_in_transformer_engine(
        self, head: tuple[str, ...], objective: tuple[str, ...], train: Train, truth: Truth
    ) -> None:
        found = train("cuda", *objective, *ENGINE, "--bf16", *head)
        check(found, truth(objective), BF16, gradients=objective == SFT)

    @with_engine
    @either_objective
    @pytest.mark.parametrize(
        "recipe",
        [
            pytest.param("delayed", marks=on_gpus_of((8, 9), (100, 0))),
            pytest.param("tensorwise", marks=on_gpus_of((8, 9), (100, 0))),
            pytest.param("blockwise", marks=on_gpus_of((9, 0), (10, 0))),
            pytest.param("mxfp8", marks=on_gpus_of((10, 0), (12, 0))),
        ],
    )
    def test_fp8(self, recipe: str, objective: tuple[str, ...], train: Train, truth: Truth) -> None:
        """In FP8, and not in bf16 under its name: the losses are near the truth and not bf16's."""
        flags = (*objective, *ENGINE, "--bf16", "--use-distributed-optimizer")
        found = train("cuda", *flags, *of_preset(recipe))
        check(found, truth(objective), FP8, gradients=objective == SFT)
        assert found[0]["loss"] != pytest.approx(train("cuda", *flags)[0]["loss"], rel=1e-6)

    @with_engine
    @pytest.mark.parametrize(
        ("recipe", "more"),
        [
            pytest.param("tensorwise", (), marks=on_gpus_of((8, 9), (100, 0))),
            pytest.param(
                "mxfp8",
                ("--reuse-grad-buf-for-mxfp8-param-ag",),
                marks=on_gpus_of((10, 0), (12, 0)),
            ),
        ],
    )
    def test_parameters_in_fp8(
        self, recipe: str, more: tuple[str, ...], train: Train, truth: Truth
    ) -> None:
        flags = (
            *SFT,
            *ENGINE,
            "--bf16",
            "--use-distributed-optimizer",
            "--fp8-param-gather",
            *more,
        )
        check(train("cuda", *flags, *of_preset(recipe)), truth(SFT), FP8)

    @two_gpus
    @pytest.mark.parametrize(
        "layout",
        ["--tensor-model-parallel-size 2 --sequence-parallel", "--context-parallel-size 2"],
        ids=["tp2-sp", "cp2"],
    )
    @pytest.mark.parametrize(
        "layers", [LOCAL, pytest.param(ENGINE, marks=with_engine)], ids=["local", "te"]
    )
    def test_two_gpus(self, layers: tuple[str, ...], layout: str, train: Train) -> None:
        """Against one GPU, with the packs of both: context parallelism pads conversations."""
        flags = (*SFT, *layers, "--bf16", "--tsft-document-multiple", "4")
        check(train("cuda", *flags, *layout.split(), ranks=2), train("cuda", *flags), BF16)
