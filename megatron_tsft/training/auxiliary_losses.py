"""What the auxiliary losses of experts weigh beside a loss per supervised token.

Megatron multiplies them by ALL positions of a micro-batch (core/transformer/moe/router.py:604-637,
0.19.2), and with --calculate-per-token-loss every gradient is divided by the SUPERVISED tokens of
the step: where prompts are masked they would weigh several times what their coefficient says. This
gives Megatron the factor that makes their weight one over the number of micro-batches again, as
without per-token loss.
"""

from typing import Any

import torch
from megatron.training import get_args
from torch import Tensor

from megatron_tsft.training.datasets import Datasets


def has_auxiliary_losses(args: Any) -> bool:
    """Whether Megatron's arguments ask for a loss on the router: a balance, or a z-loss."""
    kinds = args.moe_router_load_balancing_type
    balanced = any("aux_loss" in kind for kind in ([kinds] if isinstance(kinds, str) else kinds))
    return bool(args.num_experts) and (balanced or args.moe_z_loss_coeff is not None)


class AuxiliaryScale:
    """Megatron's `moe_grad_scale_func`: the supervised share of the running step's positions, times
    fp16's scale."""

    def __init__(self, config: Any, datasets: Datasets):
        """
        Args:
            config: the TransformerConfig that this is set on; its own grad_scale_func comes before
                (fp16).
            datasets: which packs a step reads.
        """
        self.config, self.datasets = config, datasets
        self._start, self._share = -1, 1.0

    def __call__(self) -> Tensor:
        """One element; called for every micro-batch, on every pipeline stage."""
        args: Any = get_args()
        start, packs = args.consumed_train_samples, args.global_batch_size
        if start != self._start:
            supervised = self.datasets.supervised_tokens(start, start + packs)
            self._start, self._share = start, supervised / (packs * args.seq_length)
        one = torch.ones(
            ()
        )  # on the host: without dimensions it may meet fp16's scale, which is on the GPU
        return self._share * (
            one if self.config.grad_scale_func is None else self.config.grad_scale_func(one)
        )
