"""What is timed: shapes, objectives, and the random tensors of one section."""

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_tsft import objectives
from megatron_tsft.errors import UserError
from megatron_tsft.loss import TeacherTopK

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOP_K = 64


@dataclass(frozen=True)
class Choice:
    """An objective of the benchmark: its row of the catalogue, its parameters and what plays the
    teacher."""

    name: str
    parameters: dict[str, float]
    teacher: str = "none"  # none, dense or topk
    # over the logits' bytes that no implementation can
    # avoid: two reads and a write, and the teacher's
    passes: int = 3

    def objective(self) -> objectives.Objective:
        return objectives.get(self.name, **self.parameters)


CHOICES = {
    "sft": Choice("sft", {}),
    "dft": Choice("dft", {}),
    "gem": Choice("gem", {"beta": 0.7}),
    "target-sft-eta0": Choice("target-sft", {"eta": 0.0}),
    "target-sft-dense": Choice("target-sft", {"eta": 0.5}, teacher="dense", passes=5),
    "target-sft-topk": Choice("target-sft", {"eta": 0.5}, teacher="topk"),
}


@dataclass(frozen=True)
class Shape:
    """Tokens, the whole vocabulary and how many shards it is cut into; text such as
    8192x151936/8."""

    tokens: int
    vocabulary: int
    tp: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Raises UserError where `text` is no shape."""
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:/([1-9]\d*))?", text)
        if not match:
            raise UserError(
                f"--shapes {text}: write TOKENSxVOCABULARY or TOKENSxVOCABULARY/TP, such as"
                " 8192x151936/8"
            )
        shape = cls(int(match[1]), int(match[2]), int(match[3] or 1))
        if shape.vocabulary % shape.tp:
            raise UserError(
                f"--shapes {text}: {shape.vocabulary} columns cannot be cut into {shape.tp} equal"
                " shards"
            )
        return shape

    @property
    def columns(self) -> int:
        """Of one shard."""
        return self.vocabulary // self.tp

    def __str__(self) -> str:
        return f"{self.tokens}x{self.vocabulary}" + (f"/{self.tp}" if self.tp > 1 else "")


@dataclass(frozen=True)
class Section:
    """One table: a shape in one type, given as logits, or as the hidden states and weight of the
    output head."""

    shape: Shape
    dtype: str
    part: str  # logits or head
    hidden: int
    world: int  # processes that hold a shard each; 1 times a single shard, whatever shape.tp says
    seed: int
    device: str
    keys: tuple[str, ...]  # of CHOICES

    @property
    def logits_bytes(self) -> int:
        return self.shape.tokens * self.shape.columns * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        shard = f" ({self.shape.columns} columns)" if self.shape.tp > 1 else ""
        head = f", output head of {self.hidden}" if self.part == "head" else ""
        return f"{self.shape}{shard} {self.dtype}{head}"


@dataclass(frozen=True)
class Case:
    """The tensors of one section under one objective; N tokens, W columns of this shard, H
    hidden."""

    key: str
    labels: Tensor  # [N] int64, global ids
    upstream: Tensor  # [N] fp32, the gradient that arrives at the per-token loss
    leaves: tuple[
        Tensor, ...
    ]  # (logits [N, W],) or (hidden [N, H], weight [W, H]): what gradients are taken of
    dense: Tensor | None  # [N, W] teacher logits
    topk: TeacherTopK | None
    teacher_head: (
        tuple[Tensor, Tensor] | None
    )  # hidden [N, H] and weight [W, H] of a teacher that has its own head
    group: Any = None  # of the processes that hold the shards

    @property
    def teacher(self) -> Tensor | TeacherTopK | None:
        return {"none": None, "dense": self.dense, "topk": self.topk}[CHOICES[self.key].teacher]

    def first(self, tokens: int) -> "Case":
        """A copy of the first tokens, which may be written over."""

        def cut(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[:tokens].detach().clone()

        full = self.topk
        topk = (
            None
            if full is None
            else TeacherTopK(full.ids[:tokens].clone(), full.logprobs[:tokens].clone())
        )
        leaves = (self.leaves[0][:tokens], *self.leaves[1:])
        head = (
            None
            if self.teacher_head is None
            else (self.teacher_head[0][:tokens].clone(), self.teacher_head[1])
        )
        return replace(
            self,
            labels=self.labels[:tokens].clone(),
            upstream=self.upstream[:tokens].clone(),
            leaves=tuple(leaf.detach().clone().requires_grad_() for leaf in leaves),
            dense=cut(self.dense),
            topk=topk,
            teacher_head=head,
        )


def make_case(section: Section, rank: int = 0) -> Case:
    """Random tensors of one rank; labels, hidden states and top-k teachers are the same on every
    rank."""
    n, width, device = section.shape.tokens, section.shape.columns, section.device
    vocabulary, dtype, h = width * section.world, DTYPES[section.dtype], section.hidden
    same = torch.Generator(device).manual_seed(section.seed)
    own = torch.Generator(device).manual_seed(section.seed + 1 + rank)

    def normal(*size: int, generator: torch.Generator) -> Tensor:
        return torch.randn(*size, dtype=dtype, device=device, generator=generator)

    labels = torch.randint(vocabulary, (n,), device=device, generator=same)
    upstream = torch.rand(n, device=device, generator=same) + 0.5
    lift = 14 * torch.rand(
        n, device=device, generator=same
    )  # of the label's logit: p(y) takes every size
    local = labels - rank * width
    mine = (local >= 0) & (local < width)
    local = local.clamp(0, width - 1)
    teachers = {CHOICES[key].teacher for key in section.keys}
    topk = _topk(n, vocabulary, device, same) if "topk" in teachers else None
    dense = head = None
    if section.part == "logits":
        logits = normal(n, width, generator=own)
        logits.scatter_add_(1, local[:, None], (lift * mine)[:, None].to(dtype))
        leaves = (logits,)
    else:
        hidden, whole = normal(n, h, generator=same), normal(vocabulary, h, generator=same) / h**0.5
        hidden += lift[:, None].to(dtype) * whole[labels]  # a row of the weight has length one
        weight = whole[rank * width : (rank + 1) * width].clone()
        leaves = (hidden, weight)
        if "dense" in teachers:
            head = normal(n, h, generator=same), normal(width, h, generator=own) / h**0.5
    if "dense" in teachers:
        dense = normal(n, width, generator=own)
    return Case(
        "", labels, upstream, tuple(leaf.requires_grad_() for leaf in leaves), dense, topk, head
    )


def _topk(n: int, vocabulary: int, device: str, generator: torch.Generator) -> TeacherTopK:
    """TOP_K distinct ids a token, and log-probabilities that leave something to the tail."""
    k = min(TOP_K, vocabulary)
    start = torch.randint(vocabulary, (n, 1), device=device, generator=generator)
    ids = (start + torch.arange(k, device=device) * (vocabulary // k)) % vocabulary
    logprobs = torch.log_softmax(2 * torch.randn(n, k + 1, device=device, generator=generator), -1)[
        :, :k
    ]
    return TeacherTopK(ids, logprobs.contiguous())
