"""Per-token statistics of one vocabulary shard, chunk by chunk, and their exact merge over shards.

Sums are kept relative to a maximum m (never one log-sum-exp: at z = 1e4 an fp32 exp(z - lse) is off by 4.5e-4
relative, exp(z - m) / s by 1.6e-7), so a merge is: MAX of the maxima, rescale, SUM. Two collectives, whatever the
objective; eaft adds one all-gather of its k largest logits.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tsft.loss.teacher import FLOOR, DenseTeacher, SparseTeacher, rows_of, term
from megatron_tsft.objectives import Scalar

CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # fp32 scratch: a few tensors of this size, never [N, V]


@dataclass(frozen=True)
class Wanted:
    """Which statistics this call needs: what is not asked for is not computed."""

    entropy: bool = False
    collision: bool = False
    residual: bool = False  # there is a pi
    kl: bool = False  # the parts of KL(Q || p) that concern pi
    teacher_logp: bool = False  # log T(y) of a dense teacher
    teacher_rows: bool = False  # whether a dense teacher's rows are finite
    top_ks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Shard:
    """This rank's slice: `logits` [N, V/tp]; the first `columns` are real, the others padding; z = scale * logits."""

    logits: Tensor
    columns: int
    scale: float
    label: Tensor  # [N] int64, column of y here, clamped into range
    owns_label: Tensor  # [N] bool, y lies in this shard
    a: Scalar
    b: Scalar
    teacher: DenseTeacher | SparseTeacher | None

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.logits.dtype == torch.float64 else torch.float32

    def chunks(self) -> list[slice]:
        """Row slices whose fp32 scratch stays small."""
        n, width = self.logits.shape
        step = max(1, CHUNK_ELEMENTS.get(self.logits.device.type, 1 << 26) // max(1, width))
        return [slice(i, min(i + step, n)) for i in range(0, n, step)]

    def z(self, rows: slice) -> Tensor:
        """The scaled logits of a chunk, [n, columns]; -inf becomes FLOOR so that 0 * z stays 0."""
        z = self.logits[rows, : self.columns].to(self.dtype)
        return (z * self.scale if self.scale != 1.0 else z).clamp(min=FLOOR)

    def exponent(self, centred: Tensor, log_t: Tensor | None, rows: slice) -> Tensor:
        """pi's exponent u = a * (z - m) + b * (log T - m_t) of a chunk, [n, columns], at least FLOOR.

        From centred values: at z = 1e4, fp32 rounds a * z by 5e-4. `log_t` is a dense teacher's, a top-k one is used
        as it is (m_t = 0).
        """
        az, b = term(rows_of(self.a, rows), centred), rows_of(self.b, rows)
        if isinstance(self.teacher, SparseTeacher):
            return self.teacher.exponent(az, b, rows).clamp(min=FLOOR)
        u = az if log_t is None else az + term(b, log_t)
        return u.clamp(min=FLOOR) if isinstance(u, Tensor) else torch.zeros_like(centred)

    def origin(self, m: Tensor, m_t: Tensor | None) -> Tensor:
        """What u leaves out, [N]: a * m + b * m_t."""
        return self.a * m if m_t is None else self.a * m + self.b * m_t


MAXIMA = {"m": "always", "m_pi": "residual", "m_t": "teacher_rows"}
SUMS = {
    "s": "always",  # sum e^(z-m)
    "z_y": "always",  # z at the label, from the shard that owns it
    "e": "entropy",  # sum e^(z-m) (z-m)
    "c": "collision",  # sum e^2(z-m)
    "s_pi": "residual",  # sum w, w = e^(u-m_pi), u as in Shard.exponent
    "d_pi": "residual",  # sum w (z-m)
    "k_pi": "kl",  # sum w (u-m_pi)
    "u_y": "kl",  # u at the label
    "s_t": "teacher_logp",  # sum e^(t-m_t)
    "t_y": "teacher_logp",  # t at the label
    "bad": "teacher_rows",  # NaN or +inf in the teacher's row
}


class Packed:
    """Named rows [N] of one [K, N] tensor: what one collective moves."""

    def __init__(self, table: dict[str, str], wanted: Wanted, like: Tensor, n: int, dtype: torch.dtype, fill: float):
        self.names = [name for name, need in table.items() if need == "always" or getattr(wanted, need)]
        self.data = torch.full((len(self.names), n), fill, dtype=dtype, device=like.device)

    def __getitem__(self, name: str) -> Tensor:
        return self.data[self.names.index(name)]

    def __contains__(self, name: str) -> bool:
        return name in self.names


@dataclass
class Merged:
    """Statistics over the whole vocabulary: `maxima` and `sums` by name, `top` {k: [N, k]} largest logits."""

    maxima: Packed
    sums: Packed
    top: Tensor | None


def local_statistics(shard: Shard, wanted: Wanted) -> Merged:
    """One read of logits and teacher: this shard's maxima and sums, in fp32 (fp64 for fp64 logits)."""
    n = shard.logits.shape[0]
    maxima = Packed(MAXIMA, wanted, shard.logits, n, shard.dtype, FLOOR)
    sums = Packed(SUMS, wanted, shard.logits, n, shard.dtype, 0.0)
    k = max(wanted.top_ks, default=0)
    top = torch.full((n, k), FLOOR, dtype=shard.dtype, device=shard.logits.device) if k else None
    if shard.columns == 0:  # all padding: nothing to add
        return Merged(maxima, sums, top)
    for rows in shard.chunks():
        z = shard.z(rows)
        label, own = shard.label[rows, None], shard.owns_label[rows]

        def at_label(values: Tensor, label: Tensor = label, own: Tensor = own) -> Tensor:
            return torch.where(own, values.gather(1, label)[:, 0], torch.zeros_like(values[:, 0]))

        m = z.amax(1).clamp(min=FLOOR)
        maxima["m"][rows] = m
        sums["z_y"][rows] = at_label(z)
        if top is not None:
            width = min(k, shard.columns)
            top[rows, :width] = z.topk(width, dim=1).values
        centred = z - m[:, None]
        e = centred.exp()
        sums["s"][rows] = e.sum(1)
        if wanted.entropy:
            sums["e"][rows] = (e * centred).sum(1)
        if wanted.collision:
            sums["c"][rows] = e.square().sum(1)
        log_t = None
        if isinstance(shard.teacher, DenseTeacher):
            t = shard.teacher.chunk(rows, shard.dtype)
            m_t = t.amax(1)
            bad = torch.isnan(m_t) | (m_t == torch.inf)
            sums["bad"][rows] = bad.to(shard.dtype)
            m_t = torch.where(bad, torch.zeros_like(m_t), m_t).clamp(min=FLOOR)
            maxima["m_t"][rows] = m_t
            log_t = t - m_t[:, None]
            if wanted.teacher_logp:
                sums["s_t"][rows] = log_t.exp().sum(1)
                sums["t_y"][rows] = at_label(t).clamp(min=FLOOR)
        if wanted.residual:
            u = shard.exponent(centred, log_t, rows)
            m_pi = u.amax(1)
            maxima["m_pi"][rows] = m_pi
            if wanted.kl:
                sums["u_y"][rows] = at_label(u)
            u = u - m_pi[:, None]
            w = u.exp()
            sums["s_pi"][rows] = w.sum(1)
            sums["d_pi"][rows] = (w * centred).sum(1)
            if wanted.kl:
                sums["k_pi"][rows] = (w * u).sum(1)
    return Merged(maxima, sums, top)


def merge(local: Merged, shard: Shard, group: "dist.ProcessGroup | None") -> Merged:
    """The same statistics over the whole vocabulary, equal on every rank: one MAX and one SUM all-reduce."""
    if group is None or group.size() == 1 or local.maxima.data.shape[1] == 0:
        return local
    maxima, sums, top = local.maxima, local.sums, local.top
    mine = dict(zip(maxima.names, maxima.data.clone(), strict=True))
    if "m_pi" in mine:  # u counts from this shard's m and m_t; shards compare what they stand for
        maxima["m_pi"].add_(shard.origin(mine["m"], mine.get("m_t")))
    dist.all_reduce(maxima.data, dist.ReduceOp.MAX, group=group)
    # by how much each exponent moves when it counts from the maxima of all shards; finite, at most 0
    by = {name: value - maxima[name] for name, value in mine.items() if name != "m_pi"}
    factor = by["m"].exp()
    # a sum of e^(z-m) times (z-m) moves in its exponent and in its factor
    if "e" in sums:
        sums["e"].add_(sums["s"] * by["m"]).mul_(factor)
    if "c" in sums:
        sums["c"].mul_(factor.square())
    sums["s"].mul_(factor)
    if "s_pi" in sums:
        maxima["m_pi"].sub_(shard.origin(maxima["m"], maxima["m_t"] if "m_t" in maxima else None))  # alike on all ranks
        moved = shard.origin(by["m"], by.get("m_t"))
        by_pi = (mine["m_pi"] + moved - maxima["m_pi"]).clamp(min=FLOOR)
        factor_pi = by_pi.exp()
        sums["d_pi"].add_(sums["s_pi"] * by["m"]).mul_(factor_pi)
        if "k_pi" in sums:
            sums["k_pi"].add_(sums["s_pi"] * by_pi).mul_(factor_pi)
            sums["u_y"].add_(torch.where(shard.owns_label, moved, torch.zeros_like(moved)))
        sums["s_pi"].mul_(factor_pi)
    if "s_t" in sums:
        sums["s_t"].mul_(by["m_t"].exp())
    dist.all_reduce(sums.data, dist.ReduceOp.SUM, group=group)
    if top is not None:
        n, k = top.shape
        gathered = torch.empty(group.size(), n, k, dtype=top.dtype, device=top.device)
        # the list form: torch deprecates all_gather_into_tensor, and 2.11 does not have its successor
        dist.all_gather(list(gathered), top, group=group)
        top = gathered.transpose(0, 1).reshape(n, -1).topk(k, dim=1).values
    return Merged(maxima, sums, top)


def topk_entropy(top: Tensor, k: int, vocab_size: int) -> tuple[Tensor, float]:
    """Entropy [N] of the softmax over the k largest logits (top [N, >= k], sorted), and that k as it counts."""
    k = min(k, vocab_size)
    logp = torch.log_softmax(top[:, :k], -1)
    return -(logp.exp() * logp).sum(-1), float(k)
