"""From per-token values to what Megatron's schedule wants: loss sum, token count, metrics."""

import torch
from torch import Tensor

from megatron_tsft.data.pack_writer import IGNORED
from megatron_tsft.model.output_hook import LossContext

PER_DATASET = ("loss", "nll", "gamma")


def reduce_loss(
    context: LossContext,
    samples_share: float,
    output: Tensor,  # [metrics, b, s]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum over the micro-batch's supervised tokens.

    With --calculate-per-token-loss gradients are divided once by the global token count, so
    micro-batches of unequal counts weigh as they should. The count must be an int tensor
    (training.py adds it to one).

    Args:
        context: the micro-batch's, as given to the hook.
        samples_share: 1 / (micro-batches * data-parallel ranks): turns a reduced [n, share] into
            the global sum of n.
        output: the hook's output.

    Returns:
        loss sum (scalar, differentiable), tokens (int scalar), {name: [sum, n]} reduced by Megatron
        over micro-batches and data-parallel ranks.
    """
    rows = dict(zip(context.metrics, output.unbind(0), strict=True))
    supervised = rows.pop("supervised").detach()
    count = supervised.sum()
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, values in rows.items():
        values = values.detach()
        # the KL is NaN where the target is no distribution: averaged over the tokens that have it
        known = values.isfinite() & (supervised > 0) if name == "kl" else supervised > 0
        n = known.sum().float() if name == "kl" else count
        pairs[name] = values.where(known, values.new_zeros(())).sum(), n
    batch = context.batch
    if context.training and batch.token_weights is not None:
        pairs["weight"] = (batch.token_weights * supervised).sum(), count
    if context.training and batch.dataset_ids is not None:
        for i, dataset in enumerate(context.datasets):
            inside = (supervised > 0) & (batch.dataset_ids == i)
            n = inside.sum().float()
            for name in PER_DATASET:
                pairs[f"{name}/{dataset}"] = rows[name].detach().where(inside, 0.0).sum(), n
            pairs[f"tokens/{dataset}"] = n, n.new_full((), samples_share)
    if context.training:
        for name, value in context.parameters.items():
            pairs[name] = value.to(count), count.new_ones(())
    if (
        context.training
    ):  # the evaluation's count is known, and Megatron would print its exponential
        share = count.new_full((), samples_share)
        pairs["tokens"] = count, share
        labelled = (context.batch.labels != IGNORED).sum()
        pairs["bad_teacher_rows"] = labelled - count, share
    table = torch.stack([value for pair in pairs.values() for value in pair]).view(
        -1, 2
    )  # one kernel for all of them
    return rows["loss"].sum(), count.int(), dict(zip(pairs, table.unbind(0), strict=True))
