"""Per-token statistics of vocabulary shards: which there are, and their exact merge.

Sums are kept relative to a maximum m (never one log-sum-exp: at z = 1e4 an fp32 exp(z - lse) is off
by 4.5e-4 relative, exp(z - m) / s by 1.6e-7), so shards merge as: the largest maximum, rescale,
add. The same merge serves the ranks of a tensor-parallel group and the chunks of a fused head.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tsft.loss.collectives import all_gather
from megatron_tsft.loss.teacher import FLOOR
from megatron_tsft.objectives import Scalar, Statistics


@dataclass(frozen=True)
class Selection:
    """Which statistics this call needs: what is not asked for is not computed."""

    entropy: bool = False
    collision: bool = False
    residual: bool = False  # there is a pi, and it is not p itself
    kl: bool = False  # the part of KL(Q || p) that concerns pi
    teacher_rows: bool = False  # a dense teacher: its maximum, and whether its rows are finite
    teacher_label: bool = False  # its value at the label
    teacher_logp: bool = False  # its normaliser
    top_k: int = 0  # that many of the largest logits

    @staticmethod
    def of(
        needs: Collection[str], *, has_pi: bool, kl: bool, dense_teacher: bool, top_k: int
    ) -> "Selection":
        """What the table must hold.

        Args:
            needs: names of per-token statistics, as objectives declare them.
            has_pi: there is a residual with statistics of its own.
            kl: KL(Q || p) is reported.
            dense_teacher: the teacher has a value for every column.
            top_k: the largest k of a top-k entropy.
        """
        teacher_logp = dense_teacher and "teacher_logp_y" in needs
        return Selection(
            entropy="entropy" in needs,
            collision="collision" in needs,
            residual=has_pi,
            kl=has_pi and kl,
            teacher_rows=dense_teacher,
            teacher_label=teacher_logp or (dense_teacher and has_pi),
            teacher_logp=teacher_logp,
            top_k=top_k,
        )


MAXIMA = {"m": "always", "m_pi": "residual", "m_t": "teacher_rows"}
SUMS = {
    "s": "always",  # sum e^(z-m)
    "z_y": "always",  # z at the label, from the shard that owns it
    "e": "entropy",  # sum e^(z-m) (z-m)
    "c": "collision",  # sum e^2(z-m)
    "s_pi": "residual",  # sum w, w = e^(u-m_pi), u = a (z-m) + b (log T - m_t)
    "d_pi": "residual",  # sum w (z-m)
    "k_pi": "kl",  # sum w (u-m_pi)
    "s_t": "teacher_logp",  # sum e^(t-m_t)
    "t_y": "teacher_label",  # t at the label
    "bad": "teacher_rows",  # NaN or +inf in the teacher's row
}


class Table:
    """Named rows [N] of one tensor [K + top_k, N]: what one collective moves. The last rows are the
    largest logits."""

    def __init__(self, names: tuple[str, ...], data: Tensor):
        self.names, self.data = names, data

    @staticmethod
    def empty(selection: Selection, n: int, dtype: torch.dtype, device: torch.device) -> "Table":
        """The statistics of no column: of a shard of padding, and of an inactive token."""

        def needed(table: dict[str, str]) -> tuple[str, ...]:
            return tuple(
                name for name, need in table.items() if need == "always" or getattr(selection, need)
            )

        maxima, sums = needed(MAXIMA), needed(SUMS)
        data = torch.zeros(len(maxima) + len(sums) + selection.top_k, n, dtype=dtype, device=device)
        data[: len(maxima)] = FLOOR
        data[len(maxima) + len(sums) :] = FLOOR
        return Table(maxima + sums, data)

    def __getitem__(self, name: str) -> Tensor:
        return self.data[self.names.index(name)]

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def get(self, name: str) -> Tensor | None:
        return self[name] if name in self else None

    @property
    def top(self) -> Tensor:
        """The largest logits, [top_k, N], largest first; FLOOR where there are fewer."""
        return self.data[len(self.names) :]


def combine(names: tuple[str, ...], shards: Tensor, a: Scalar, b: Scalar) -> Table:
    """The statistics of several shards together.

    Args:
        names: the rows.
        shards: [shards, rows, N], as `Table.data` of each.
        a, b: pi's exponents, as in Shard.
    """
    old = {name: shards[:, i] for i, name in enumerate(names)}  # [shards, N] each
    new = Table(names, torch.empty_like(shards[0]))
    torch.amax(old["m"], 0, out=new["m"])
    # how much each shard's exponents move when they count from the common maximum
    by = old["m"] - new["m"]
    factor = by.exp()
    weighted = {"s": old["s"] * factor, "z_y": old["z_y"]}
    if "e" in old:  # a sum of e^(z-m) times (z-m) moves in its exponent and in its factor
        weighted["e"] = (old["e"] + old["s"] * by) * factor
    if "c" in old:
        weighted["c"] = old["c"] * factor.square()
    moved = a * by
    if "m_t" in old:
        torch.amax(old["m_t"], 0, out=new["m_t"])
        by_t = old["m_t"] - new["m_t"]
        moved = moved + b * by_t
        weighted["bad"] = old["bad"]
        if "t_y" in old:
            weighted["t_y"] = old["t_y"]
        if "s_t" in old:
            weighted["s_t"] = old["s_t"] * by_t.exp()
    if "s_pi" in old:
        # only shards that hold something: for a negative a an empty one would move up
        m_pi = torch.where(old["s_pi"] > 0, old["m_pi"] + moved, FLOOR)
        torch.amax(m_pi, 0, out=new["m_pi"])
        by_pi = m_pi - new["m_pi"]
        factor_pi = by_pi.exp()
        weighted["s_pi"] = old["s_pi"] * factor_pi
        weighted["d_pi"] = (old["d_pi"] + old["s_pi"] * by) * factor_pi
        if "k_pi" in old:
            weighted["k_pi"] = (old["k_pi"] + old["s_pi"] * by_pi) * factor_pi
    for name, value in weighted.items():
        torch.sum(value, 0, out=new[name])
    if new.top.shape[0]:
        k = new.top.shape[0]
        new.top.copy_(shards[:, len(names) :].flatten(0, 1).topk(k, dim=0).values)
    return new


def merge(local: Table, a: Scalar, b: Scalar, group: "dist.ProcessGroup | None") -> Table:
    """The same over the whole vocabulary: one all-gather, merged in rank order, equal on all."""
    if group is None or group.size() == 1 or local.data.shape[1] == 0:
        return local
    return combine(local.names, all_gather(local.data, group), a, b)


def student_statistics(
    merged: Table, log_s: Tensor, top_ks: Sequence[int], vocab_size: int
) -> Statistics:
    """What objectives read of the student, [N] each: merged sums, and `log_sum` of them -> logp_y,
    p_y, nll and those that the table has."""
    logp_y = (merged["z_y"] - merged["m"]) - log_s
    stats = Statistics(logp_y=logp_y, p_y=logp_y.exp(), nll=-logp_y)
    if "e" in merged:
        stats["entropy"] = log_s - merged["e"] / merged["s"]
    if "c" in merged:
        stats["collision"] = merged["c"] / merged["s"].square()
    for k in top_ks:
        stats[f"topk_entropy_{k}"], count = topk_entropy(merged.top, k, vocab_size)
        # at a vocabulary of one token the entropy is 0 and any positive log k gives the right 0
        stats[f"topk_log_k_{k}"] = torch.full_like(logp_y, max(count, 2.0)).log()
    return stats


def log_sum(merged: Table) -> Tensor:
    """log sum e^(z-m), [N]; NaN for a row of -inf alone: it is no distribution, and its loss must
    not look like one."""
    return torch.log(merged["s"]).masked_fill(merged["m"] <= FLOOR, torch.nan)


def topk_entropy(top: Tensor, k: int, vocab_size: int) -> tuple[Tensor, float]:
    """Entropy [N] of the softmax over the k largest logits (top [>= k, N], sorted), and that k as
    it counts."""
    k = min(k, vocab_size)
    logp = torch.log_softmax(top[:k], 0)
    return -(logp.exp() * logp).sum(0), float(k)
