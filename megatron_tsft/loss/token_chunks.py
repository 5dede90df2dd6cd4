"""The torch path: statistics and gradient of a shard, a few tokens at a time, so that scratch stays
in the cache.

fp32 scratch (fp64 for fp64 logits) is two or three tensors of CHUNK_ELEMENTS; nothing
vocabulary-sized is made but the gradient. Exponents are in bits here, (z - m) log2 e: on the CPU
torch's exp2 is nearly three times as fast as its exp, and as exact. What leaves in the table is in
nats.
"""

import contextlib
import math
import mmap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_tsft.loss.shard import GradientWeights, Shard
from megatron_tsft.loss.statistics import Selection, Table
from megatron_tsft.loss.teacher import FLOOR, DenseTeacher, SparseTeacher
from megatron_tsft.objectives import Scalar

CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}
LOG2E, LN2 = math.log2(math.e), math.log(2)
FEWEST_ELEMENTS = 1 << 16  # below, the overhead of a call outweighs its work
HUGE = 32 << 20  # bytes; the C library maps memory of this size anew each time, page by page


def local_statistics(shard: Shard, selection: Selection) -> Table:
    """One read of logits and teacher: the shard's statistics, fp32 (fp64 for fp64 logits)."""
    chunks = Chunks(shard, shard.active)
    table = Table.empty(selection, len(shard.logits), chunks.dtype, shard.logits.device)
    if not shard.columns:
        return table
    z_y = (chunks.at_label(shard.logits) * shard.scale).clamp(min=FLOOR)
    table["z_y"].copy_(torch.where(shard.label >= 0, z_y, table["z_y"]))
    if selection.teacher_label:
        assert isinstance(shard.teacher, DenseTeacher)
        t_y = chunks.at_label(shard.teacher.values).clamp(min=FLOOR)
        table["t_y"].copy_(torch.where(shard.label >= 0, t_y, table["t_y"]))
    # -inf has e^x = 0 and must not make 0 * inf of it in a
    # sum of x e^x; on the CPU we look whether it did
    clamp = shard.logits.device.type != "cpu" or isinstance(shard.teacher, SparseTeacher)
    _fill(chunks, selection, table, clamp)
    if not clamp and any(
        bool(table[name].isnan().any()) for name in ("e", "d_pi", "k_pi") if name in table
    ):
        _fill(chunks, selection, table, clamp=True)
    return table


def _fill(chunks: "Chunks", selection: Selection, table: Table, clamp: bool) -> None:
    shard, columns = chunks.shard, {name: chunks.of(table[name][:, None]) for name in table.names}
    for i, z in chunks.load(shard.logits, shard.scale):
        to = {name: column[i] for name, column in columns.items()}  # [n, 1] each
        m = torch.amax(z, 1, keepdim=True, out=to["m"]).clamp_(min=FLOOR)
        if selection.top_k:
            k = min(selection.top_k, shard.columns)
            table.top[:k, chunks.rows(i)] = z.topk(k, dim=1).values.clamp_(min=FLOOR).T
        bits = z.sub_(m).mul_(LOG2E)
        if clamp:
            bits.clamp_(min=FLOOR)
        e = torch.exp2(bits, out=chunks.scratch(i, E))
        torch.sum(e, 1, keepdim=True, out=to["s"])
        if selection.collision:
            torch.sum(torch.mul(e, e, out=chunks.scratch(i, T)), 1, keepdim=True, out=to["c"])
        if selection.entropy:
            torch.sum(e.mul_(bits), 1, keepdim=True, out=to["e"])
        log_t = _read_teacher(chunks, selection, to, i) if selection.teacher_rows else None
        if selection.residual:
            _residual(chunks, selection, to, i, bits, log_t, clamp)
    for name in ("e", "d_pi", "k_pi"):
        if name in table:
            table[name].mul_(LN2)


def _read_teacher(chunks: "Chunks", selection: Selection, to: dict[str, Tensor], i: int) -> Tensor:
    """A dense teacher's own statistics; returns log T - m_t in bits, [n, columns] in scratch T."""
    t = chunks.teacher(i)
    m_t = torch.amax(t, 1, keepdim=True)
    bad_teacher = torch.isnan(m_t) | (m_t == torch.inf)
    to["bad"].copy_(bad_teacher)
    to["m_t"].copy_(torch.where(bad_teacher, 0.0, m_t).clamp_(min=FLOOR))
    log_t = t.sub_(to["m_t"]).mul_(LOG2E)
    if selection.teacher_logp:
        torch.sum(torch.exp2(log_t, out=chunks.scratch(i, E)), 1, keepdim=True, out=to["s_t"])
    return log_t


def _residual(
    chunks: "Chunks",
    selection: Selection,
    to: dict[str, Tensor],
    i: int,
    bits: Tensor,
    log_t: Tensor | None,
    clamp: bool,
) -> None:
    """The statistics of pi; d_pi and k_pi in bits."""
    if chunks.uniform:
        to["m_pi"].zero_()
        to["s_pi"].fill_(chunks.shard.columns)
        torch.sum(bits, 1, keepdim=True, out=to["d_pi"])
        return
    w = chunks.scratch(i, E)
    if chunks.highest_is_zero:  # in place: a scaled copy of (z - m) serves its sums as well
        u = bits.mul_(chunks.shard.a)
        torch.exp2(u, out=w)
        to["m_pi"].zero_()
        torch.sum(w, 1, keepdim=True, out=to["s_pi"])
        torch.sum(w.mul_(u), 1, keepdim=True, out=to["d_pi"])
        if selection.kl:
            to["k_pi"].copy_(to["d_pi"])
        to["d_pi"].div_(chunks.shard.a)
        return
    u = chunks.exponent(i, bits, log_t)
    if clamp:
        u.clamp_(min=FLOOR)
    m_pi = torch.amax(u, 1, keepdim=True, out=to["m_pi"]).clamp_(min=FLOOR).mul_(LN2)
    torch.exp2(u.sub_(m_pi * LOG2E), out=w)  # m_pi rounded as in backward
    torch.sum(w, 1, keepdim=True, out=to["s_pi"])
    if selection.kl:
        torch.sum(u.mul_(w), 1, keepdim=True, out=to["k_pi"])
    torch.sum(w.mul_(bits), 1, keepdim=True, out=to["d_pi"])


def write_gradient(shard: Shard, weights: GradientWeights, out: Tensor) -> None:
    """dloss/dlogits of a shard into `out` [N, width], which may be the logits themselves."""
    chunks = Chunks(shard, weights.active)
    out[:, shard.columns :] = 0
    if not shard.columns:
        return
    columns = {
        key: chunks.of(value[:, None]) for key, value in vars(weights).items() if value is not None
    }
    destinations = chunks.of(out[:, : shard.columns])
    for i in chunks.idle:
        destinations[i].zero_()
    for i, z in chunks.load(shard.logits, shard.scale):
        at = {name: column[i] for name, column in columns.items()}  # [n, 1] each
        bits = z.sub_(at["m"]).mul_(LOG2E)
        if weights.pi is None:
            g = torch.exp2(bits, out=bits).mul_(at["p"])
        else:
            g = torch.exp2(bits, out=chunks.scratch(i, G)).mul_(at["p"])
            g.sub_(_pi(chunks, at, i, bits))
        # masked, not multiplied: an idle token's numbers, or a bad teacher row's, may be NaN
        if i in chunks.mixed:
            g.masked_fill_(~at["active"], 0)
        destinations[i].copy_(g)
    # indexed, not scattered: torch's scatter_ copies all of a bf16 tensor on the CPU
    at_label = torch.arange(len(out), device=out.device), shard.label.clamp(min=0)
    here = weights.active & (shard.label >= 0)
    out[at_label] = torch.where(here, weights.label.to(out.dtype), out[at_label])


def _pi(chunks: "Chunks", at: dict[str, Tensor], i: int, bits: Tensor) -> Tensor:
    """pi times its weight, [n, columns] in scratch, or [n, 1] where it is uniform."""
    if chunks.uniform:
        return at["pi"]
    if chunks.highest_is_zero:
        u = bits.mul_(chunks.shard.a)
    else:
        log_t = chunks.teacher(i).sub_(at["m_t"]).mul_(LOG2E) if "m_t" in at else None
        u = chunks.exponent(i, bits, log_t).sub_(at["m_pi"] * LOG2E)
    return torch.exp2(u, out=u).mul_(at["pi"])


def gradient_buffer(logits: Tensor) -> Tensor:
    """A fresh tensor for the gradient, like `logits`.

    On Linux a large one is mapped in huge pages: the first touch of 4 KiB pages takes as long as
    the gradient itself. Its storage cannot be resized.
    """
    size = logits.numel() * logits.element_size()
    if (
        logits.device.type != "cpu"
        or size < HUGE
        or not logits.is_contiguous()
        or not hasattr(mmap, "MADV_HUGEPAGE")
    ):
        return torch.empty_like(logits)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=logits.dtype).view(logits.shape)


# scratch: logits and their exponents, exponentials, the teacher and u, the gradient, top-k ids
Z, E, T, G, TOP_K = range(5)


class Chunks:
    """A shard's rows, a few at a time, without idle chunks, and scratch for one such chunk."""

    def __init__(self, shard: Shard, active: Tensor):
        """`active` [N] bool: which rows matter."""
        self.shard = shard
        self.dtype = torch.float64 if shard.logits.dtype == torch.float64 else torch.float32
        n, limit = len(active), CHUNK_ELEMENTS.get(shard.logits.device.type, CHUNK_ELEMENTS["cuda"])
        # a small share of a small shard, such as a fused head's chunk
        limit = min(limit, max(FEWEST_ELEMENTS, n * shard.columns // 16))
        self.step = max(1, min(n, limit // max(1, shard.columns)))
        self.sizes = [min(self.step, n - i) for i in range(0, n, self.step)]
        self._scratch: dict[int, Tensor] = {}
        counts = [-1] * len(self.sizes)  # the host does not know
        if active.device.type == "cpu":
            padded = torch.nn.functional.pad(active, (0, len(self.sizes) * self.step - n))
            sums: Any = padded.view(len(self.sizes), self.step).sum(1)
            counts = sums.tolist()
        self.idle = [i for i, count in enumerate(counts) if count == 0]
        self.mixed = {i for i, count in enumerate(counts) if count not in (0, self.sizes[i])}
        self.a, self.b = (self._per_chunk(weight) for weight in (shard.a, shard.b))

    def of(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [N, ...] as views, one a chunk."""
        return torch.split(x, self.step)

    def rows(self, i: int) -> slice:
        return slice(i * self.step, i * self.step + self.sizes[i])

    def scratch(self, i: int, which: int) -> Tensor:
        """[n, columns] for chunk i, the same memory each time."""
        if which not in self._scratch:
            # one column more takes the top-k ids of other shards
            width = self.shard.columns + (which == TOP_K)
            self._scratch[which] = torch.empty(
                self.step, width, dtype=self.dtype, device=self.shard.logits.device
            )
        full = self._scratch[which]
        return full if self.sizes[i] == self.step else full[: self.sizes[i]]

    def load(self, logits: Tensor, scale: float) -> Iterator[tuple[int, Tensor]]:
        """The number of each chunk with an active row, and scale * logits [n, columns] in Z."""
        skipped = set(self.idle)
        for i, rows in zip(
            range(len(self.sizes)), self.of(logits[:, : self.shard.columns]), strict=False
        ):
            if i not in skipped:
                z = self.scratch(i, Z).copy_(rows)
                yield i, z if scale == 1.0 else z.mul_(scale)

    def teacher(self, i: int) -> Tensor:
        """The dense teacher's values of chunk i, [n, columns] in scratch T."""
        assert isinstance(self.shard.teacher, DenseTeacher)
        return self.scratch(i, T).copy_(
            self.shard.teacher.values[self.rows(i), : self.shard.columns]
        )

    def at_label(self, values: Tensor) -> Tensor:
        """values [N, width] at the label's column, [N] in the working type; column 0 where the
        label is elsewhere."""
        return values.gather(1, self.shard.label.clamp(min=0)[:, None])[:, 0].to(self.dtype)

    @property
    def uniform(self) -> bool:
        """pi = softmax(0), known on the host."""
        return _is_zero(self.shard.a) and (self.shard.teacher is None or _is_zero(self.shard.b))

    @property
    def highest_is_zero(self) -> bool:
        """u = a (z - m) with a >= 0 has its maximum at z = m."""
        return self.shard.teacher is None and isinstance(self.shard.a, float) and self.shard.a >= 0

    def exponent(self, i: int, bits: Tensor, log_t: Tensor | None) -> Tensor:
        """u = a (z - m) + b (log T - m_t) in bits, [n, columns] in scratch; not for a uniform pi.

        From centred values: at z = 1e4, fp32 rounds a * z by 5e-4. `log_t` is a dense teacher's,
        centred, in bits.
        """
        a, b, teacher = self.a[i], self.b[i], self.shard.teacher
        if teacher is None or _is_zero(b):
            return weighted(a, bits, self.scratch(i, T))
        if isinstance(teacher, SparseTeacher):
            log_t = self._top_k(teacher, i)
        assert log_t is not None
        u = weighted(b, log_t, log_t)
        if not isinstance(a, Tensor):
            return u if a == 0 else u.add_(bits, alpha=a)
        return u.add_(weighted(a, bits, self.scratch(i, E)))

    def _top_k(self, teacher: SparseTeacher, i: int) -> Tensor:
        """log T of a chunk in bits, [n, columns]: the tail, overwritten at the top-k columns."""
        rows, columns = self.rows(i), self.shard.columns
        ids, t = teacher.ids[rows], self.scratch(i, TOP_K)
        t.copy_((teacher.tail[rows, None] * LOG2E).expand_as(t))
        here = (ids >= 0) & (ids < columns)
        t.scatter_(1, torch.where(here, ids, columns), teacher.logprobs[rows] * LOG2E)
        return t[:, :columns]

    def _per_chunk(self, weight: Scalar) -> "tuple[Scalar, ...]":
        """A number or 0-dim tensor for each chunk; of a per-token [N] tensor a column [n, 1]."""
        if isinstance(weight, Tensor) and weight.dim():
            return self.of(weight[:, None])
        return (weight,) * len(self.sizes)


def weighted(weight: Scalar, values: Tensor, out: Tensor) -> Tensor:
    """weight * values into `out`; a zero weight gives 0, of -inf and NaN too."""
    torch.mul(values, weight, out=out)
    return out.masked_fill_(weight == 0, 0) if isinstance(weight, Tensor) else out


def _is_zero(weight: Scalar) -> bool:
    return not isinstance(weight, Tensor) and weight == 0
