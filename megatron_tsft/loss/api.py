"""The two public losses: on logits, and on hidden states with the LM head inside."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo  # pyright: ignore[reportPrivateUsage]

from megatron_tsft.loss.checks import check_head, check_logits
from megatron_tsft.loss.linear_head import linear_q_target
from megatron_tsft.loss.problem import LossOptions, check_result, make_problem, ranks
from megatron_tsft.loss.records import QTargetOutput, TeacherHidden, TeacherTopK
from megatron_tsft.loss.vocab_parallel import vocab_parallel_q_target
from megatron_tsft.objectives import Objective


def outside_graphs[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """torch.compile breaks its graph at this function and runs it as it is, kernels and all."""
    # the lazy form: torch.compiler.disable would import
    # torch._dynamo, seconds, for everyone who imports the package
    disabled = _disable_dynamo(function)

    @functools.wraps(function)
    def called(*args: P.args, **keywords: P.kwargs) -> R:
        return (disabled if torch.compiler.is_compiling() else function)(*args, **keywords)

    return called


def shared_options(arguments: Mapping[str, Any]) -> LossOptions:
    """The shared keywords among a public loss's arguments by name, which `locals()` gives in its
    first line.

    So they are written in `LossOptions` and in the two signatures, and nowhere a third time; a test
    holds the three to each other.
    """
    return LossOptions(**{name: arguments[name] for name in LossOptions.__annotations__})


@outside_graphs
def q_target_cross_entropy(
    logits: Tensor,  # [..., V/tp]
    labels: Tensor,  # [...] int64, global ids
    objective: Objective,
    teacher: Tensor | TeacherTopK | None = None,
    reference_logprobs: Tensor | None = None,  # [...]
    token_weights: Tensor | None = None,  # [...]
    sequence_ids: Tensor | None = None,  # [...] int64
    num_sequences: int | None = None,
    logit_scale: float = 1.0,
    diagnostics: Sequence[str] = (),
    tp_group: "dist.ProcessGroup | None" = None,
    cp_group: "dist.ProcessGroup | None" = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    inplace: bool = False,
) -> QTargetOutput:
    """The loss that drives softmax(logits) towards an objective's target Q, per token (arXiv
    2606.11189).

    One collective over `tp_group` forward (iw-sft one more, over `cp_group`), none backward; fp32
    inside (fp64 for fp64 logits); no host synchronisation if `num_sequences` is given with
    `sequence_ids`. On CUDA Triton kernels read the logits, elsewhere torch does;
    TSFT_BACKEND=torch|triton in the environment overrides.

    Args:
        logits: [..., V/tp] this rank's shard, bf16, fp16, fp32 or fp64; shards are equal and in
            rank order. Any strides; leading dimensions that cannot be viewed as one (transposed
            ones) cost a copy, a teacher's too.
        labels: [...] int64 global ids; `ignore_index` gives exactly zero loss and gradient.
        objective: from `objectives.get` or `objectives.mixture`.
        teacher: [..., V/tp] logits or log-probs of T, sharded alike, or a `TeacherTopK`.
        reference_logprobs, token_weights, sequence_ids, num_sequences, logit_scale, diagnostics,
            tp_group, cp_group, vocab_size, ignore_index: as in `LossOptions`.
        inplace: write the gradient over the logits (they are lost; the caller must not use them
            again).

    Returns:
        QTargetOutput: per-token [...] values; `loss` is differentiable in `logits`.

    Raises:
        ValueError, TypeError: a shape, dtype, device or combination that cannot be right, with what
            to change. With TSFT_DEBUG=1 in the environment also labels outside the vocabulary and
            teacher rows that are not finite.
    """
    options = shared_options(locals())
    if isinstance(teacher, TeacherHidden):
        raise TypeError(
            "teacher is TeacherHidden: only q_target_linear_cross_entropy takes one; pass its"
            " logits"
        )
    check_logits(logits, labels, inplace)
    width = logits.shape[-1]
    problem = make_problem(labels, objective, teacher, options, logits, width)
    out = vocab_parallel_q_target(problem, logits.reshape(-1, width), inplace, labels.shape)
    return check_result(problem, out)


@outside_graphs
def q_target_linear_cross_entropy(
    hidden: Tensor,  # [..., H]; under sequence parallel [s/tp, ..., H]
    weight: Tensor,  # [V/tp, H]
    labels: Tensor,  # [...] int64, global ids
    objective: Objective,
    teacher: Tensor | TeacherTopK | TeacherHidden | None = None,
    reference_logprobs: Tensor | None = None,  # [...]
    token_weights: Tensor | None = None,  # [...]
    sequence_ids: Tensor | None = None,  # [...] int64
    num_sequences: int | None = None,
    logit_scale: float = 1.0,
    diagnostics: Sequence[str] = (),
    tp_group: "dist.ProcessGroup | None" = None,
    cp_group: "dist.ProcessGroup | None" = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    sequence_parallel: bool = False,
) -> QTargetOutput:
    """`q_target_cross_entropy(hidden @ weight.T, ...)` without the logits: the LM head is part of
    the loss.

    The head runs over a forty-eighth of the vocabulary's columns at a time, forward and once more
    backward: four matrix products where a plain head has three. Beyond the gradients it holds one
    such chunk of logits (two with TeacherHidden) and hidden's gradient summed in fp32: 1/48 + 2 H /
    (V/tp) of bf16 logits, so it pays where the shard is much wider than the model. Collectives over
    `tp_group`: one all-gather of statistics forward, backward one all-reduce of hidden's gradient;
    under sequence parallel hidden is gathered in both, and its gradient reduce-scattered.

    Args:
        hidden: [..., H] the labels' shape plus one dimension, the same on all ranks of `tp_group`;
            with `sequence_parallel` this rank's part of dim 0.
        weight: [V/tp, H] this rank's rows, of hidden's type. Where it has Megatron's `main_grad`
            (and `grad_added_to_main_grad`), the gradient is added there and autograd gets a
            placeholder.
        teacher: as in `q_target_cross_entropy`, or a `TeacherHidden`, whose logits are never made
            whole either.
        sequence_parallel: dim 0 of hidden (and of TeacherHidden.hidden) is sharded over `tp_group`;
            labels and every other per-token tensor are whole.
        labels, objective, and all others: as in `q_target_cross_entropy`.

    Returns:
        QTargetOutput: per-token [...] values; `loss` is differentiable in `hidden` and `weight`.
            hidden.grad arrives reduced over `tp_group`, under sequence parallel as this rank's
            part.

    Raises:
        ValueError, TypeError: as `q_target_cross_entropy`; a DTensor.
    """
    options = shared_options(locals())
    parts = ranks(tp_group) if sequence_parallel else 1
    check_head("", hidden, weight, labels, parts)
    if isinstance(teacher, TeacherHidden):
        check_head("TeacherHidden.", teacher.hidden, teacher.weight, labels, parts)
    problem = make_problem(labels, objective, teacher, options, weight, weight.shape[0], "weight")
    out = linear_q_target(problem, hidden, weight, parts > 1, labels.shape)
    return check_result(problem, out)
