"""The two descriptions in published.py agree: the same gradient for all, the same value where the
design says so."""

import pytest
import torch

from tests.loss.cases import random_case
from tests.loss.published import (
    NAMES,
    PUBLISHED,
    SAME_VALUE,
    SURROGATE,
    Batch,
    cross_entropy,
    sequence_log_ratio,
)


def batch_of(name: str) -> tuple[Batch, dict]:
    case = random_case(name, 7, width=11, vocab_size=11, dtype=torch.float64, variant="rich")
    y = case.labels.clamp(min=0)
    t = torch.log_softmax(
        torch.randn(13, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64), -1
    )
    batch = Batch(case.logits.requires_grad_(), y, log_t=t)
    batch = Batch(batch.z, y, t, log_ref=batch.at_y(t))
    ratio = sequence_log_ratio(batch.detached(), torch.arange(13) % 4, case.labels != -100)
    return Batch(batch.z, y, t, batch.log_ref, ratio), case.members[0][1]


@pytest.mark.parametrize("name", NAMES)
def test_surrogate_has_the_published_gradient_and_value(name: str) -> None:
    batch, parameters = batch_of(name)
    published = PUBLISHED[name](batch, **parameters)
    c_y, c_r, pi = SURROGATE[name](batch.detached(), **parameters)
    surrogate = c_y * batch.nll + (0 if pi is None else c_r * cross_entropy(pi, batch.log_p))

    want, got = (torch.autograd.grad(loss.sum(), batch.z)[0] for loss in (published, surrogate))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    same = torch.allclose(surrogate, published, rtol=1e-12, atol=1e-13)
    assert same == (name in SAME_VALUE), (
        "the list of objectives whose value is the published one is wrong"
    )
