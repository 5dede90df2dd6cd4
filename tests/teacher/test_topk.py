"""The top-k of a sharded teacher is that of the dense one in fp64: any number of ranks, padding,
masks, tiny tails."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tsft.loss.records import TeacherRecords
from megatron_tsft.teacher import topk
from megatron_tsft.teacher.topk import teacher_topk
from tests.ranks import run_ranks

WIDTH, VOCABULARY, TOKENS = (
    24,
    17,
    11,
)  # at TP 4 shards of 6 columns: two whole, one of 5, and one that is all padding


@dataclass(frozen=True)
class Case:
    """logits [n, WIDTH] with garbage in the padding, labels [n], absent [WIDTH] or None."""

    logits: Tensor
    labels: Tensor
    k: int
    temperature: float = 1.0
    absent: Tensor | None = None


def case(
    k: int,
    *,
    dtype: torch.dtype = torch.float32,
    tokens: int = TOKENS,
    absent: str = "",
    **more: Any,
) -> Case:
    """absent: a digit for each column of the vocabulary, "1" where the student has no such
    token."""
    generator = torch.Generator().manual_seed(k)
    logits = 4 * torch.randn(tokens, WIDTH, generator=generator)
    logits[:, VOCABULARY:] = torch.tensor([torch.nan, torch.inf, 1e4, -torch.inf, 99.0, 0.0, 50.0])
    labels = torch.randint(VOCABULARY, (tokens,), generator=generator)
    columns = torch.tensor([digit == "1" for digit in absent.ljust(WIDTH, "0")]) if absent else None
    return Case(logits.to(dtype), labels, k, absent=columns, **more)


CASES = {
    "one": case(1),
    "eight": case(8),  # more than a shard's columns at TP 4
    "vocabulary": case(VOCABULARY),  # no tail is left
    "beyond": case(100),
    "warm": case(8, temperature=2.5),
    "cold": case(3, temperature=0.25),
    "bf16": case(8, dtype=torch.bfloat16),
    "fp64": case(8, dtype=torch.float64),
    "absent": case(5, absent="01001001000100010"),
    "absent-shard": case(8, absent="111111", temperature=1.5),  # the first rank's at TP 4
    "fewer-than-k": case(8, absent="11111110111011101"),  # 3 tokens are left
    "no-tokens": case(4, tokens=0),
}


def sharded(rank: int, world: int, case: Case) -> TeacherRecords[Tensor]:
    """teacher_topk of this rank's columns."""
    width = WIDTH // world
    mine = slice(rank * width, (rank + 1) * width)
    absent = None if case.absent is None else case.absent[mine]
    group = dist.group.WORLD if world > 1 else None
    options = {
        "vocab_size": VOCABULARY,
        "temperature": case.temperature,
        "absent": absent,
        "tp_group": group,
    }
    return teacher_topk(case.logits[:, mine].clone(), case.labels, case.k, **options)


def on_ranks(world: int, case: Case) -> TeacherRecords[Tensor]:
    """What every one of `world` ranks returns."""
    first, *others = run_ranks(world, sharded, world, case, group=world > 1)
    for other in others:
        for name in ("ids", "logprobs", "label_logp", "tail_logmass"):
            assert torch.equal(getattr(first, name), getattr(other, name)), name
    return first


def dense_logprobs(case: Case) -> Tensor:
    """[n, VOCABULARY] fp64."""
    z = case.logits[:, :VOCABULARY].double() / case.temperature
    if case.absent is not None:
        z = z.masked_fill(case.absent[:VOCABULARY], -torch.inf)
    return torch.log_softmax(z, -1)


def check(found: TeacherRecords[Tensor], case: Case, tolerance: float) -> None:
    """Against the dense definition; ids may be others where log-probs are equal."""
    log_t, k = dense_logprobs(case), min(case.k, VOCABULARY)
    label, tail = found.label_logp, found.tail_logmass
    assert (
        found.ids.shape == found.logprobs.shape == (len(log_t), k)
        and found.ids.dtype == torch.int64
    )
    assert {found.logprobs.dtype, label.dtype, tail.dtype} == {torch.float32}
    close = {"rtol": 0, "atol": tolerance, "check_dtype": False}
    expected = log_t.topk(k).values
    torch.testing.assert_close(found.logprobs, expected, **close)
    known = expected > -torch.inf
    assert (
        torch.equal(found.ids >= 0, known)
        and (found.ids[~known] == -1).all()
        and (found.ids < VOCABULARY).all()
    )
    at_ids = log_t.gather(1, found.ids.clamp(min=0)).masked_fill(~known, -torch.inf)
    torch.testing.assert_close(at_ids, expected, **close)
    taken = torch.zeros_like(log_t).scatter_add_(1, found.ids.clamp(min=0), known.double())
    assert (taken <= 1).all()  # no id twice
    torch.testing.assert_close(label, log_t.gather(1, case.labels[:, None])[:, 0], **close)
    torch.testing.assert_close(
        tail, log_t.masked_fill(taken > 0, -torch.inf).logsumexp(-1), **close
    )


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_dense_top_k(name: str, world: int) -> None:
    # log-probs down to -100 in fp32, of logits that are
    # divided in fp32: 2^-24 * 100 for each of the two
    check(on_ranks(world, CASES[name]), CASES[name], 1.2e-5)


@pytest.mark.parametrize("world", [1, 4])
def test_chunks_of_tokens_do_not_show(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = on_ranks(world, CASES["eight"])
    monkeypatch.setattr(
        topk, "CHUNK_BYTES", 4 * WIDTH // world * 3
    )  # 3 tokens at once, 2 in the last chunk
    parts = on_ranks(world, CASES["eight"])
    assert torch.equal(whole.ids, parts.ids) and torch.equal(whole.logprobs, parts.logprobs)
    check(parts, CASES["eight"], 1.2e-5)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_tiny_tail_is_exact_in_relative_terms(world: int) -> None:
    """1 - sum of the top-k has no digit of a mass of 1e-12 left; the sum over the tail has them
    all."""
    logits = torch.full((4, WIDTH), 1e4)
    logits[:, :VOCABULARY] = torch.linspace(-3, 3, VOCABULARY)
    for token, mass in enumerate((1e-8, 1e-12, 1e-20, 1e-30)):
        logits[token, :VOCABULARY] += torch.log(
            torch.tensor(mass / 50, dtype=torch.float64)
        ).float()
        logits[token, 3], logits[token, 16] = (
            1.0,
            0.5,
        )  # on the first rank, and on the last that has a column
    tiny = Case(logits, torch.full((4,), 8), 2)
    found = on_ranks(world, tiny)
    assert found.tail_logmass is not None and found.ids.tolist() == [[3, 16]] * 4
    rest = dense_logprobs(tiny).scatter(1, found.ids, -torch.inf)
    # relative error of the mass: logits of -75 are rounded
    # to 2^-18 when the largest is subtracted, and once again
    assert torch.allclose(
        found.tail_logmass.double().exp(), rest.exp().sum(-1), rtol=1.5e-5, atol=0
    )
    check(found, tiny, 1.5e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_ties_are_broken_the_same_way_everywhere(world: int) -> None:
    level = Case(torch.zeros(3, WIDTH), torch.tensor([0, 5, 16]), 8)
    check(on_ranks(world, level), level, 1e-6)
