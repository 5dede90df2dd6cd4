"""What the auxiliary losses of experts weigh beside a loss per supervised token.

Megatron multiplies them by ALL positions of a micro-batch
(core/transformer/moe/router.py:604-637, 0.19.2), and with --calculate-per-token-loss every gradient
is divided by the SUPERVISED tokens of the step: where prompts are masked they would weigh several
times what their coefficient says. This gives Megatron the factor that makes their weight one over
the number of micro-batches again, as without per-token loss.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_tsft.plan.packs import Packs


def has_auxiliary_losses(transformer: Any) -> bool:
    """Whether a TransformerConfig asks for a loss on the router: a balance, or a z-loss."""
    kinds = transformer.moe_router_load_balancing_type
    balanced = any("aux_loss" in kind for kind in ([kinds] if isinstance(kinds, str) else kinds))
    z_loss = transformer.moe_z_loss_coeff is not None
    return bool(transformer.num_moe_experts) and (balanced or z_loss)


class AuxiliaryScale:
    """Megatron's `moe_grad_scale_func`: the supervised share of the running step's positions, times
    fp16's scale."""

    def __init__(self, config: Any, packs: Packs, batch: int, consumed: Callable[[], int]):
        """
        Args:
            config: the TransformerConfig that this is set on; its own grad_scale_func comes before
                (fp16).
            packs: of the run.
            batch: packs of a step.
            consumed: how many packs have been trained on.
        """
        self.config, self.packs, self.batch, self.consumed = config, packs, batch, consumed
        self._start, self._share = -1, 1.0

    def __call__(self) -> Tensor:
        """One element; called for every micro-batch, on every pipeline stage."""
        start = self.consumed()
        if start != self._start:
            supervised = self.packs.supervised_tokens(start, start + self.batch)
            positions = self.batch * self.packs.rules.seq_length
            self._start, self._share = start, supervised / positions
        # on the host: without dimensions it may meet fp16's scale, which is on the GPU
        one = torch.ones(())
        scale = one if self.config.grad_scale_func is None else self.config.grad_scale_func(one)
        return self._share * scale
