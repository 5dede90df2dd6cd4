"""The job and the folder it writes: what is counted, that it is the same every time, and that
damage is found."""

import copy
import gzip
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_tsft.checkpoint.tokenizer import tokenizer_fingerprint
from megatron_tsft.data import writer
from megatron_tsft.data.chat import ChatEncoder
from megatron_tsft.data.prepare import prepare
from megatron_tsft.data.prepared import CARD_FILE, DataCard, PreparedData, sample_id
from megatron_tsft.errors import UserError
from tests.data.chat_tokenizers import LLAMA3, assistant, byte_level, user

Rows = list[Any]
Prepare = Callable[..., DataCard]

GOOD: Rows = [
    {"messages": [user("one plus two?"), assistant("three")]},
    {
        "messages": [
            user("hello"),
            assistant("how are you today?"),
            user("fine"),
            assistant("thank you"),
        ]
    },
    {"prompt": "The answer", "completion": " is five."},
]


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    byte_level().save_pretrained(str(tmp_path / "tokenizer"))
    return tmp_path / "tokenizer"


@pytest.fixture
def run(tmp_path: Path, tokenizer_dir: Path) -> Prepare:
    """run(rows, name="out", **options): write rows (strings are raw lines) and prepare them."""

    def call(rows: Rows, name: str = "out", **options: Any) -> DataCard:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        options = {"progress": False, "max_refused": 1} | options
        return prepare(tmp_path / f"{name}.jsonl", tokenizer_dir, tmp_path / name, **options)

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_come_back_as_they_were_encoded(run: Prepare, tmp_path: Path) -> None:
    card = run(GOOD)
    data, encoder = PreparedData.load(tmp_path / "out"), ChatEncoder(byte_level())
    encoded = [encoder.encode(row) for row in GOOD]
    assert len(data) == 3 and data.lengths.dtype == np.int64
    assert data.lengths.tolist() == [len(row.input_ids) for row in encoded]
    for i, row in enumerate(encoded):
        sample = data.row(i)
        assert (
            np.array_equal(sample.input_ids, row.input_ids) and sample.input_ids.dtype == np.int32
        )
        assert (
            np.array_equal(sample.loss_mask, row.loss_mask) and sample.loss_mask.dtype == np.bool_
        )
        assert sample.token_weights is None
        assert (
            sample.sample_id == sample_id(row.input_ids, row.loss_mask)
            and len(sample.sample_id) == 32
        )
        assert (
            not sample.input_ids.flags.owndata and not sample.input_ids.flags.writeable
        )  # a view of the file
    for index in (-1, 3):
        with pytest.raises(IndexError):
            data.row(index)
    assert card == data.card == DataCard.load(tmp_path / "out")
    assert card.tokenizer_fingerprint == tokenizer_fingerprint(byte_level())
    assert card.vocab_size == max(int(row.input_ids.max()) for row in encoded) + 1
    assert card.conversations == 3 and card.tokens == sum(len(row.input_ids) for row in encoded)
    assert card.supervised_tokens == sum(int(row.loss_mask.sum()) for row in encoded)
    assert card.longest == max(len(row.input_ids) for row in encoded)
    assert not card.weighted and not card.refused and card.duplicates == card.truncated == 0
    assert sorted(card.files) == [path.name for path in (tmp_path / "out").glob("*.arrow")]


def test_datasets_opens_the_folder(run: Prepare, tmp_path: Path) -> None:
    from datasets import Dataset

    run(GOOD)
    data = Dataset.load_from_disk(str(tmp_path / "out"))
    assert data.column_names == ["sample_id", "length", "input_ids", "loss_mask"]
    assert data[1]["input_ids"] == PreparedData.load(tmp_path / "out").row(1).input_ids.tolist()


def test_many_batches_and_files(
    run: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of any batch and file are found, also with the weights of some of them."""
    monkeypatch.setattr(writer, "BATCH_ROWS", 7)
    monkeypatch.setattr(writer, "FILE_BYTES", 4000)
    rows = [
        {"prompt": "two", "completion": " five" * (i % 5 + 1) + f" {i}", "weight": i / 4}
        for i in range(100)
    ]
    rows[13] = {"prompt": "two", "completion": " six"}
    card = run(rows)
    assert len(card.files) > 2 and card.weighted
    data, encoder = PreparedData.load(tmp_path / "out"), ChatEncoder(byte_level())
    again = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 1000  # the path, not the tokens
    for i in np.random.default_rng(0).permutation(100).tolist():
        sample, row = data.row(i), encoder.encode(rows[i])
        assert np.array_equal(sample.input_ids, row.input_ids)
        expected = row.loss_mask.astype(np.float32) if i == 13 else row.token_weights
        assert expected is not None and sample.token_weights is not None
        assert sample.token_weights.dtype == np.float32
        assert np.array_equal(sample.token_weights, expected)
        assert again.row(i).sample_id == sample.sample_id


def test_the_folder_is_the_same_every_time(run: Prepare, tmp_path: Path) -> None:
    rows = GOOD * 3 + ["{"] + GOOD
    run(rows)
    run(rows, "again", progress=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_two_workers_write_what_one_writes(run: Prepare, tmp_path: Path) -> None:
    rows = [row | {"weight": i % 3} for i, row in enumerate(GOOD * 100)] + ["{", "[]"]  # 5 blocks
    one, two = run(rows), run(rows, "two", workers=2)
    assert one == two and one.conversations == 300 and sum(one.refused.values()) == 2
    assert contents(tmp_path / "out") == contents(tmp_path / "two")


def test_sample_ids_tell_tokens_and_masks_apart_but_not_weights(
    run: Prepare, tmp_path: Path
) -> None:
    first, second = GOOD[1]["messages"][:2], GOOD[1]["messages"][2:]
    rows = [
        GOOD[1],
        GOOD[1] | {"weight": 0.5},
        {"prompt": first + second[:1], "completion": second[1:]},  # the same tokens, another mask
        GOOD[0],
        GOOD[1],
    ]
    card = run(rows)
    data = PreparedData.load(tmp_path / "out")
    ids = [data.row(i).sample_id for i in range(5)]
    assert ids[0] == ids[1] == ids[4] and len(set(ids)) == 3
    assert np.array_equal(data.row(0).input_ids, data.row(2).input_ids)
    assert card.duplicates == 2 and card.conversations == 5
    pinned = sample_id(np.array([3, 1, 2]), np.array([False, True, True]))  # on every machine
    assert pinned == "072bb66ddfc1338b9bb51e1c5144ac09"
    assert run(rows[::-1], "other").fingerprint != card.fingerprint


def test_refused_rows_are_counted_with_their_lines(run: Prepare) -> None:
    rows: Rows = [
        GOOD[0],
        "{",
        "",
        GOOD[1],
        "[1]",
        *["{]"] * 7,
        {"messages": [user("two")]},
        {"txt": "two"},
    ]
    card = run(rows)
    assert card.conversations == 2
    assert card.refused == {
        "bad JSON": 8,
        "not a JSON object": 1,
        "no assistant turn": 1,
        "neither `messages`, nor `prompt` and `completion`, nor `text`": 1,
    }
    assert list(card.refused_lines.values()) == [[2, 6, 7, 8, 9], [5], [13], [14]]


def test_strict_stops_at_the_first_refused_row(run: Prepare, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"out.jsonl, line 2: bad JSON \(Expecting property name"):
        run([GOOD[0], "{", GOOD[1]], strict=True)
    with pytest.raises(UserError, match="out.jsonl, line 3: no assistant turn"):
        run([GOOD[0], "", {"messages": [user("two")]}, "{"], strict=True, workers=2)
    assert not (tmp_path / "out").exists()


def test_nothing_left(run: Prepare) -> None:
    with pytest.raises(
        UserError, match=r"refused: bad JSON \(2, the first in line 1\); no assistant turn \(1, "
    ):
        run(["{", "{", {"messages": []}])
    with pytest.raises(UserError, match="it is empty"):
        run([])


def test_long_conversations(run: Prepare, tmp_path: Path) -> None:
    """The first is within the limit, the second is cut in its answer, the third in its prompt."""
    rows = [
        {"prompt": "two", "completion": " five"},
        {"prompt": "two", "completion": " five" * 20, "critical": [[0, 100]]},
        {"prompt": " five" * 20, "completion": " two"},
    ]
    encoded = [ChatEncoder(byte_level()).encode(row) for row in rows]
    limit = len(encoded[0].input_ids) + 4
    card = run(rows, max_tokens=limit)
    data = PreparedData.load(tmp_path / "out")
    assert card.truncated == 1 and card.longest == limit and card.conversations == 2
    assert card.refused_lines == {f"no supervised token within --max-tokens {limit}": [3]}
    cut = data.row(1)
    assert np.array_equal(cut.input_ids, encoded[1].input_ids[:limit])
    assert np.array_equal(cut.loss_mask, encoded[1].loss_mask[:limit])
    assert cut.token_weights is not None and cut.token_weights.sum() == cut.loss_mask.sum()
    assert cut.sample_id == sample_id(cut.input_ids, cut.loss_mask)
    card = run(rows, "refused", max_tokens=limit, too_long="refuse")
    assert card.truncated == 0 and card.refused_lines == {
        f"longer than --max-tokens {limit}": [2, 3]
    }
    assert not card.weighted  # the only row with `critical` was refused
    whole = run(rows, "whole", max_tokens=max(len(row.input_ids) for row in encoded))
    assert whole.truncated == 0 and whole.conversations == 3


def test_other_inputs_give_the_same_folder(
    run: Prepare, tmp_path: Path, tokenizer_dir: Path
) -> None:
    """A gzip file and a saved data set, whose rows have nulls for missing keys."""
    from datasets import Dataset, DatasetDict

    card = run(GOOD[:2] + [{"messages": []}])
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress((tmp_path / "out.jsonl").read_bytes()))
    assert (
        prepare(
            tmp_path / "in.jsonl.gz",
            tokenizer_dir,
            tmp_path / "zip",
            max_refused=1,
            progress=False,
        )
        == card
    )
    rows = [{"messages": row["messages"], "weight": None} for row in GOOD[:2]] + [
        {"messages": [], "weight": None}
    ]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    options: dict[str, Any] = {"max_refused": 1, "progress": False}
    assert prepare(tmp_path / "saved", tokenizer_dir, tmp_path / "set", **options) == card
    for kind in ("pandas", "numpy", "arrow"):  # a data set says how it wants to be read
        folder = tmp_path / f"saved-{kind}"
        Dataset.from_list(rows).with_format(kind).save_to_disk(str(folder))
        assert prepare(folder, tokenizer_dir, tmp_path / kind, **options) == card
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(
        UserError, match=r"holds several splits: name the folder of one of them \(train\)"
    ):
        prepare(tmp_path / "splits", tokenizer_dir, tmp_path / "no", progress=False)
    (tmp_path / "in.jsonl.gz").write_bytes((tmp_path / "in.jsonl.gz").read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot be unpacked"):
        prepare(tmp_path / "in.jsonl.gz", tokenizer_dir, tmp_path / "no", progress=False)


def test_bad_arguments(run: Prepare, tmp_path: Path, tokenizer_dir: Path) -> None:
    for options, message in (
        ({"max_tokens": 1}, "--max-tokens 1: must be at least 2"),
        ({"too_long": "cut"}, "must be one of truncate, refuse"),
        ({"workers": 0}, "--workers 0"),
    ):
        with pytest.raises(UserError, match=message):
            run(GOOD, **options)
    with pytest.raises(
        UserError, match="does not exist: name a JSONL, JSON, Parquet or Arrow file"
    ):
        prepare(tmp_path / "missing.jsonl", tokenizer_dir, tmp_path / "out")
    with pytest.raises(UserError, match="has no file that ends in .jsonl"):
        (tmp_path / "empty").mkdir()
        prepare(tmp_path / "empty", tokenizer_dir, tmp_path / "out")
    with pytest.raises(UserError, match="no conversation that can be used"):
        prepare(tokenizer_dir, tokenizer_dir, tmp_path / "out", progress=False)
    with pytest.raises(UserError, match="first `hf download someone/chats --repo-type dataset"):
        prepare("someone/chats", tokenizer_dir, tmp_path / "out")
    with pytest.raises(UserError, match="tokenizer folder"):
        prepare(tmp_path / "out.jsonl", tmp_path / "missing", tmp_path / "out")
    byte_level(None).save_pretrained(str(tmp_path / "plain"))
    with pytest.raises(UserError, match=r"plain has no chat template"):
        prepare(tmp_path / "out.jsonl", tmp_path / "plain", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_an_output_is_never_destroyed_by_accident(
    run: Prepare, tmp_path: Path, tokenizer_dir: Path
) -> None:
    run(GOOD)
    with pytest.raises(UserError, match="exists already"):
        run(GOOD[:1])
    assert len(PreparedData.load(tmp_path / "out")) == 3
    run(GOOD[:1], overwrite=True)
    assert len(PreparedData.load(tmp_path / "out")) == 1
    with pytest.raises(UserError, match="bad JSON"):
        run(["{"], overwrite=True)
    assert (
        len(PreparedData.load(tmp_path / "out")) == 1
    )  # what was there stays until the new one is complete
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="so it is not overwritten"):
        run(GOOD, "notes", overwrite=True)
    with pytest.raises(UserError, match="holds the input"):
        prepare(tmp_path / "out.jsonl", tokenizer_dir, tmp_path, overwrite=True)
    with pytest.raises(UserError, match="holds the input"):
        prepare(tmp_path / "out.jsonl", tokenizer_dir, tokenizer_dir, overwrite=True)


def damage(path: Path, place: int, *, flip: bool = True) -> None:
    """Flip the bits of one byte, or cut the file there."""
    content = bytearray(path.read_bytes())
    content[place:] = bytes([content[place] ^ 0xFF]) + content[place + 1 :] if flip else b""
    path.write_bytes(content)


def test_every_kind_of_damage_is_a_users_error(run: Prepare, tmp_path: Path) -> None:
    run([row | {"weight": 1} for row in GOOD * 20], "whole")
    (file,) = (tmp_path / "whole").glob("*.arrow")
    content = file.read_bytes()
    places = {
        "has 100 bytes instead of": 100,  # within the schema
        f"has {len(content) // 2} bytes": len(content) // 2,
        f"has {len(content) - 1} bytes": len(content) - 1,
    }
    for message, place in places.items():
        shutil.copytree(tmp_path / "whole", tmp_path / "bad", dirs_exist_ok=True)
        damage(tmp_path / "bad" / file.name, place, flip=False)
        with pytest.raises(UserError, match=f"{message}.*prepare the data again"):
            PreparedData.load(tmp_path / "bad")
    (tmp_path / "bad" / file.name).unlink()
    with pytest.raises(UserError, match="is missing"):
        PreparedData.load(tmp_path / "bad")
    (tmp_path / "bad" / CARD_FILE).unlink()
    with pytest.raises(UserError, match="has no tsft_data.json"):
        PreparedData.load(tmp_path / "bad")


@pytest.mark.parametrize("weighted", [False, True])
def test_a_flipped_byte_never_passes_as_data(run: Prepare, tmp_path: Path, weighted: bool) -> None:
    """At any place: it is refused at load or at its row, or what is read is still what was
    written."""
    extra: list[dict[str, Any]] = [{"weight": i / 4} if weighted else {} for i in range(20)]
    run([row | weight for weight in extra for row in GOOD])
    (file,) = (tmp_path / "out").glob("*.arrow")
    whole = PreparedData.load(tmp_path / "out")
    rows = [whole.row(i) for i in range(60)]
    truth = [
        (row.input_ids.copy(), row.loss_mask.copy(), copy.deepcopy(row.token_weights))
        for row in rows
    ]
    content, found = file.read_bytes(), {"load": 0, "row": 0}
    del whole, rows
    for place in range(0, len(content), len(content) // 400):
        file.write_bytes(content)
        damage(file, place)
        try:
            data = PreparedData.load(tmp_path / "out")
        except UserError:
            found["load"] += 1
            continue
        for i, (ids, mask, weights) in enumerate(truth):
            try:
                sample = data.row(i)
            except UserError:
                found["row"] += 1
            else:
                assert np.array_equal(sample.input_ids, ids), place
                assert np.array_equal(sample.loss_mask, mask), place
                if weights is not None and sample.token_weights is not None:
                    assert np.array_equal(
                        sample.token_weights.view(np.int32), weights.view(np.int32)
                    )
        del data
    assert found["load"] > 20 and found["row"] > 20


def test_a_card_of_another_version_or_data_set(run: Prepare, tmp_path: Path) -> None:
    run(GOOD)
    path = tmp_path / "out" / CARD_FILE
    card = json.loads(path.read_text())
    path.write_text(json.dumps(card | {"supervised_tokens": 1}))  # nothing else says how many
    with pytest.raises(UserError, match="its checksum differs.*prepare the data again"):
        PreparedData.load(tmp_path / "out")
    del card["checksum"]  # as earlier cards have none
    for change, message in (
        ({"format_version": 1}, "format version 1, not 2"),
        ({"unknown": 1}, "unknown"),
        ({"conversations": 4}, "does not hold the 4 conversations of its card"),
        ({"tokens": 4}, "does not hold"),
        ({"fingerprint": "0" * 32}, "does not hold"),
        ({"files": {}}, "names no Arrow file"),
        ({"weighted": True}, "cannot be read"),
    ):
        path.write_text(json.dumps(card | change))
        with pytest.raises(UserError, match=message):
            PreparedData.load(tmp_path / "out")
    for wrong in (1, card["vocab_size"] + 1, 2**62):
        path.write_text(json.dumps(card | {"vocab_size": wrong}))
        with pytest.raises(UserError, match=f"its card says vocab_size={wrong}"):
            PreparedData.load(tmp_path / "out").used_tokens()
    path.write_text("{")
    with pytest.raises(UserError, match="is damaged .*prepare the data again"):
        DataCard.load(tmp_path / "out")


def test_another_template_is_another_data_set(run: Prepare, tmp_path: Path) -> None:
    card = run(GOOD)
    byte_level(LLAMA3).save_pretrained(str(tmp_path / "llama"))
    other = prepare(tmp_path / "out.jsonl", tmp_path / "llama", tmp_path / "other", progress=False)
    assert (
        other.fingerprint != card.fingerprint
        and other.tokenizer_fingerprint != card.tokenizer_fingerprint
    )


def test_a_file_that_is_cut_while_it_is_read(run: Prepare, tmp_path: Path) -> None:
    """The mapped pages behind the cut would end the process."""
    card = run(GOOD)
    data, (name, size) = PreparedData.load(tmp_path / "out"), next(iter(card.files.items()))
    data.row(0)
    os.truncate(tmp_path / "out" / name, size // 2)
    with pytest.raises(UserError, match=f"{name} was cut from {size} to {size // 2} bytes"):
        data.row(0)
