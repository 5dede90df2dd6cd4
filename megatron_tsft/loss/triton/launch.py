"""Launches the kernels on a shard: the two functions of the torch path (token_chunks.py)."""

import torch
import triton
from torch import Tensor

from megatron_tsft.loss.shard import GradientWeights, Shard
from megatron_tsft.loss.statistics import MAXIMA, SUMS, Selection, Table
from megatron_tsft.loss.teacher import FLOOR, DenseTeacher, SparseTeacher
from megatron_tsft.loss.triton.backward import backward_kernel
from megatron_tsft.loss.triton.forward import forward_kernel
from megatron_tsft.objectives import Scalar

BLOCK = 4096  # columns a step: 16 a thread
TOP_K_ROWS = 1024  # torch.topk's own scratch stays small


def local_statistics(shard: Shard, selection: Selection) -> Table:
    """One read of logits and teacher: this shard's statistics, [K, N] fp32."""
    table = Table.empty(selection, len(shard.logits), torch.float32, shard.logits.device)
    if not shard.columns or not len(shard.logits):
        return table
    dense = shard.teacher if selection.teacher_rows else None
    outputs = {f"{name}_out": table.get(name) for name in OUTPUTS}
    with _device(shard.logits):
        forward_kernel[(len(shard.logits),)](
            **_logits(shard),
            active=shard.active.contiguous(),
            **_pi(shard, dense, used=selection.residual),
            **outputs,
            **_meta(shard.columns),
        )
    if selection.top_k:
        _largest(shard, table.top)
    return table


def write_gradient(shard: Shard, weights: GradientWeights, out: Tensor) -> None:
    """dloss/dlogits of a shard into `out` [N, width], which may be the logits themselves."""
    if not len(shard.logits):
        return
    dense = shard.teacher if weights.m_t is not None else None
    with _device(shard.logits):
        backward_kernel[(len(shard.logits),)](
            **_logits(shard),
            width=shard.logits.shape[1],
            **{ARGUMENT.get(name, name): _vector(value) for name, value in vars(weights).items()},
            **_pi(shard, dense, used=weights.pi is not None),
            grad=out,
            grad_row_stride=out.stride(0),
            grad_column_stride=out.stride(1),
            **_meta(shard.logits.shape[1]),
        )
    # autograd does not see what a kernel writes; with it,
    # logits written over are noticed by who has saved them
    torch.autograd.graph.increment_version(out)


ARGUMENT = {
    "label": "at_label"
}  # what the kernel calls a GradientWeights field that would clash with the shard's
OUTPUTS = (*MAXIMA, *SUMS)


def _logits(shard: Shard) -> dict:
    return {
        "logits": shard.logits,
        "row_stride": shard.logits.stride(0),
        "column_stride": shard.logits.stride(1),
        "columns": shard.columns,
        "scale": shard.scale,
        "label": shard.label.contiguous(),
    }


def _vector(value: Tensor | None) -> Tensor | None:
    """[N] with its numbers side by side, as kernels index them; an expanded tensor has one."""
    return None if value is None else value.contiguous()


def _pi(shard: Shard, dense: DenseTeacher | SparseTeacher | None, used: bool) -> dict:
    """The teacher and pi's exponents. `dense` is read though pi does not need it: for log T(y)."""
    sparse = shard.teacher if used and isinstance(shard.teacher, SparseTeacher) else None
    values = dense.values if isinstance(dense, DenseTeacher) else None
    a, b = (_per_token(weight, shard.logits) if used else None for weight in (shard.a, shard.b))
    k = sparse.ids.shape[1] if sparse else 0
    return {
        "a": a,
        "a_stride": a.dim() if a is not None else 0,
        "b": b,
        "b_stride": b.dim() if b is not None else 0,
        "teacher": values,
        "teacher_row_stride": values.stride(0) if values is not None else 0,
        "teacher_column_stride": values.stride(1) if values is not None else 0,
        "ids": sparse.ids.contiguous() if sparse else None,
        "logprobs": sparse.logprobs.contiguous() if sparse else None,
        "tail": _vector(sparse.tail) if sparse else None,
        "k": k,
        "K_BLOCK": triton.next_power_of_2(max(k, 1)),
    }


def _per_token(weight: Scalar, logits: Tensor) -> Tensor:
    """fp32, [] or [N]. A number becomes a tensor by a fill, for which the host does not wait."""
    if isinstance(weight, Tensor):
        return weight.contiguous()
    return torch.full((), weight, dtype=torch.float32, device=logits.device)


def _meta(columns: int) -> dict:
    block = min(BLOCK, triton.next_power_of_2(columns))
    return {"BLOCK": block, "num_warps": 8 if block >= 2048 else 4}


def _largest(shard: Shard, top: Tensor) -> None:
    """The k largest z of each token into `top` [k, N]."""
    k = min(len(top), shard.columns)
    for i in range(0, len(shard.logits), TOP_K_ROWS):
        rows = slice(i, i + TOP_K_ROWS)
        z = shard.logits[rows, : shard.columns].topk(k, dim=1, largest=shard.scale > 0).values
        top[:k, rows] = (z.float() * shard.scale).clamp(min=FLOOR).T


def _device(logits: Tensor):
    """Triton launches on the current device, which need not be the logits'."""
    return torch.cuda.device(logits.device if logits.is_cuda else -1)
