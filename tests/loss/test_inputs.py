"""Every input that cannot be right is refused, with a message that names it, its value and what to
change."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tsft import TeacherTopK, objectives, q_target_cross_entropy
from tests.loss.cases import call, random_case, run

S, B, W, K = 4, 2, 10, 3
LOGITS = torch.randn(S, B, W, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(S * B).reshape(S, B)
TOKENS = torch.zeros(S, B)
SEQUENCES = torch.zeros(S, B, dtype=torch.int64)
IDS = torch.arange(K).expand(S, B, K)
TOP = TeacherTopK(IDS, torch.full((S, B, K), 0.2).log())


class Ranks:
    """Stands for a process group where only its size and rank are asked."""

    def __init__(self, size: int):
        self.world = size

    def size(self) -> int:
        return self.world

    def rank(self) -> int:
        return 0


def loss(
    objective: str = "sft", logits: Tensor = LOGITS, labels: Tensor = LABELS, **keywords: Any
) -> Tensor:
    return q_target_cross_entropy(logits, labels, objectives.parse(objective), **keywords).loss


def meta(x: Tensor) -> Tensor:
    return x.to("meta")


TYPES: list[tuple[str, dict[str, Any], str]] = [
    (
        "sft",
        dict(logits=LOGITS.long()),
        "logits are torch.int64.*bfloat16, float16, float32 or float64",
    ),
    ("sft", dict(labels=LABELS.int()), "labels are torch.int32.*int64"),
    ("sft", dict(labels=LABELS.float()), "labels are torch.float32.*int64"),
    ("kd", dict(teacher=LOGITS.long()), "teacher is torch.int64.*floating-point"),
    (
        "kd",
        dict(teacher=[[0.1, 0.9]]),
        "teacher is list: pass a tensor of logits, a TeacherTopK or None",
    ),
    (
        "kd",
        dict(teacher=replace(TOP, ids=IDS.float())),
        "TeacherTopK.ids are torch.float32.*int32 or int64",
    ),
    (
        "kd",
        dict(teacher=replace(TOP, logprobs=IDS)),
        "TeacherTopK.logprobs is torch.int64.*floating-point",
    ),
    (
        "kd",
        dict(teacher=replace(TOP, label_logprobs=LABELS)),
        "TeacherTopK.label_logprobs is torch.int64",
    ),
    (
        "kd",
        dict(teacher=replace(TOP, tail_logmass=LABELS)),
        "TeacherTopK.tail_logmass is torch.int64",
    ),
    (
        "proximal",
        dict(reference_logprobs=LABELS),
        "reference_logprobs is torch.int64.*floating-point",
    ),
    ("sft", dict(token_weights=LABELS), "token_weights is torch.int64.*floating-point"),
    (
        "iw-sft",
        dict(reference_logprobs=TOKENS, sequence_ids=TOKENS),
        "sequence_ids are torch.float32.*int64",
    ),
]
VALUES: list[tuple[str, dict[str, Any], str]] = [
    # shapes
    (
        "sft",
        dict(labels=LABELS.T),
        r"logits \(4, 2, 10\) and labels \(2, 4\) do not fit.*labels' shape plus one",
    ),
    ("sft", dict(logits=LOGITS[0, 0]), r"logits \(10,\) and labels \(4, 2\)"),
    ("sft", dict(logits=LOGITS[..., :0]), r"logits \(4, 2, 0\) and labels"),
    (
        "kd",
        dict(teacher=LOGITS[..., 1:]),
        r"teacher has shape \(4, 2, 9\): it must be \(4, 2, 10\), the logits' shape",
    ),
    (
        "kd",
        dict(teacher=replace(TOP, ids=IDS[0])),
        r"TeacherTopK.ids \(2, 3\) must be \(4, 2\) plus one dimension",
    ),
    (
        "kd",
        dict(teacher=replace(TOP, logprobs=TOP.logprobs[..., 1:])),
        r"logprobs has shape \(4, 2, 2\).*ids' shape",
    ),
    (
        "kd",
        dict(teacher=replace(TOP, label_logprobs=TOKENS[0])),
        r"label_logprobs has shape \(2,\).*labels' shape",
    ),
    (
        "kd",
        dict(teacher=replace(TOP, tail_logmass=TOKENS.T)),
        r"tail_logmass has shape \(2, 4\).*labels' shape",
    ),
    (
        "proximal",
        dict(reference_logprobs=TOKENS[0]),
        r"reference_logprobs has shape \(2,\): it must be \(4, 2\)",
    ),
    ("sft", dict(token_weights=TOKENS.T), r"token_weights has shape \(2, 4\): it must be \(4, 2\)"),
    (
        "iw-sft",
        dict(reference_logprobs=TOKENS, sequence_ids=SEQUENCES[0]),
        r"sequence_ids has shape \(2,\)",
    ),
    # devices
    (
        "sft",
        dict(labels=meta(LABELS)),
        "labels is on meta but the logits are on cpu: move it there",
    ),
    (
        "sft",
        dict(logits=meta(LOGITS)),
        "labels is on cpu but the logits are on meta: move it there",
    ),
    ("kd", dict(teacher=meta(LOGITS)), "teacher is on meta"),
    ("kd", dict(teacher=replace(TOP, ids=meta(IDS))), "TeacherTopK.ids is on meta"),
    (
        "kd",
        dict(teacher=replace(TOP, logprobs=meta(TOP.logprobs))),
        "TeacherTopK.logprobs is on meta",
    ),
    ("sft", dict(token_weights=meta(TOKENS)), "token_weights is on meta"),
    ("proximal", dict(reference_logprobs=meta(TOKENS)), "reference_logprobs is on meta"),
    (
        "iw-sft",
        dict(reference_logprobs=TOKENS, sequence_ids=meta(SEQUENCES)),
        "sequence_ids is on meta",
    ),
    # the teacher and its kin
    *(
        (name, {}, f"'{name}' needs a teacher.*pass teacher=")
        for name in ("kd", "kd-hybrid", "sft-kl", "asft", "gift")
    ),
    (
        "target-sft",
        {},
        "target-sft, eta=0.5' needs a teacher.*pass teacher=.*eta=0|needs a teacher.*eta=0",
    ),
    (
        "kd",
        dict(teacher=replace(TOP, tail="round")),
        "TeacherTopK.tail='round'; valid: uniform, drop",
    ),
    *(
        (name, dict(teacher=LOGITS), f"'{name}' ignores the teacher that was given")
        for name in ("sft", "dft", "gem")
    ),
    ("proximal", dict(teacher=LOGITS, reference_logprobs=TOKENS), "'proximal' ignores the teacher"),
    (
        "sft",
        dict(reference_logprobs=TOKENS),
        "'sft' ignores the reference_logprobs.*leave them out",
    ),
    ("kd", dict(teacher=LOGITS, reference_logprobs=TOKENS), "'kd' ignores the reference_logprobs"),
    ("proximal", {}, "'proximal' needs log p_ref.*pass reference_logprobs= or a teacher"),
    ("proximal", dict(teacher=TOP), "'proximal' needs log p_ref.*or TeacherTopK.label_logprobs"),
    ("iw-sft", dict(sequence_ids=SEQUENCES), "'iw-sft' needs log p_ref"),
    (
        "iw-sft",
        dict(reference_logprobs=TOKENS),
        "'iw-sft' averages over sequences: pass sequence_ids=",
    ),
    (
        "iw-sft",
        dict(reference_logprobs=TOKENS, sequence_ids=SEQUENCES, cp_group=Ranks(2)),
        "'iw-sft' under context parallelism needs num_sequences=, the same on every rank",
    ),
    ("critical", {}, "'critical' needs token_weights.*none were given"),
    # numbers
    ("sft", dict(vocab_size=0), "vocab_size=0 does not fit 1 shard.*of 10 columns: pass 1..10"),
    ("sft", dict(vocab_size=11), "vocab_size=11 does not fit"),
    ("sft", dict(vocab_size=-3), "vocab_size=-3 does not fit"),
    (
        "sft",
        dict(vocab_size=21, tp_group=Ranks(2)),
        r"vocab_size=21 does not fit 2 shard\(s\).*pass 1..20",
    ),
    *(
        ("sft", dict(logit_scale=scale), f"logit_scale={scale} must be a non-zero, finite number")
        for scale in (0.0, float("nan"), float("inf"))
    ),
    (
        "sft",
        dict(logits=LOGITS[:1].expand(S, B, W), inplace=True),
        "inplace=True cannot write over expanded.*contiguous",
    ),
    (
        "sft",
        dict(diagnostics=("entropy", "perplexity")),
        "unknown diagnostic 'perplexity'; valid: entropy, kl",
    ),
]


@pytest.mark.parametrize(
    ("objective", "change", "message"), TYPES, ids=lambda it: it[:40] if type(it) is str else ""
)
def test_wrong_type(objective: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        loss(objective, **change)


@pytest.mark.parametrize(
    ("objective", "change", "message"), VALUES, ids=lambda it: it[:40] if type(it) is str else ""
)
def test_wrong_value(objective: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(objective, **change)


def test_diagnostics_given_as_one_word() -> None:
    with pytest.raises(ValueError, match="unknown diagnostic 'k'; valid: entropy, kl"):
        loss(diagnostics="kl")


def test_what_is_accepted() -> None:
    """The borders of the refusals above: an optional teacher, eta of zero, one sequence, a whole
    vocabulary."""
    for teacher in (None, LOGITS, TOP):
        assert torch.isfinite(loss("target-sft,eta=0", teacher=teacher)).all()
    zeros = objectives.get("target-sft", eta=torch.zeros(S, B))
    assert torch.isfinite(q_target_cross_entropy(LOGITS, LABELS, zeros).loss).all()
    given = dict(reference_logprobs=TOKENS, sequence_ids=SEQUENCES)
    torch.testing.assert_close(loss("iw-sft", **given), loss("iw-sft", **given, num_sequences=1))
    assert torch.isfinite(loss("iw-sft", **given, cp_group=Ranks(1))).all()
    torch.testing.assert_close(loss("sft", vocab_size=W), loss("sft"))
    torch.testing.assert_close(
        loss("proximal", teacher=LOGITS), loss("proximal", teacher=LOGITS.double())
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            torch.zeros(3),
            r"target-sft: eta has shape \(3,\): it must broadcast to the labels' \(4, 2\)",
        ),
        (torch.full((S, B), torch.nan), "target-sft: eta=nan is out of range"),
    ],
)
def test_per_token_parameters(value: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        q_target_cross_entropy(
            LOGITS, LABELS, objectives.get("target-sft", eta=value), teacher=LOGITS
        )


def test_mixture_index_of_another_shape() -> None:
    mixed = objectives.mixture(
        [objectives.get("sft"), objectives.get("dft")], torch.zeros(S, dtype=torch.int64)
    )
    with pytest.raises(
        ValueError, match=r"mixture index has shape \(4,\): it must be the labels', \(4, 2\)"
    ):
        q_target_cross_entropy(LOGITS, LABELS, mixed)


def test_another_ignore_index() -> None:
    labels = LABELS.clone()
    labels[1] = 7
    out = loss(labels=labels, ignore_index=7)
    assert not out[labels == 7].any() and out[labels != 7].all()


def test_second_derivatives_are_refused() -> None:
    leaf, scale = LOGITS.clone().requires_grad_(), torch.tensor(2.0, requires_grad=True)
    out = q_target_cross_entropy(leaf, LABELS, objectives.get("sft"))
    (grad,) = torch.autograd.grad(scale * out.loss.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_only_the_loss_carries_a_gradient() -> None:
    case = random_case("gift", 1, width=W, vocab_size=W, dtype=torch.float32, variant="rich")
    out = call(case, case.logits.clone().requires_grad_())
    assert out.loss.requires_grad
    assert not any(
        value.requires_grad
        for key, value in vars(out).items()
        if key != "loss" and value is not None
    )


def test_diagnostics_only_when_asked_for() -> None:
    assert (
        out := q_target_cross_entropy(LOGITS, LABELS, objectives.get("sft"))
    ).entropy is None and out.kl is None
    asked = q_target_cross_entropy(
        LOGITS, LABELS, objectives.get("sft"), diagnostics=["entropy", "kl"]
    )
    assert asked.entropy is not None and asked.kl is not None


def test_teacher_made_in_inference_mode() -> None:
    case = random_case("target-sft", 1, width=W, vocab_size=W, dtype=torch.float32, variant="plain")
    assert isinstance(case.teacher, Tensor)
    with torch.inference_mode():
        teacher = case.teacher * 1
    torch.testing.assert_close(run(replace(case, teacher=teacher))["grad"], run(case)["grad"])
