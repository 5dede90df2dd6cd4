"""tools/inspect_cache.py says what is in a cache and which data it covers; its exit status says
whether it does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.teacher.format import CARD_FILE
from tests.teacher.caches import VOCABULARY, load_tool, predictions, write_cache
from tests.teacher.conftest import Home

TOOL = load_tool("inspect_cache")
K = 4


@pytest.fixture(scope="module")
def cache(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inspect") / "cache"
    write_cache(directory, [home.both], K, 1500)
    return directory


def inspect(cache: Path, out: Path, *data: PreparedData) -> tuple[int, dict[str, Any]]:
    """(exit status, its JSON)."""
    places = ["--data", *(str(part.directory) for part in data)] if data else []
    code = TOOL.main([str(cache), *places, "--json", str(out), "--no-progress"])
    return code, json.loads(out.read_text())


def test_what_the_cache_holds(home: Home, cache: Path, tmp_path: Path) -> None:
    code, facts = inspect(cache, tmp_path / "facts.json")
    assert code == 0 and facts["coverage"] == []
    tokens, size = (
        home.both.card.supervised_tokens,
        sum(path.stat().st_size for path in cache.glob("shard-*.arrow")),
    )
    assert (facts["conversations"], facts["tokens"], facts["bytes"]) == (
        len(home.both),
        tokens,
        size,
    )
    assert facts["shards"] == len(list(cache.glob("shard-*.arrow"))) > 1
    assert facts["bytes_per_token"] == size / tokens and facts["bytes_per_entry"] == size / (
        tokens * K
    )
    card = json.loads((cache / CARD_FILE).read_text())["identity"]
    for name in (
        "teacher",
        "teacher_hash",
        "tokenizer_fingerprint",
        "vocab_size",
        "top_k",
        "temperature",
        "dtype",
    ):
        assert facts[name] == card[name]
    assert facts["vocab_size"] == VOCABULARY and facts["token_map"] is None


def test_the_tail_masses(home: Home, cache: Path, tmp_path: Path) -> None:
    facts = inspect(cache, tmp_path / "facts.json")[1]["tail_mass"]
    masses = []
    for name, n in zip(
        home.both.sample_ids.to_pylist(), home.both.supervised().tolist(), strict=True
    ):
        exact = predictions(name, n, K)
        masses += (
            1 - exact.logprobs.exp().sum(1)
        ).tolist()  # fp64: exact enough to be sorted into these bins
    edges, counts = facts["histogram"]["edges"], facts["histogram"]["counts"]
    assert (
        len(counts) == len(edges) - 1
        and sum(counts) == len(masses) == home.both.card.supervised_tokens
    )
    assert (
        counts == np.histogram(np.clip(masses, 0, 1), edges)[0].tolist()
        and sum(c > 0 for c in counts) > 2
    )
    # fp32 log-masses down to -30: 2^-24 * 30
    np.testing.assert_allclose(facts["mean"], np.mean(masses), rtol=2e-6)
    np.testing.assert_allclose(facts["p99"], np.quantile(masses, 0.99), rtol=2e-6)


def test_a_cache_of_the_whole_vocabulary_has_only_empty_tails(home: Home, tmp_path: Path) -> None:
    write_cache(tmp_path / "cache", [home.held], VOCABULARY)
    facts = inspect(tmp_path / "cache", tmp_path / "facts.json")[1]["tail_mass"]
    assert (
        facts["mean"] == 0 and facts["histogram"]["counts"][0] == home.held.card.supervised_tokens
    )


def test_coverage_and_the_exit_status(
    home: Home, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, facts = inspect(cache, tmp_path / "facts.json", home.both, home.held)
    assert code == 0
    both, held = facts["coverage"]
    assert (both["found"], both["conversations"], both["first_missing"]) == (21, 21, None)
    assert (held["found"], held["conversations"], held["first_missing"]) == (12, 12, None)
    assert (
        both["made_for_it"]
        and not held["made_for_it"]
        and both["same_tokenizer"]
        and held["same_tokenizer"]
    )
    assert (
        both["data"] == str(home.both.directory)
        and both["fingerprint"] == home.both.card.fingerprint
    )

    write_cache(tmp_path / "part", [home.held], K)
    capsys.readouterr()
    code, facts = inspect(tmp_path / "part", tmp_path / "facts.json", home.held, home.both)
    first = home.both.sample_ids[0].as_py()
    assert code == 1 and [part["found"] for part in facts["coverage"]] == [12, 12]
    assert [part["first_missing"] for part in facts["coverage"]] == [None, first]
    out = capsys.readouterr().out
    assert (
        f"{home.both.directory}: 12 of 21 conversations (not made for it); the first one without a"
        f" record: {first}\n" in out
    )
    assert f"{home.held.directory}: 12 of 12 conversations (made for it)\n" in out


def test_another_tokenizer_covers_nothing(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = write_cache(tmp_path / "cache", [home.held], K).directory
    card = json.loads((cache / CARD_FILE).read_text())
    card["identity"]["tokenizer_fingerprint"] = "f" * 16
    del card["checksum"]
    (cache / CARD_FILE).write_text(json.dumps(card))
    code, facts = inspect(cache, tmp_path / "facts.json", home.held)
    assert (
        code == 1
        and facts["coverage"][0]["found"] == 12
        and not facts["coverage"][0]["same_tokenizer"]
    )
    assert "ANOTHER TOKENIZER" in capsys.readouterr().out


def test_damage_is_an_error_of_one_line(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = write_cache(tmp_path / "cache", [home.held], K).directory
    content = bytearray((cache / "shard-00000.arrow").read_bytes())
    content[len(content) // 2] ^= 4
    (cache / "shard-00000.arrow").write_bytes(content)
    for folder, match in (
        (cache, "shard-00000.arrow is damaged"),
        (tmp_path / "nowhere", "has no tsft_teacher.json"),
    ):
        capsys.readouterr()
        assert TOOL.main([str(folder), "--no-progress"]) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("error: ") and err.count("\n") == 1 and match in err
