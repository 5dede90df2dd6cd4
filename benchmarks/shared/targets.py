"""What the losses are meant to reach, as one table of data, and what a run says about it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FLOOR, PEERS = "floor", "fastest peer"  # besides names of implementations
BOTH = ("bf16", "fp32")


@dataclass(frozen=True)
class Target:
    """`mine` under each objective, divided by `against`, must not exceed `limit`.

    Attributes:
        against: an implementation, FLOOR, or PEERS (the fastest implementation that is not ours).
        of: the objective of `against`; "" for the same one.
        metric: "time" (medians), "memory" (extra bytes, gradient buffers not counted), or "memory
            of logits" (the same bytes divided by the logits', whatever `against`).
    """

    device: str
    part: str
    keys: tuple[str, ...]
    mine: str
    against: str
    limit: float
    of: str = ""
    metric: str = "time"
    dtypes: tuple[str, ...] = BOTH
    shape: str = ""  # the only shape that it is meant for

    def name(self, key: str) -> str:
        if self.metric == "memory of logits":
            return f"{key}: extra memory of {self.mine} / logits' bytes"
        other = f"{self.of or key} {self.against}" if self.of and self.of != key else self.against
        return (
            f"{key}: {'extra memory' if self.metric == 'memory' else 'time'} of {self.mine} /"
            f" {other}"
        )


PLAIN, RESIDUAL, DENSE = ("sft", "dft"), ("gem", "target-sft-eta0"), ("target-sft-dense",)
EVERY = (*PLAIN, *RESIDUAL, *DENSE, "target-sft-topk")
TARGETS = (
    Target(
        "cpu", "logits", PLAIN, "ours-torch", "F.cross_entropy", 0.55, of="sft", dtypes=("bf16",)
    ),
    Target("cpu", "logits", PLAIN, "ours-torch", "megatron", 0.5, of="sft", dtypes=("bf16",)),
    Target(
        "cpu", "logits", PLAIN, "ours-torch", "F.cross_entropy", 0.45, of="sft", dtypes=("fp32",)
    ),
    Target(
        "cpu", "logits", RESIDUAL, "ours-torch", "F.cross_entropy", 0.85, of="sft", dtypes=("bf16",)
    ),
    Target(
        "cpu", "logits", RESIDUAL, "ours-torch", "F.cross_entropy", 0.7, of="sft", dtypes=("fp32",)
    ),
    Target("cpu", "logits", RESIDUAL, "ours-torch", "ours-torch", 1.6, of="sft"),
    Target("cpu", "logits", DENSE, "ours-torch", "plain-autograd", 0.45),
    Target("cpu", "logits", DENSE, "ours-torch", "plain-autograd", 0.05, metric="memory"),
    Target("cpu", "head", EVERY, "ours-fused", "matmul+ours", 1.45),
    Target("cpu", "head", EVERY, "ours-fused", "", 0.1, metric="memory of logits"),
    Target("cpu", "head", DENSE, "ours-fused+teacher-head", "matmul+ours+teacher-head", 1.45),
    Target("cpu", "head", DENSE, "ours-fused+teacher-head", "", 0.1, metric="memory of logits"),
    Target("cuda", "logits", RESIDUAL, "ours-triton", "ours-triton", 1.1, of="sft"),
    Target(
        "cuda",
        "logits",
        ("sft",),
        "ours-triton",
        FLOOR,
        1.25,
        dtypes=("bf16",),
        shape="8192x131072",
    ),
    Target(
        "cuda", "logits", ("sft",), "ours-triton", PEERS, 1.0, dtypes=("bf16",), shape="8192x131072"
    ),
    Target("cuda", "head", EVERY, "ours-fused", "matmul+ours", 1.45),
    Target("cuda", "head", EVERY, "ours-fused", "", 0.1, metric="memory of logits"),
    Target("cuda", "head", DENSE, "ours-fused+teacher-head", "matmul+ours+teacher-head", 1.45),
    Target("cuda", "head", DENSE, "ours-fused+teacher-head", "", 0.1, metric="memory of logits"),
)


def floor_ms(copy_ms: float, passes: int) -> float:
    """The time of a copy kernel over `passes` times the logits' bytes; copying them once moves them
    twice."""
    return copy_ms * passes / 2


def measured_ratio(target: Target, key: str, section: Mapping[str, Any]) -> float | None:
    """Of one section's rows; None where a row is missing or has no value."""
    rows = {
        (row["objective"], row["implementation"]): row
        for row in section["rows"]
        if row["status"] == "measured"
    }
    field = "median_ms" if target.metric == "time" else "extra_bytes"
    mine = rows.get((key, target.mine), {}).get(field)
    if target.metric == "memory of logits":
        other = section["logits_bytes"]
    elif target.against == FLOOR:
        other = section["floor_ms"].get(key)
    elif target.against == PEERS:
        times = [
            row[field]
            for (k, name), row in rows.items()
            if k == key and not name.startswith("ours")
        ]
        other = min(times, default=None)
    else:
        other = rows.get((target.of or key, target.against), {}).get(field)
    return mine / other if mine is not None and other else None


def judge(sections: Sequence[Mapping[str, Any]], device: str, threads: int) -> list[dict[str, Any]]:
    """Every target that is meant for this device, once for each section that it is meant for."""
    found = []
    for section in sections:
        for target in TARGETS:
            meant = (
                target.device == device
                and target.part == section["part"]
                and section["dtype"] in target.dtypes
            )
            if not meant or target.shape not in ("", section["shape"]):
                continue
            for key in target.keys:
                # the CPU's are meant for one thread
                ratio = (
                    measured_ratio(target, key, section)
                    if device != "cpu" or threads == 1
                    else None
                )
                verdict = (
                    "not measured"
                    if ratio is None
                    else "met"
                    if ratio <= target.limit
                    else "not met"
                )
                found.append(
                    {
                        "section": f"{section['shape']} {section['dtype']} {section['part']}",
                        "target": target.name(key),
                        "measured": ratio,
                        "to_reach": target.limit,
                        "verdict": verdict,
                    }
                )
    return found
