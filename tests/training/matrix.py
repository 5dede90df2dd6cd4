"""The cells of the parallelism matrix: which layouts take the same steps as one rank, of which
model."""

from dataclasses import dataclass
from typing import Any

from tests.training.runs import QWEN3_MOE

TP2, PP2, PP4, CP2, CP4, EP2, EP4 = (
    f"--{kind}-parallel-size {size}"
    for kind, size in (
        ("tensor-model", 2),
        ("pipeline-model", 2),
        ("pipeline-model", 4),
        ("context", 2),
        ("context", 4),
        ("expert-model", 2),
        ("expert-model", 4),
    )
)
TP2_SP = f"{TP2} --sequence-parallel"
VPP2 = f"{PP2} --num-layers-per-virtual-pipeline-stage 1"
OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SELECTIVE = "--recompute-granularity selective --recompute-modules core_attn mlp"
FUSED = "--tsft-fuse-head"
WHOLE_EXPERTS = "--expert-tensor-parallel-size 1"

# what each model's configuration says beside the tests' tiny Llama
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("LlamaForCausalLM", {}),
    "tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "experts": QWEN3_MOE,
}


@dataclass(frozen=True)
class Cell:
    """One layout: the processes it takes and the flags that make it."""

    model: str
    ranks: int
    flags: str


CELLS = {
    # one kind of parallelism
    "TP2": Cell("dense", 2, TP2),
    "TP2 SP": Cell("dense", 2, TP2_SP),
    "TP4 SP": Cell(
        "dense", 4, "--tensor-model-parallel-size 4 --sequence-parallel"
    ),  # two ranks share a key head
    "PP2": Cell("dense", 2, PP2),
    "PP4": Cell("dense", 4, PP4),
    "PP2 VPP2": Cell("dense", 2, VPP2),
    "CP2": Cell("dense", 2, CP2),
    "CP4": Cell("dense", 4, CP4),
    "DP2": Cell("dense", 2, ""),
    "DP2 distributed optimizer": Cell("dense", 2, OVERLAP),
    # none, but other batches or memory
    "micro-batch 2": Cell("dense", 1, "--micro-batch-size 2"),
    "micro-batch 8": Cell("dense", 1, "--micro-batch-size 8"),
    "recompute full": Cell("dense", 1, RECOMPUTE),
    "recompute selective": Cell("dense", 1, SELECTIVE),
    # combinations
    "TP2 SP PP2": Cell("dense", 4, f"{TP2_SP} {PP2}"),
    "TP2 SP PP2 VPP2 recompute": Cell("dense", 4, f"{TP2_SP} {VPP2} {RECOMPUTE}"),
    "TP2 SP CP2": Cell("dense", 4, f"{TP2_SP} {CP2}"),
    "PP2 VPP2 CP2": Cell("dense", 4, f"{VPP2} {CP2} --micro-batch-size 2"),
    "CP2 DP2 distributed optimizer": Cell("dense", 4, f"{CP2} {OVERLAP}"),
    "CP2 recompute": Cell("dense", 2, f"{CP2} {RECOMPUTE}"),
    "TP2 SP PP2 CP2": Cell("dense", 8, f"{TP2_SP} {PP2} {CP2}"),
    # embedding and head are one tensor
    "tied: PP2": Cell("tied", 2, PP2),
    "tied: TP2 SP PP2 VPP2": Cell("tied", 4, f"{TP2_SP} {VPP2}"),
    "tied: PP2 CP2 distributed optimizer": Cell("tied", 4, f"{PP2} {CP2} {OVERLAP}"),
    # experts
    "experts: EP2": Cell("experts", 2, EP2),
    "experts: EP4 distributed optimizer": Cell("experts", 4, f"{EP4} {OVERLAP}"),
    "experts: TP2 SP": Cell("experts", 2, TP2_SP),
    "experts: TP2 SP EP2": Cell("experts", 2, f"{TP2_SP} {EP2} {WHOLE_EXPERTS}"),
    "experts: PP2 VPP2 EP2": Cell("experts", 4, f"{VPP2} {EP2}"),
    "experts: CP2 EP2": Cell("experts", 2, f"{CP2} {EP2}"),
    "experts: PP2 VPP2 CP2 EP2": Cell("experts", 4, f"{VPP2} {CP2} {EP2}"),
    "experts: TP2 SP PP2 EP2 recompute": Cell(
        "experts", 4, f"{TP2_SP} {PP2} {EP2} {WHOLE_EXPERTS} {RECOMPUTE}"
    ),
}


# combinations that are tested with one head, so chosen that every flag, and every two that stand
# together in several cells, are tried with both (test_parity.py); all other cells have both
PLAIN_HEAD = (
    "PP4",
    "TP2 SP",
    "TP4 SP",
    "recompute full",
    "TP2 SP PP2 VPP2 recompute",
    "TP2 SP CP2",
    "PP2 VPP2 CP2",
    "CP2 DP2 distributed optimizer",
    "experts: EP4 distributed optimizer",
    "experts: TP2 SP EP2",
    "experts: PP2 VPP2 EP2",
    "experts: CP2 EP2",
)
FUSED_HEAD = (
    "CP4",
    "PP2 VPP2",
    "DP2 distributed optimizer",
    "TP2 SP PP2",
    "CP2 recompute",
    "TP2 SP PP2 CP2",
    "tied: TP2 SP PP2 VPP2",
    "tied: PP2 CP2 distributed optimizer",
    "experts: TP2 SP",
    "experts: PP2 VPP2 CP2 EP2",
    "experts: TP2 SP PP2 EP2 recompute",
)


def heads_of(name: str) -> tuple[bool, ...]:
    """Which heads a cell is tested with: False is the plain one, True the fused one."""
    if name in PLAIN_HEAD:
        return (False,)
    return (True,) if name in FUSED_HEAD else (False, True)


def kinds_of(cell: Cell) -> set[str]:
    """Its model and the names of its flags."""
    return {cell.model, *(word for word in cell.flags.split() if word.startswith("--"))}
