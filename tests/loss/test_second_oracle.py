"""A second oracle for every objective, independent of ours: what its authors' code computes, or
torch.

The functions below restate what the named files do (reductions, shifts, clamps, detaches,
epsilons), in our own words and in fp64: casts to bf16 and fp32 are left out. "real" means that the
installed function itself is called. Gradients with respect to the logits are compared everywhere;
values where the published value is our surrogate plus a constant, which is then computed. The
hashes are the commits that were read.

sft              real: torch F.cross_entropy, transformers ForCausalLMLoss, megatron.core
vocab_parallel_cross_entropy dft              yongliang-wu/DFT e153181
verl/verl/trainer/fsdp_dft_trainer.py
                 huggingface/trl f2cd577 trl/trainer/sft_trainer.py
                 hiyouga/LLaMA-Factory ff6d4d1 src/llamafactory/train/trainer_utils.py
                 modelscope/ms-swift 3602360 swift/trainers/utils.py
beyond-log       GaotangLi/Beyond-Log-Likelihood 220589d main_verl/trainer/fsdp_sft_trainer.py
                 differs: its value is (1 - p^a) / a
profit           Utaotao/ProFit 92529ff src/llamafactory/train/trainer_utils.py
                 differs: keeps p >= tau, ours p > tau; its mean is over the tokens it keeps
eaft             hiyouga/LLaMA-Factory (its author's), as above; ymxyll/ms-swift-EAFT 7683b1e
swift/trainers/utils.py
                 (PRIS-CV/EAFT 8f9018b, the paper's repository, only links its forks of the two; the
                 fork of LLaMA-Factory, ymxyll/LlamaFactory-EAFT, was not to be had)
                 differs: divides the entropy by 3.0, ours by log k; k is always 20
iw-sft           emmyqin/iw_sft 9a3e4e4 bounding_trainers.py, iw_sft.sh
                 differs: its weights broadcast rightly only where a batch is one sequence, as in
                     its script
critical         NONE FOUND (arXiv 2510.10974). Instead: real F.cross_entropy, weighted
deft             luludus/DEFT bbe7896 main_verl/trainer/fsdp_sft_trainer.py
                 differs: divides by a + 1e-6; its value is (1 - p^a) / (a + 1e-6)
idft             zhangmiaosen2000/Towards-On-Policy-SFT: three losses, see below; ours is the first
proximal         zwhong714/PSFT 569b1ba verl/verl/trainer/ppo/core_algos.py and ray_trainer.py,
                 verl/recipe/psft/run_psft.sh
                 differs: its value is -min(r, clip(r)); clamps log r to +-20
label-smoothing  real: torch F.cross_entropy, transformers LabelSmoother, megatron.core
vocab_parallel_cross_entropy
                 differs (Megatron): spreads the mass over the V - 1 tokens that are not the label
sft-kl           NONE FOUND (arXiv 2509.04259). Instead: the baseline "sft+kl" in zhuchichi56/ASFT,
as below
                 differs: its value is a KL, ours a cross-entropy
asft             zhuchichi56/ASFT 6f6f51c train_v2.py; hiyouga/LLaMA-Factory, as above
                 differs: its value has a KL, ours a cross-entropy
gem              liziniu/GEM e5b1430 sft_trainer.py, sft_trainer_v2.py, utils/gem_triton_ops.py
                 differs: h = "linear" is ours; its scripts run h = "logsigmoid", which no row of
                     ours can express
kd               real: megatron.training.distillation.cached_logits_loss topk_kl_div
                 NVIDIA-NeMo/RL 7ea279a nemo_rl/algorithms/loss/loss_functions.py,
                 nemo_rl/distributed/model_utils.py huggingface/trl, as above,
                 trl/experimental/gkd/gkd_trainer.py (beta = 0) differs: a KL for a cross-entropy.
                 Megatron's top-k is not renormalised, its "ghost token" is no tail rule of ours.
                 NeMo-RL renormalises the student too, unless zero_outside_topk
kd-hybrid        real: Megatron's two functions, mixed as LossFuncCallable of cached_logits_loss
mixes them; torch gift             zzy1127/GIFT ba91084 verl/verl/trainer/fsdp_gift_trainer.py
                 differs: adds 1e-10 to T, and may smooth it
target-sft       NONE: the authors' page (txie1/txie1.github.io 302167e Target-SFT/index.html) says
"coming soon".
                 Instead: real F.cross_entropy with that page's Q, and DFT's gradient at eta = 0

idft: (1) IDFT/verl/trainer/fsdp_idft_trainer.py, in the repository's first commits only (read at
474bc8c; deleted in 766ee18), is our row. (2) IDFT/verl/trainer/fsdp_indomain_trainer.py of the same
commits and, still at dc9b5df, indomain_cot_loss in IDFT/verl/workers/utils/losses.py, which nothing
calls: the same sigmoid with the opposite sign. (3) IDFT/verl/trainer/fsdp_polylog_trainer.py at
dc9b5df, which the README launches: weight p^clamp(exp(-(log p + H) / beta), 0.1, 2). (2) and (3)
are compared after accounting for that.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_pt_utils import LabelSmoother

from megatron_tsft import TeacherTopK, objectives, q_target_cross_entropy
from tests.ranks import run_ranks

VOCABULARY = 41  # at least 20, which eaft's official code needs
ITEMS = 23  # a global token count, as Hugging Face's trainer passes it
EXACT = 1e-12  # both sides in fp64
SINGLE = 3e-6  # the real function works in fp32
FLOORED = 1e-8  # log(p + 1e-10) in an entropy: off by at most 1e-10 a column

# ---- the data ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """b sequences of s tokens as a trainer holds them: the logits at t predict labels[:, t + 1]."""

    logits: Tensor  # [b, s, V] fp64
    labels: Tensor  # [b, s], -100 where unsupervised, which a sequence's first token always is
    frozen: Tensor  # [b, s, V] logits of the reference, base, old or teacher model
    critical: Tensor  # [b, s] 0 or 1, aligned with `targets`

    @cached_property
    def targets(self) -> Tensor:
        """[b, s] what each position predicts; -100 at the last."""
        return F.pad(self.labels[:, 1:], (0, 1), value=-100)

    @cached_property
    def kept(self) -> Tensor:
        return (self.targets != -100).to(self.logits.dtype)

    @cached_property
    def count(self) -> float:
        return float(self.kept.sum())

    @cached_property
    def frozen_logp(self) -> Tensor:
        return self.frozen.log_softmax(-1)

    def at_target(self, x: Tensor) -> Tensor:
        return x.gather(-1, self.targets.clamp(min=0)[..., None])[..., 0]

    def sum(self, per_token: Tensor) -> float:
        return float((per_token * self.kept).sum())


def make_batch(seed: int, b: int = 2, s: int = 12) -> Batch:
    """Random logits whose labels are likely here and unlikely there, so that every branch of a
    weight is taken."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(VOCABULARY, (b, s), generator=g)
    labels[torch.rand(b, s, generator=g) < 0.25] = -100
    labels[:, 0], labels[:, 1] = -100, 7
    logits = torch.randn(b, s, VOCABULARY, generator=g, dtype=torch.float64)
    likely = 6 * torch.rand(b, s, 1, generator=g, dtype=torch.float64)
    logits.scatter_add_(-1, F.pad(labels[:, 1:], (0, 1), value=0).clamp(min=0)[..., None], likely)
    frozen = logits + torch.randn(b, s, VOCABULARY, generator=g, dtype=torch.float64)
    return Batch(logits, labels, frozen, torch.randint(2, (b, s), generator=g).to(torch.float64))


def rows_of(z: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The shift by slicing: logits [n, V] but the last position's, token ids [n] but the first, and
    a 0-1 mask [n]."""
    following = batch.labels[:, 1:].flatten()
    return z[:, :-1].flatten(0, 1), following.clamp(min=0), (following != -100).to(z.dtype)


def pick(x: Tensor, ids: Tensor) -> Tensor:
    return x.gather(-1, ids[..., None])[..., 0]


def verl_mean(per_token: Tensor, mask: Tensor) -> Tensor:
    """verl's reduction: a sum over a count that cannot be zero."""
    return (per_token * mask).sum() / (mask.sum() + 1e-8)


def reduce_kept(per_token: Tensor, num_items: int | None) -> Tensor:
    """Hugging Face's reduction of supervised tokens: their mean, or their sum over a global
    count."""
    return per_token.mean() if num_items is None else per_token.sum() / num_items


# ---- what the official codes compute -------------------------------------------------------------


def sft_transformers(z: Tensor, batch: Batch, num_items: int | None = None) -> Tensor:
    """transformers/loss/loss_utils.py, real: works in fp32."""
    count: Any = num_items  # it says a tensor and takes a number as well
    return ForCausalLMLoss(z, batch.labels, VOCABULARY, num_items_in_batch=count)


def sft_torch(z: Tensor, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """torch.nn.functional.cross_entropy, real."""
    return F.cross_entropy(z.flatten(0, 1), batch.targets.flatten(), label_smoothing=smoothing)


def smoothing_transformers(z: Tensor, batch: Batch, smoothing: float) -> Tensor:
    """transformers/trainer_pt_utils.py LabelSmoother, real: sums in fp32."""
    return LabelSmoother(epsilon=smoothing)({"logits": z}, batch.labels, shift_labels=True)


def critical_torch(z: Tensor, batch: Batch) -> Tensor:
    """torch's unreduced cross-entropy, real, times the weights."""
    nll = F.cross_entropy(z.flatten(0, 1), batch.targets.flatten(), reduction="none")
    return (nll * batch.critical.flatten()).sum()


def soft_target_torch(
    z: Tensor, batch: Batch, target: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """torch's cross-entropy with probabilities as targets, real. `target(p, onehot, log_t)` has no
    graph."""
    rows, ids, mask = rows_of(z, batch)
    log_t = rows_of(batch.frozen_logp, batch)[0]
    here = mask > 0
    q = target(rows.detach().softmax(-1), F.one_hot(ids, VOCABULARY).to(z.dtype), log_t)
    return F.cross_entropy(rows[here], q[here])


def guided(p: Tensor, onehot: Tensor, log_t: Tensor, eta: float) -> Tensor:
    """The page txie1.github.io/Target-SFT: the label gets its own probability, the rest goes to
    p^(1-eta) T^eta."""
    p_y = (p * onehot).sum(-1, keepdim=True)
    mix = p ** (1 - eta) * log_t.exp() ** eta
    return p_y * onehot + (1 - p_y) * mix / mix.sum(-1, keepdim=True)


def dft_authors(z: Tensor, batch: Batch) -> Tensor:
    """yongliang-wu/DFT verl/verl/trainer/fsdp_dft_trainer.py."""
    rows, ids, mask = rows_of(z, batch)
    trust = pick(rows.softmax(-1), ids).detach()
    return verl_mean(trust * F.cross_entropy(rows, ids, reduction="none"), mask)


def dft_trl(z: Tensor, batch: Batch, num_items: int | None = None) -> Tensor:
    """huggingface/trl trl/trainer/sft_trainer.py dft_loss: pads the labels instead of cutting the
    logits."""
    log_p_y = batch.at_target(z.log_softmax(-1))
    weighted = -log_p_y * log_p_y.detach().exp() * batch.kept
    return weighted.sum() / (batch.kept.sum() if num_items is None else num_items)


def dft_llama_factory(z: Tensor, batch: Batch, num_items: int | None = None) -> Tensor:
    """hiyouga/LLaMA-Factory src/llamafactory/train/trainer_utils.py: p from the loss, supervised
    tokens only."""
    targets = batch.targets.flatten()
    nll = F.cross_entropy(z.flatten(0, 1), targets, ignore_index=-100, reduction="none")[
        targets != -100
    ]
    return reduce_kept(nll * torch.exp(-nll.detach()), num_items)


def dft_swift(z: Tensor, batch: Batch) -> Tensor:
    """modelscope/ms-swift swift/trainers/utils.py per_token_loss_func, summed.

    Rolls the labels, so a sequence's first label would land on its last position: it must be
    unsupervised.
    """
    targets = batch.labels.roll(-1, dims=-1).flatten()
    nll = F.cross_entropy(z.flatten(0, 1), targets, ignore_index=-100, reduction="none")
    return (nll * torch.exp(-nll).detach()).sum()


def beyond_log_authors(z: Tensor, batch: Batch, kind: str, alpha: float = 0.0) -> Tensor:
    """GaotangLi/Beyond-Log-Likelihood main_verl/trainer/fsdp_sft_trainer.py, its "logp", "p" and
    "GeneralFamily"."""
    rows, ids, mask = rows_of(z, batch)
    log_p_y = pick(rows.log_softmax(-1), ids)
    if kind == "logp":
        per_token = -log_p_y
    elif kind == "p":
        per_token = 1 - log_p_y.exp()
    else:
        per_token = (1 - torch.exp(alpha * log_p_y)) / alpha
    return verl_mean(per_token, mask)


def profit_authors(
    z: Tensor, batch: Batch, threshold: float, num_items: int | None = None
) -> Tensor:
    """Utaotao/ProFit src/llamafactory/train/trainer_utils.py, direction "higher".

    Labels below the threshold become -100, so a label exactly at it stays, and the mean is over
    what stays.
    """
    rows, targets = z.flatten(0, 1), batch.targets.flatten()
    low = pick(rows.detach().softmax(-1), targets.clamp(min=0)) < threshold
    staying = targets.masked_fill(low, -100)
    if num_items is None:
        return F.cross_entropy(rows, staying, ignore_index=-100)
    return F.cross_entropy(rows, staying, ignore_index=-100, reduction="sum") / num_items


def profit_share(batch: Batch, threshold: float) -> float:
    """One over the number of tokens that ProFit's mean is over."""
    return 1 / float(((batch.at_target(batch.logits.softmax(-1)) >= threshold) * batch.kept).sum())


def eaft_weight(rows: Tensor, alpha: float) -> Tensor:
    """What both codes of EAFT's author do: k = 20, and 3.0 for log 20."""
    top = rows.detach().topk(20, dim=-1).values
    log_share = top - top.logsumexp(-1, keepdim=True)
    return ((-log_share.exp() * log_share).sum(-1) / 3.0) ** alpha


def eaft_llama_factory(
    z: Tensor, batch: Batch, alpha: float, num_items: int | None = None
) -> Tensor:
    """hiyouga/LLaMA-Factory src/llamafactory/train/trainer_utils.py, by EAFT's author."""
    rows, targets = z.flatten(0, 1), batch.targets.flatten()
    here = targets != -100
    nll = F.cross_entropy(rows, targets, ignore_index=-100, reduction="none")[here]
    return reduce_kept(nll * eaft_weight(rows[here], alpha), num_items)


def eaft_swift(z: Tensor, batch: Batch, alpha: float) -> Tensor:
    """ymxyll/ms-swift-EAFT swift/trainers/utils.py per_token_loss_func, summed: weight 1 where
    unsupervised."""
    rows, targets = z.flatten(0, 1), batch.labels.roll(-1, dims=-1).flatten()
    nll = F.cross_entropy(rows, targets, ignore_index=-100, reduction="none")
    return (
        nll * torch.where(targets != -100, eaft_weight(rows, alpha), torch.ones_like(nll))
    ).sum()


def iw_sft_authors(z: Tensor, batch: Batch, num_items: int, temperature: float = 1.0) -> Tensor:
    """emmyqin/iw_sft bounding_trainers.py IwSFTLoss, sum_over_time, as its trainer calls it
    (temperature 1).

    Its weights, [batch, 1], multiply losses of [batch, time, 1]: that is right for batches of one
    sequence, which its script uses, and so does this function: one call a sequence.
    """
    total = z.new_zeros(())
    for i in range(len(z)):
        following = batch.labels[i, 1:]
        mask, ids = (following != -100).to(z.dtype), following.clamp(min=0)
        nll = -pick(z[i, :-1].log_softmax(-1), ids)
        reference = pick(batch.frozen_logp[i, :-1], ids)
        drift = ((-nll.detach() - reference) * mask).sum() / mask.sum()
        total = total + (nll * mask).sum() * torch.exp(temperature * drift).clamp(0, 16)
    return total / num_items


def proximal_authors(z: Tensor, batch: Batch, low: float = 0.2, high: float = 0.28) -> Tensor:
    """zwhong714/PSFT: PPO's loss of verl/verl/trainer/ppo/core_algos.py with advantages of one
    (ray_trainer.py).

    Its dual clip is for negative advantages only. log r is clamped to +-20: nothing here drifts
    that far.
    """
    rows, ids, mask = rows_of(z, batch)
    old = pick(rows_of(batch.frozen_logp, batch)[0], ids)
    ratio = (pick(rows.log_softmax(-1), ids) - old).clamp(-20, 20).exp()
    return verl_mean(torch.maximum(-ratio, -ratio.clamp(1 - low, 1 + high)), mask)


def gem_authors(
    z: Tensor, batch: Batch, beta: float, h: str = "linear", num_items: int | None = None
) -> Tensor:
    """liziniu/GEM sft_trainer.py and (num_items) sft_trainer_v2.py gem_loss."""
    rows, ids, mask = rows_of(z, batch)
    rows, ids = rows[mask > 0], ids[mask > 0]
    log_p = rows.log_softmax(-1)
    q = (rows.detach() / beta).softmax(-1) * gem_h(rows.detach(), ids, h)
    return reduce_kept((q * (log_p - pick(log_p, ids)[:, None])).sum(-1), num_items)


def gem_h(rows: Tensor, ids: Tensor, h: str) -> Tensor:
    """GEM's function h of each column's lead over the label."""
    return (
        torch.ones_like(rows)
        if h == "linear"
        else torch.sigmoid((rows - pick(rows, ids)[..., None]) / 100)
    )


def gift_reference(frozen: Tensor, smooth: float) -> Tensor:
    """zzy1127/GIFT's log p_ref: mixed with the uniform distribution, then floored."""
    return torch.log((1 - smooth) * frozen.softmax(-1) + smooth / VOCABULARY + 1e-10)


def gift_authors(z: Tensor, batch: Batch, beta: float, smooth: float = 0.0) -> Tensor:
    """zzy1127/GIFT verl/verl/trainer/fsdp_gift_trainer.py, its training phase."""
    rows, ids, mask = rows_of(z, batch)
    raised = rows_of(gift_reference(batch.frozen, smooth), batch)[0] + beta * F.one_hot(
        ids, VOCABULARY
    )
    return verl_mean(-(raised.softmax(-1) * rows.log_softmax(-1)).sum(-1), mask)


def deft_authors(z: Tensor, batch: Batch) -> Tensor:
    """luludus/DEFT main_verl/trainer/fsdp_sft_trainer.py, its "DEFT"."""
    rows, ids, mask = rows_of(z, batch)
    alpha = rows.detach().softmax(-1).square().sum(-1)
    return verl_mean(
        (1 - torch.exp(alpha * pick(rows.log_softmax(-1), ids))) / (alpha + 1e-6), mask
    )


def deft_weights(batch: Batch) -> Tensor:
    """What DEFT's epsilon makes of each token's gradient."""
    alpha = batch.logits.softmax(-1).square().sum(-1)
    return alpha / (alpha + 1e-6)


def idft_phi(rows: Tensor, ids: Tensor, floor: float = 1e-10) -> Tensor:
    """log p(y) + H(p), detached, with the floor that every loss of Towards-On-Policy-SFT has in its
    entropy."""
    p = rows.detach().softmax(-1)
    return pick(rows.detach().log_softmax(-1), ids) - (p * torch.log(p + floor)).sum(-1)


def idft_first(
    z: Tensor,
    batch: Batch,
    tau: float = 0.0,
    temperature: float = 1.0,
    low: float = 0.1,
    high: float = 1.0,
    progress: float = 1.0,
    floor: float = 1e-10,
) -> Tensor:
    """Towards-On-Policy-SFT 474bc8c IDFT/verl/trainer/fsdp_idft_trainer.py; `progress`: its warm-up
    from plain SFT."""
    rows, ids, mask = rows_of(z, batch)
    weight = high - (high - low) * torch.sigmoid((tau - idft_phi(rows, ids, floor)) / temperature)
    return verl_mean(
        F.cross_entropy(rows, ids, reduction="none") * (1 + progress * (weight - 1)), mask
    )


def idft_opposite(
    z: Tensor, batch: Batch, tau: float, temperature: float, low: float, high: float
) -> Tensor:
    """Towards-On-Policy-SFT dc9b5df IDFT/verl/workers/utils/losses.py indomain_cot_loss: high where
    phi is low."""
    rows, ids, mask = rows_of(z, batch)
    weight = low + (high - low) * torch.sigmoid((tau - idft_phi(rows, ids)) / temperature)
    return -(pick(rows.log_softmax(-1), ids) * weight * mask).sum() / mask.sum()


def idft_polylog(z: Tensor, batch: Batch, beta: float = 1.0) -> Tensor:
    """Towards-On-Policy-SFT dc9b5df IDFT/verl/trainer/fsdp_polylog_trainer.py after its warm-up;
    the power is detached.

    (At e33b89c the power's base was not detached yet: another gradient.)
    """
    rows, ids, mask = rows_of(z, batch)
    p_y = pick(rows.softmax(-1), ids).clamp(1e-10, 1)
    power = torch.exp(-idft_phi(rows, ids) / beta).clamp(0.1, 2)
    return verl_mean(-(p_y.detach() ** power) * torch.log(p_y), mask)


def anchored_authors(z: Tensor, batch: Batch, kl_weight: float, mode: str) -> Tensor:
    """zhuchichi56/ASFT train_v2.py, its modes "asft" and "sft+kl": F.kl_div (real) against the
    frozen model."""
    rows, ids, mask = rows_of(z, batch)
    nll = F.cross_entropy(rows, ids, reduction="none")
    if mode == "asft":
        nll = nll * pick(rows.softmax(-1), ids).detach()
    frozen = rows_of(batch.frozen, batch)[0].softmax(-1)
    anchor = F.kl_div(rows.log_softmax(-1), frozen, reduction="none").sum(-1)
    return (nll + kl_weight * anchor)[mask > 0].sum() / mask.sum()


def asft_llama_factory(z: Tensor, batch: Batch, kl_weight: float) -> Tensor:
    """hiyouga/LLaMA-Factory src/llamafactory/train/trainer_utils.py: two masked means, added."""
    rows, _, mask = rows_of(z, batch)
    divergence = F.kl_div(
        rows.log_softmax(-1), rows_of(batch.frozen, batch)[0].softmax(-1), reduction="none"
    ).sum(-1)
    return dft_llama_factory(z, batch) + kl_weight * (divergence * mask).sum() / mask.sum()


def kd_trl(z: Tensor, batch: Batch, temperature: float = 1.0) -> Tensor:
    """huggingface/trl trl/experimental/gkd/gkd_trainer.py generalized_jsd_loss at beta = 0: forward
    KL, batch mean."""
    rows, _, mask = rows_of(z, batch)
    student, teacher = (
        (x / temperature).log_softmax(-1) for x in (rows, rows_of(batch.frozen, batch)[0])
    )
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True)[mask > 0]
    return divergence.sum() / mask.sum()


def kd_nemo(z: Tensor, batch: Batch, k: int, zero_outside_topk: bool) -> Tensor:
    """NVIDIA-NeMo/RL, kl_type "forward": nemo_rl/distributed/model_utils.py picks the columns,
    loss_functions.py sums.

    The teacher is renormalised over its top k; so is the student, unless zero_outside_topk.
    """
    ids, _ = teacher_topk(batch, k)
    teacher = batch.frozen.gather(-1, ids).log_softmax(-1)[:, :-1]
    student = (
        z.log_softmax(-1).gather(-1, ids)
        if zero_outside_topk
        else z.gather(-1, ids).log_softmax(-1)
    )
    divergence = (teacher.exp() * (teacher - student[:, :-1])).sum(-1)
    return verl_mean(divergence, batch.kept[:, :-1])


def teacher_topk(batch: Batch, k: int) -> tuple[Tensor, Tensor]:
    """ids and log T [b, s, k] of the k most likely tokens."""
    values, ids = batch.frozen_logp.topk(k, dim=-1)
    return ids, values


# ---- ours, with matching parameters --------------------------------------------------------------


def plain(name: str, **parameters: float) -> Callable[[Batch], dict[str, Any]]:
    return lambda batch: {"objective": objectives.get(name, **parameters)}


def taught(name: str, **parameters: float) -> Callable[[Batch], dict[str, Any]]:
    return lambda batch: {"objective": objectives.get(name, **parameters), "teacher": batch.frozen}


def by_sequence(temperature: float) -> Callable[[Batch], dict[str, Any]]:
    return lambda batch: {
        "objective": objectives.get("iw-sft", temperature=temperature),
        "reference_logprobs": batch.at_target(batch.frozen_logp),
        "sequence_ids": torch.arange(len(batch.labels))[:, None]
        .expand_as(batch.labels)
        .contiguous(),
        "num_sequences": len(batch.labels),
    }


def from_old_policy(batch: Batch) -> dict[str, Any]:
    return {
        "objective": objectives.get("proximal", clip_high=0.28),
        "reference_logprobs": batch.at_target(batch.frozen_logp),
    }


def gift(beta: float, smooth: float) -> Callable[[Batch], dict[str, Any]]:
    return lambda batch: {
        "objective": objectives.get("gift", beta=beta),
        "teacher": gift_reference(batch.frozen, smooth),
    }


def top_k_dropped(k: int) -> Callable[[Batch], dict[str, Any]]:
    return lambda batch: {
        "objective": objectives.get("kd"),
        "teacher": TeacherTopK(*teacher_topk(batch, k), "drop"),
    }


def mean(batch: Batch) -> float:
    return 1 / batch.count


def verl(batch: Batch) -> float:
    return 1 / (batch.count + 1e-8)


def per_items(batch: Batch) -> float:
    return 1 / ITEMS


def summed(batch: Batch) -> float:
    return 1.0


def nothing(batch: Batch) -> float:
    return 0.0


def no_entropy(weight: float = 1.0, temperature: float = 1.0) -> Callable[[Batch], float]:
    """KL(T || p) in place of CE(T, p): the teacher's entropy is missing."""
    return lambda batch: (
        -weight * mean(batch) * batch.sum(entropy((batch.frozen / temperature).log_softmax(-1)))
    )


def no_top_k_entropy(k: int) -> Callable[[Batch], float]:
    return lambda batch: (
        -verl(batch) * batch.sum(entropy(teacher_topk(batch, k)[1].log_softmax(-1)))
    )


def entropy(log_probabilities: Tensor) -> Tensor:
    return torch.special.entr(log_probabilities.exp()).sum(-1)


@dataclass(frozen=True)
class Case:
    """official(logits) = scale * sum of our loss + shift, and so for the gradients; shift None: the
    gradients only."""

    official: Callable[[Tensor, Batch], Tensor]
    ours: Callable[[Batch], dict[str, Any]]
    scale: Callable[[Batch], float]
    shift: Callable[[Batch], float] | None = nothing
    tolerance: float = EXACT


EAFT_3 = math.log(20) / 3.0  # the author's normaliser over ours

CASES = {
    "sft: torch": Case(sft_torch, plain("sft"), mean),
    "sft: transformers": Case(sft_transformers, plain("sft"), mean, tolerance=SINGLE),
    "sft: transformers, global count": Case(
        partial(sft_transformers, num_items=ITEMS), plain("sft"), per_items, tolerance=SINGLE
    ),
    "dft: authors": Case(dft_authors, plain("dft"), verl),
    "dft: TRL": Case(dft_trl, plain("dft"), mean),
    "dft: TRL, global count": Case(partial(dft_trl, num_items=ITEMS), plain("dft"), per_items),
    "dft: LLaMA-Factory": Case(dft_llama_factory, plain("dft"), mean),
    "dft: LLaMA-Factory, global count": Case(
        partial(dft_llama_factory, num_items=ITEMS), plain("dft"), per_items
    ),
    "dft: ms-swift": Case(dft_swift, plain("dft"), summed),
    "beyond-log: authors, logp": Case(
        partial(beyond_log_authors, kind="logp"), plain("beyond-log", alpha=0), verl
    ),
    "beyond-log: authors, p": Case(
        partial(beyond_log_authors, kind="p"), plain("beyond-log", alpha=1), verl, None
    ),
    **{
        f"beyond-log: authors, GeneralFamily-{alpha}": Case(
            partial(beyond_log_authors, kind="family", alpha=alpha),
            plain("beyond-log", alpha=alpha),
            verl,
            None,
        )
        for alpha in (0.5, 1, 10)
    },
    **{
        f"profit: authors, {tau}": Case(
            partial(profit_authors, threshold=tau),
            plain("profit", threshold=tau),
            partial(profit_share, threshold=tau),
        )
        for tau in (0.1, 0.4)
    },
    "profit: authors, global count": Case(
        partial(profit_authors, threshold=0.1, num_items=ITEMS),
        plain("profit", threshold=0.1),
        per_items,
    ),
    **{
        f"eaft: LLaMA-Factory, power {power}": Case(
            partial(eaft_llama_factory, alpha=power),
            plain("eaft", top_k=20, power=power),
            lambda batch, power=power: EAFT_3**power / batch.count,
        )
        for power in (1.0, 2.0)
    },
    "eaft: LLaMA-Factory, global count": Case(
        partial(eaft_llama_factory, alpha=1.0, num_items=ITEMS),
        plain("eaft", top_k=20, power=1),
        lambda batch: EAFT_3 / ITEMS,
    ),
    "eaft: ms-swift": Case(
        partial(eaft_swift, alpha=1.0), plain("eaft", top_k=20, power=1), lambda batch: EAFT_3
    ),
    "iw-sft: authors": Case(partial(iw_sft_authors, num_items=ITEMS), by_sequence(1.0), per_items),
    "critical: torch": Case(
        critical_torch,
        lambda batch: {"objective": objectives.get("critical"), "token_weights": batch.critical},
        summed,
    ),
    "deft: authors": Case(
        deft_authors,
        lambda batch: {"objective": objectives.get("deft"), "token_weights": deft_weights(batch)},
        verl,
        None,
    ),
    "idft: authors' first trainer": Case(idft_first, plain("idft"), verl, tolerance=FLOORED),
    "idft: authors' first trainer, other parameters": Case(
        partial(idft_first, tau=-1.0, temperature=0.7, low=0.5, high=1.5),
        plain("idft", threshold=-1.0, temperature=0.7, weight_min=0.5, weight_max=1.5),
        verl,
        tolerance=FLOORED,
    ),
    # 1 + progress * (w - 1) is the same weight between other ends
    "idft: authors' first trainer, half warmed up": Case(
        partial(idft_first, progress=0.5),
        plain("idft", weight_min=0.55, weight_max=1.0),
        verl,
        tolerance=FLOORED,
    ),
    "idft: authors' first trainer, no floor": Case(
        partial(idft_first, floor=0.0), plain("idft"), verl
    ),
    "proximal: authors": Case(proximal_authors, from_old_policy, verl, None),
    **{
        f"label-smoothing: torch, {smoothing}": Case(
            partial(sft_torch, smoothing=smoothing),
            plain("label-smoothing", smoothing=smoothing),
            mean,
        )
        for smoothing in (0.1, 1.0)
    },
    "label-smoothing: transformers": Case(
        partial(smoothing_transformers, smoothing=0.1),
        plain("label-smoothing", smoothing=0.1),
        mean,
        tolerance=SINGLE,
    ),
    "sft-kl: ASFT's baseline": Case(
        partial(anchored_authors, kl_weight=0.1, mode="sft+kl"),
        taught("sft-kl", kl_weight=0.1),
        mean,
        no_entropy(0.1),
    ),
    "asft: authors": Case(
        partial(anchored_authors, kl_weight=0.05, mode="asft"),
        taught("asft", kl_weight=0.05),
        mean,
        no_entropy(0.05),
    ),
    "asft: LLaMA-Factory": Case(
        partial(asft_llama_factory, kl_weight=0.1),
        taught("asft", kl_weight=0.1),
        mean,
        no_entropy(0.1),
    ),
    **{
        f"gem: authors, beta {beta}": Case(
            partial(gem_authors, beta=beta), plain("gem", beta=beta), mean
        )
        for beta in (0.7, 0.4)
    },
    "gem: authors, global count": Case(
        partial(gem_authors, beta=0.7, num_items=ITEMS), plain("gem", beta=0.7), per_items
    ),
    "kd: torch": Case(
        partial(soft_target_torch, target=lambda p, y, log_t: log_t.exp()), taught("kd"), mean
    ),
    "kd: TRL": Case(kd_trl, taught("kd"), mean, no_entropy()),
    "kd: TRL, temperature 2": Case(
        partial(kd_trl, temperature=2.0),
        lambda batch: {
            "objective": objectives.get("kd"),
            "teacher": batch.frozen / 2,
            "logit_scale": 0.5,
        },
        mean,
        no_entropy(temperature=2.0),
    ),
    "kd: NeMo-RL, top 6": Case(
        partial(kd_nemo, k=6, zero_outside_topk=True), top_k_dropped(6), verl, no_top_k_entropy(6)
    ),
    "kd: NeMo-RL, every token": Case(
        partial(kd_nemo, k=VOCABULARY, zero_outside_topk=False),
        taught("kd"),
        verl,
        no_top_k_entropy(VOCABULARY),
    ),
    "kd-hybrid: torch": Case(
        partial(soft_target_torch, target=lambda p, y, log_t: 0.7 * y + 0.3 * log_t.exp()),
        taught("kd-hybrid", teacher_weight=0.3),
        mean,
    ),
    **{
        f"gift: authors, beta {beta}, smoothing {smooth}": Case(
            partial(gift_authors, beta=beta, smooth=smooth), gift(beta, smooth), verl
        )
        for beta, smooth in ((20.0, 0.0), (3.0, 0.0), (3.0, 0.1))
    },
    # without accounting for the floor of T
    "gift: authors, T as it is": Case(
        partial(gift_authors, beta=3.0), taught("gift", beta=3.0), verl, tolerance=1e-7
    ),
    **{
        f"target-sft: torch with the page's Q, eta {eta}": Case(
            partial(soft_target_torch, target=partial(guided, eta=eta)),
            taught("target-sft", eta=eta),
            mean,
        )
        for eta in (0.0, 0.3, 1.0)
    },
    "target-sft: DFT's authors, eta 0": Case(dft_authors, plain("target-sft", eta=0.0), verl, None),
}


def value_and_gradient(
    function: Callable[[Tensor], Tensor], logits: Tensor
) -> tuple[float, Tensor]:
    z = logits.clone().requires_grad_()
    value = function(z)
    value.backward()
    assert z.grad is not None
    return float(value.detach()), z.grad


def ours(batch: Batch, **inputs: Any) -> tuple[float, Tensor]:
    """Our loss, summed over the tokens, and its gradient, which is zero where there is no label."""
    value, gradient = value_and_gradient(
        lambda z: q_target_cross_entropy(z, batch.targets, **inputs).loss.sum(), batch.logits
    )
    assert not gradient[batch.targets == -100].any()
    return value, gradient


def assert_same(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    size = expected.abs().max()
    assert size > 1e-3, "a gradient of nearly zero compares nothing"
    error = float((actual - expected).abs().max() / size)
    assert error <= tolerance, (
        f"gradients differ by {error:.3e} of the largest entry, {float(size):.3e}"
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_official_code_agrees(name: str, seed: int) -> None:
    case, batch = CASES[name], make_batch(seed)
    value, gradient = value_and_gradient(lambda z: case.official(z, batch), batch.logits)
    our_value, our_gradient = ours(batch, **case.ours(batch))
    scale = case.scale(batch)
    assert_same(scale * our_gradient, gradient, case.tolerance)
    if case.shift is not None:
        expected = scale * our_value + case.shift(batch)
        assert value == pytest.approx(expected, rel=case.tolerance, abs=case.tolerance)


def test_every_objective_has_a_second_oracle() -> None:
    built_in = [
        n
        for n in objectives.names()
        if objectives.row(n).function.__module__ == "megatron_tsft.objectives"
    ]
    assert set(built_in) == {name.split(":")[0] for name in CASES}


# ---- differences that no scale and no constant accounts for --------------------------------------


def test_profit_keeps_a_label_at_the_threshold_and_we_do_not() -> None:
    batch = make_batch(0)
    logits = batch.logits.clone()
    logits[0, 0] = -1000.0
    logits[0, 0, [3, 5, 7, 11]] = 0.0  # four equals: p(7) is exactly 1/4
    batch = Batch(logits, batch.labels, batch.frozen, batch.critical)
    assert batch.targets[0, 0] == 7 and logits[0, 0].softmax(-1)[7] == 0.25
    _, theirs = value_and_gradient(lambda z: profit_authors(z, batch, 0.25, num_items=1), logits)
    _, at = ours(batch, objective=objectives.get("profit", threshold=0.25))
    _, below = ours(batch, objective=objectives.get("profit", threshold=math.nextafter(0.25, 0)))
    assert theirs[0, 0, 7] == pytest.approx(-0.75) and not at[0, 0].any()
    assert_same(below, theirs, EXACT)  # their >= is our > of the next number below
    at[0, 0] = below[0, 0]
    assert_same(at, theirs, EXACT)


def test_iw_sft_weights_are_clipped_as_theirs() -> None:
    batch = make_batch(0)
    towards = torch.zeros_like(batch.frozen)
    towards[0] = 8 * F.one_hot(batch.targets[0].clamp(min=0), VOCABULARY)
    batch = Batch(
        batch.logits + towards, batch.labels, batch.frozen, batch.critical
    )  # sequence 0 has left the reference
    inputs = by_sequence(2.0)(batch)
    weights = q_target_cross_entropy(batch.logits, batch.targets, **inputs).imitation
    assert weights[0].max() == 16 and 0 < weights[1].max() < 16
    _, theirs = value_and_gradient(
        lambda z: iw_sft_authors(z, batch, ITEMS, temperature=2.0), batch.logits
    )
    assert_same(ours(batch, **inputs)[1] / ITEMS, theirs, EXACT)


def test_proximal_takes_every_branch() -> None:
    batch = make_batch(0)
    log_ratio = batch.at_target(batch.logits.log_softmax(-1)) - batch.at_target(batch.frozen_logp)
    ratio = log_ratio[batch.kept > 0].exp()
    assert (ratio < 0.8).any() and ((ratio > 0.8) & (ratio < 1.28)).any() and (ratio > 1.28).any()
    _, gradient = ours(batch, **from_old_policy(batch))
    clipped = (log_ratio.exp() > 1.28) & (batch.kept > 0)
    assert not gradient[clipped].any() and gradient[~clipped & (batch.kept > 0)].any(-1).all()


@pytest.mark.parametrize("seed", range(3))
def test_gem_with_logsigmoid_is_ours_times_its_weights_off_the_label(seed: int) -> None:
    """h weighs each alternative: divided by it, the gradient there is ours; the label's entry
    balances the row."""
    batch = make_batch(seed)
    _, theirs = value_and_gradient(
        lambda z: gem_authors(z, batch, 0.7, "logsigmoid", num_items=1), batch.logits
    )
    _, gradient = ours(batch, objective=objectives.get("gem", beta=0.7))
    ids = batch.targets.clamp(min=0)
    weights = gem_h(batch.logits, ids, "logsigmoid")
    off = (1 - F.one_hot(ids, VOCABULARY)) * batch.kept[..., None]
    assert_same(off * theirs / weights, off * gradient, EXACT)
    assert theirs.sum(-1).abs().max() < EXACT and gradient.sum(-1).abs().max() < EXACT
    # half of ours, to half a per cent per unit of logit that a column is ahead or behind the label
    assert_same(2 * theirs, gradient, 0.05)


@pytest.mark.parametrize("seed", range(3))
def test_idft_of_the_opposite_sign_mirrors_ours(seed: int) -> None:
    """The weights of indomain_cot_loss and ours add up to low + high."""
    batch, low, high = make_batch(seed), 0.1, 1.0
    _, theirs = value_and_gradient(
        lambda z: idft_opposite(z, batch, 0.5, 2.0, low, high), batch.logits
    )
    _, gradient = ours(batch, objective=objectives.get("idft", threshold=0.5, temperature=2.0))
    _, sft = ours(batch, objective=objectives.get("sft"))
    assert_same(((low + high) * sft - gradient) / batch.count, theirs, FLOORED)


@pytest.mark.parametrize("seed", range(3))
def test_idft_of_the_current_trainer_is_another_weight(seed: int) -> None:
    """p^clamp(exp(-phi)): the same direction per token, a different length; it agrees after the
    weights' quotient."""
    batch = make_batch(seed)
    _, theirs = value_and_gradient(lambda z: idft_polylog(z, batch), batch.logits)
    objective = objectives.get("idft")
    ids = batch.targets.clamp(min=0)
    power = torch.exp(-idft_phi(batch.logits, ids)).clamp(0.1, 2)
    polylog = batch.at_target(batch.logits.softmax(-1)) ** power
    imitation = q_target_cross_entropy(batch.logits, batch.targets, objective).imitation
    quotient = torch.where(
        batch.kept > 0, polylog / imitation.clamp(min=1e-30), torch.ones_like(polylog)
    )
    assert (
        quotient[batch.kept > 0].min() < 0.1
    )  # unlikely labels: theirs goes to zero, ours to weight_min
    assert_same(
        ours(batch, objective=objective, token_weights=quotient)[1] / batch.count, theirs, FLOORED
    )


@pytest.mark.parametrize("seed", range(3))
def test_nemo_that_renormalises_the_student_is_ours_on_the_top_k_columns(seed: int) -> None:
    """zero_outside_topk=False: a vocabulary of the teacher's k tokens; the other logits get no
    gradient."""
    batch, k = make_batch(seed), 6
    ids, _ = teacher_topk(batch, k)
    value, theirs = value_and_gradient(
        lambda z: kd_nemo(z, batch, k, zero_outside_topk=False), batch.logits
    )
    any_label = torch.where(
        batch.targets == -100, -100, 0
    )  # kd does not read labels, but where there are none
    our_value, gradient = value_and_gradient(
        lambda z: q_target_cross_entropy(
            z.gather(-1, ids), any_label, objectives.get("kd"), teacher=batch.frozen.gather(-1, ids)
        ).loss.sum(),
        batch.logits,
    )
    assert_same(gradient * verl(batch), theirs, EXACT)
    assert value == pytest.approx(our_value * verl(batch) + no_top_k_entropy(k)(batch), rel=EXACT)


# ---- Megatron's own functions --------------------------------------------------------------------

TOP = 6
SMOOTHING = 0.1


def megatron_results(rank: int, batches: list[Batch]) -> list[dict[str, tuple[float, Tensor]]]:
    """Megatron's functions, unreduced, summed over the supervised tokens: in a process of its own,
    which imports it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Transformer Engine and Apex are not installed
        from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
        from megatron.training.distillation.cached_logits_loss import topk_kl_div

    group = dist.group.WORLD

    def sequence_first(x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous()

    def cross_entropy(z: Tensor, batch: Batch, smoothing: float = 0.0) -> Tensor:
        # a label of -100 gives a number, not zero: Megatron's loss mask is what removes it
        per_token = vocab_parallel_cross_entropy(
            sequence_first(z), sequence_first(batch.targets), smoothing, group
        )
        return (per_token.transpose(0, 1) * batch.kept).sum()

    assert group is not None

    def divergence(z: Tensor, batch: Batch, k: int, ghost: bool = False) -> Tensor:
        ids, logprobs = (sequence_first(x) for x in teacher_topk(batch, k))
        return (
            topk_kl_div(sequence_first(z), logprobs, ids, 1, 0, group, add_ghost_token=ghost)
            * batch.kept
        ).sum()

    def hybrid(z: Tensor, batch: Batch, alpha: float = 0.3) -> Tensor:
        return (1 - alpha) * cross_entropy(z, batch) + alpha * divergence(z, batch, VOCABULARY)

    functions: dict[str, Callable[[Tensor, Batch], Tensor]] = {
        "sft": cross_entropy,
        "label-smoothing": partial(cross_entropy, smoothing=SMOOTHING),
        "kd": partial(divergence, k=VOCABULARY),
        "kd top-k": partial(divergence, k=TOP),
        "kd ghost": partial(divergence, k=TOP, ghost=True),
        "kd-hybrid": hybrid,
    }
    return [
        {
            name: value_and_gradient(lambda z, f=f, batch=batch: f(z, batch), batch.logits)
            for name, f in functions.items()
        }
        for batch in batches
    ]


@pytest.fixture(scope="module")
def megatron() -> list[tuple[Batch, dict[str, tuple[float, Tensor]]]]:
    batches = [make_batch(seed) for seed in range(3)]
    return list(zip(batches, run_ranks(1, megatron_results, batches)[0], strict=True))


MEGATRON = {
    "sft": (plain("sft"), lambda batch: 0.0),
    # Megatron spreads alpha over the other V - 1 tokens; over all V, its share is alpha * V / (V -
    # 1)
    "label-smoothing": (
        plain("label-smoothing", smoothing=SMOOTHING * VOCABULARY / (VOCABULARY - 1)),
        lambda batch: 0.0,
    ),
    "kd": (taught("kd"), lambda batch: -batch.sum(entropy(batch.frozen_logp))),
    "kd-hybrid": (
        taught("kd-hybrid", teacher_weight=0.3),
        lambda batch: -0.3 * batch.sum(entropy(batch.frozen_logp)),
    ),
    # the teacher's top k are not renormalised: the whole token counts for their mass
    "kd top-k": (
        lambda batch: (
            top_k_dropped(TOP)(batch) | {"token_weights": teacher_topk(batch, TOP)[1].exp().sum(-1)}
        ),
        lambda batch: -batch.sum(entropy(teacher_topk(batch, TOP)[1])),
    ),
}


@pytest.mark.parametrize("name", MEGATRON)
def test_megatron_agrees(
    name: str, megatron: list[tuple[Batch, dict[str, tuple[float, Tensor]]]]
) -> None:
    inputs, shift = MEGATRON[name]
    for batch, results in megatron:
        value, theirs = results[name]
        our_value, gradient = ours(batch, **inputs(batch))
        assert_same(gradient, theirs, SINGLE)
        assert value == pytest.approx(our_value + shift(batch), rel=SINGLE)


def test_megatrons_ghost_token_is_our_uniform_tail_on_the_top_k_columns(
    megatron: list[tuple[Batch, dict[str, tuple[float, Tensor]]]],
) -> None:
    """One extra token stands for the tail of both: its gradient is spread like p, ours like the
    uniform tail."""
    for batch, results in megatron:
        _, theirs = results["kd ghost"]
        ids, logprobs = teacher_topk(batch, TOP)
        _, gradient = ours(
            batch, objective=objectives.get("kd"), teacher=TeacherTopK(ids, logprobs, "uniform")
        )
        assert_same(gradient.gather(-1, ids), theirs.gather(-1, ids), SINGLE)
        tail = torch.ones_like(theirs).scatter(-1, ids, 0.0) * batch.kept[..., None]
        p = batch.logits.softmax(-1) * tail
        spread_like_p = (
            p / p.sum(-1, keepdim=True).clamp(min=1e-30) * (gradient * tail).sum(-1, keepdim=True)
        )
        assert_same(spread_like_p, theirs * tail, SINGLE)
