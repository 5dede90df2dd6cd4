"""`--tsft-data`: folders, their shares, their objectives, the names that metrics have."""

from pathlib import Path

import pytest

from megatron_tsft import objectives
from megatron_tsft.errors import UserError
from megatron_tsft.plan.sources import SYNTAX, Source, parse_sources


def test_a_folder_alone() -> None:
    assert parse_sources(["data/train"]) == [Source("data/train", 1.0, "", "train")]
    assert parse_sources(["data/train/"])[0].name == "train"
    assert parse_sources([]) == []


def test_shares_and_objectives() -> None:
    eta = "target-sft,eta=linear:0:0.5:1000"
    assert parse_sources([f"data/maths:0.7:{eta}", "chat:0.2", "code:3:sft", "rest::dft"]) == [
        Source("data/maths", 0.7, eta, "maths"),  # an objective's own colons stay in it
        Source("chat", 0.2, "", "chat"),
        Source("code", 3.0, "sft", "code"),
        Source("rest", 1.0, "dft", "rest"),
    ]
    objective = objectives.parse(parse_sources([f"data/maths:0.7:{eta}"])[0].objective)
    assert repr(objective) == "target-sft, eta=linear:0:0.5:1000"
    assert parse_sources(["a:1e-3"])[0].share == 0.001


def test_a_folder_with_a_colon_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "2024:05:train"
    folder.mkdir()
    assert parse_sources([str(folder)]) == [Source(str(folder), 1.0, "", "2024:05:train")]
    # where no such folder is, colons separate
    missing = str(tmp_path / "2023")
    assert parse_sources([f"{missing}:05:train"]) == [Source(missing, 5.0, "train", "2023")]


def test_equal_names_are_told_apart(tmp_path: Path) -> None:
    first, second, third = (str(tmp_path / name) for name in ("maths/train", "code/train", "chat"))
    sources = parse_sources([f"{first}:0.5", f"{second}:0.3:sft", f"{third}:0.2"])
    assert [source.name for source in sources] == [first, second, "chat"]
    assert [source.directory for source in sources] == [first, second, third]


def test_names_of_links_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two links to folders of one name, and a folder that is called as the first link."""
    for folder in ("q/train", "r/train", "z/a"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "a").symlink_to(tmp_path / "q/train")
    (tmp_path / "b").symlink_to(tmp_path / "r/train")
    monkeypatch.chdir(tmp_path)
    assert len({source.name for source in parse_sources(["a", "b", "z/a"])}) == 3


def test_the_name_is_the_folders_not_the_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train").mkdir()
    monkeypatch.chdir(tmp_path / "train")
    assert parse_sources(["."])[0].name == "train"
    assert parse_sources(["../train:0.5"])[0].name == "train"


@pytest.mark.parametrize(
    "share", ["0", "0.0", "-0.5", "nan", "inf", "-inf", "half", "0,7", "target-sft", " "]
)
def test_a_share_that_is_no_positive_number(share: str) -> None:
    with pytest.raises(UserError) as error:
        parse_sources(["a:0.5", f"data/maths:{share}:sft"])
    text = str(error.value)
    assert (
        f"--tsft-data data/maths:{share}:sft" in text
        and f"the share {share!r} is no positive number" in text
    )
    assert SYNTAX in text and "\n" not in text


def test_no_folder() -> None:
    for text in ("", ":0.5", ":0.5:sft"):
        with pytest.raises(UserError, match="--tsft-data"):
            parse_sources([text])


def test_a_folder_twice(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "train")
    train = str(tmp_path / "train")
    for again in (train, f"{train}:0.3:dft", f"{train}/../train", str(tmp_path / "link")):
        with pytest.raises(UserError) as error:
            parse_sources([f"{train}:0.7:sft", again])
        assert f"names {(tmp_path / 'train').resolve()} twice" in str(error.value)
