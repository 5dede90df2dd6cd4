"""Which teacher a run gets: the named one, the one that a flag belongs to, else by one rule."""

from typing import Any

import pytest

from megatron_tsft import objectives
from megatron_tsft.errors import UserError
from megatron_tsft.plan.config import TsftConfig, destination
from megatron_tsft.plan.flags import Flags
from megatron_tsft.plan.run_objectives import RunObjectives
from megatron_tsft.plan.teachers import NAMES
from megatron_tsft.plan.teachers.choose import choose_kind, kinds


def chosen(*texts: str, **given: Any) -> str:
    """The kind of a run with these objectives and these --tsft-* flags."""
    members = [objectives.parse(text) for text in texts]
    run = RunObjectives([str(i) for i in range(len(members))], members, members[0])
    flags = {destination(name): value for name, value in given.items()}
    return choose_kind(TsftConfig.from_given(flags), Flags.of(flags), run).name


def test_the_names_are_the_kinds() -> None:
    assert list(NAMES) == list(kinds()) == [kind.name for kind in kinds().values()]


@pytest.mark.parametrize("name", objectives.names())
def test_every_objective_without_a_word(name: str) -> None:
    """The frozen start where one needs a teacher; an error where it learns from its teacher
    alone."""
    row = objectives.row(name)
    if name == "kd":
        with pytest.raises(UserError, match="'kd' needs a teacher, learns from it alone"):
            chosen(name)
        return
    reads = row.teacher != "none" or {"reference_logp_y", "sequence_log_ratio"} & set(row.needs)
    assert chosen(name) == ("reference" if reads else "none")


@pytest.mark.parametrize(
    ("texts", "kind"),
    [
        (["target-sft,eta=0"], "none"),
        (["target-sft,eta=1"], "reference"),
        (["target-sft,eta=linear:0:0.5:10"], "reference"),
        (["target-sft,eta=linear:0.5:0:10"], "reference"),
        (["target-sft,eta=0.5", "sft"], "reference"),  # README's mixture
        (["sft", "dft"], "none"),
    ],
)
def test_parameters_schedules_and_mixtures(texts: list[str], kind: str) -> None:
    assert chosen(*texts) == kind


def test_a_flag_says_which() -> None:
    assert chosen("sft-kl", teacher_load="big") == "model"
    assert chosen("kd", teacher_cache=["cache"]) == "cache"
    assert chosen("proximal", reference_refresh=50) == "reference"
    assert chosen("kd", teacher="reference") == "reference"
    assert chosen("asft", teacher="none") == "none"  # the loss says what is missing


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"teacher": "model"}, "--tsft-teacher model needs --tsft-teacher-load DIR"),
        ({"teacher": "cache"}, "--tsft-teacher cache needs --tsft-teacher-cache DIR"),
        (
            {"teacher": "reference", "teacher_load": "big"},
            "--tsft-teacher-load belongs to --tsft-teacher model, which is reference",
        ),
        (
            {"teacher_load": "big", "teacher_cache": ["cache"]},
            "--tsft-teacher-cache belongs to --tsft-teacher cache, which is model",
        ),
        ({"teacher": "none", "teacher_tail": "drop"}, "--tsft-teacher-tail belongs to"),
        ({"reference_refresh": -1}, "--tsft-reference-refresh -1: pass a number of steps"),
    ],
)
def test_what_does_not_go_together(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        chosen("target-sft", **given)
    assert words in str(caught.value) and "\n" not in str(caught.value)
