"""KL(Q || p) of a token's target, from statistics alone."""

import torch
from torch import Tensor


def target_kl(
    imitation: Tensor,  # [N] c_y
    residual: Tensor,  # [N] c_r
    logp_y: Tensor,  # [N]
    pi_cross_entropy: Tensor | None,  # [N] CE(pi, p), None without a residual
    pi_entropy: Tensor | None,  # [N] H(pi)
    pi_logp_y: Tensor | None,  # [N] log pi(y)
) -> Tensor:
    """KL(Q || p) [N] where c_r = 0 and 0 <= c_y <= 1, or c_r > 0, c_y >= 0 and c_y + c_r = 1; NaN
    elsewhere."""
    zero = torch.zeros_like(logp_y)
    p_y = logp_y.exp()

    def x_log_ratio(q: Tensor, logp: Tensor) -> Tensor:  # q (log q - log p), 0 at q = 0
        return torch.where(
            q > 0, q * (torch.log(q.clamp(min=torch.finfo(q.dtype).tiny)) - logp), zero
        )

    # no residual: Q = (1 - c_y) p + c_y onehot; away from y every ratio Q/p is 1 - c_y
    rest = 1 - imitation
    away = torch.xlogy(rest.clamp(min=0), rest.clamp(min=0)) * -torch.expm1(logp_y)
    trusted = away + x_log_ratio(rest * p_y + imitation, logp_y)
    kl = torch.where(
        (residual == 0) & (imitation >= 0) & (imitation <= 1),
        trusted,
        torch.full_like(zero, torch.nan),
    )
    if pi_cross_entropy is None or pi_entropy is None or pi_logp_y is None:
        return kl
    pi_y = pi_logp_y.exp()
    pi_kl = pi_cross_entropy - pi_entropy  # KL(pi || p)
    away = torch.xlogy(residual, residual.clamp(min=0)) * (1 - pi_y)
    away = away + residual * (pi_kl - torch.where(pi_y > 0, pi_y * (pi_logp_y - logp_y), zero))
    spread = away + x_log_ratio(imitation + residual * pi_y, logp_y)
    whole = (residual > 0) & (imitation >= 0) & ((imitation + residual - 1).abs() < 1e-5)
    return torch.where(whole, spread, kl)
