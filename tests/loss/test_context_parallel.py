"""iw-sft over a context-parallel group: a sequence's mean is over all of its tokens, wherever they
are."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.loss.cases import Case, check, random_case, run
from tests.ranks import run_ranks

WIDTH, VOCABULARY, TOKENS = 10, 9, 13


def part(case: Case, tokens: Tensor) -> Case:
    """The case of some tokens only."""

    def pick(value: Any) -> Any:
        return (
            value[tokens]
            if isinstance(value, Tensor) and value.dim() and len(value) == TOKENS
            else value
        )

    members = [
        (name, {key: pick(value) for key, value in given.items()}) for name, given in case.members
    ]
    return replace(
        case, **{key: pick(value) for key, value in vars(case).items()} | {"members": members}
    )


def run_grid(rank: int, tp: int, cases: list[tuple[Case, list[Tensor]]]) -> list[dict[str, Any]]:
    """Ranks 0..tp-1 share the first context-parallel part, the next tp ranks the second, as in
    Megatron."""
    tp_groups = [dist.new_group([cp * tp + i for i in range(tp)]) for cp in range(2)]
    cp_groups = [dist.new_group([i, tp + i]) for i in range(tp)]
    mine: dict[str, Any] = dict(
        rank=rank % tp, world=tp, group=tp_groups[rank // tp], cp_group=cp_groups[rank % tp]
    )
    return [run(part(case, parts[rank // tp]), **mine) for case, parts in cases]


SPLITS = {
    "halves": [torch.arange(7), torch.arange(7, TOKENS)],
    "interleaved": [torch.arange(0, TOKENS, 2), torch.arange(1, TOKENS, 2)],
    "all-on-one": [torch.arange(TOKENS), torch.arange(0)],
}


@pytest.mark.parametrize("tp", [1, 2])
def test_sequences_that_span_ranks(tp: int) -> None:
    cases = []
    for seed, (split, dtype) in enumerate(
        (s, d) for s in SPLITS for d in (torch.float64, torch.float32)
    ):
        case = random_case(
            "iw-sft", seed, width=WIDTH, vocab_size=VOCABULARY, dtype=dtype, variant="rich"
        )
        assert case.sequence_ids is not None and case.num_sequences is not None
        cases.append((case, SPLITS[split]))
    per_rank = run_ranks(2 * tp, run_grid, tp, cases)
    for i, (case, parts) in enumerate(cases):
        whole: dict[str, Any] = {}
        for key in ("loss", "nll", "imitation", "residual", "supervised", "entropy", "kl"):
            whole[key] = torch.cat([per_rank[cp * tp][i][key] for cp in range(2)])[
                torch.cat(parts).argsort()
            ]
        grads = [
            torch.cat([per_rank[cp * tp + t][i]["grad"] for t in range(tp)], -1) for cp in range(2)
        ]
        whole["grad"] = torch.cat(grads)[torch.cat(parts).argsort()]
        check(case, whole)
        spans = set(case.sequence_ids[parts[0]].tolist()) & set(
            case.sequence_ids[parts[1]].tolist()
        )
        assert spans or not len(parts[1]), "no sequence spans both ranks: the test shows nothing"
