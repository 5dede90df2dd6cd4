"""Packs hold whole conversations, labels shifted inside each; item i depends on the seed and i, and
on nothing else."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.data import default_collate

from megatron_tsft.data.batch import MicroBatch
from megatron_tsft.data.packed_dataset import PackedDataset
from megatron_tsft.data.prepare import prepare
from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.data.teacher_rows import TeacherRows, absent_rows
from megatron_tsft.errors import UserError
from tests.training.runs import make_tokenizer, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packed")
    make_tokenizer().save_pretrained(str(root / "tokenizer"))
    prepare(
        write_rows(root / "rows.jsonl", 40, 0), root / "tokenizer", root / "plain", progress=False
    )
    rows = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row["weight"] = float(i)
    (root / "weighted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(root / "weighted.jsonl", root / "tokenizer", root / "weighted", progress=False)
    return root


def packed(data: PreparedData, **options: object) -> PackedDataset:
    return PackedDataset(data, **({"seq_length": 64, "global_batch_size": 4, "seed": 1} | options))  # type: ignore[arg-type]


def documents(item: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """A pack cut at its positions of 0."""
    starts = torch.nonzero(item["position_ids"] == 0)[:, 0].tolist() + [len(item["tokens"])]
    names = [name for name in item if name != "index"]
    return [
        {name: item[name][a:b] for name in names} for a, b in zip(starts, starts[1:], strict=False)
    ]


@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_an_epoch_is_every_conversation_once_with_its_own_labels(
    folder: Path, multiple: int
) -> None:
    data = PreparedData.load(folder / "plain")
    packs = packed(data, document_multiple=multiple)
    assert packs.packs_per_epoch % 4 == 0 and packs.packs_per_epoch - packs.packs < 4
    seen: Counter[tuple[int, ...]] = Counter()
    for index in range(packs.packs_per_epoch):
        item = packs[index]
        assert {len(item[name]) for name in ("tokens", "labels", "position_ids")} == {64}
        assert packs.supervised_tokens(index) == int((item["labels"] != -100).sum())
        for document in documents(item):
            labels, tokens = document["labels"], document["tokens"]
            assert document["position_ids"].tolist() == list(range(len(tokens)))
            assert len(tokens) % multiple == 0
            known = labels != -100
            # every row ends with a supervised token: what
            # follows is padding, less than one multiple
            if known.any():
                end = int(torch.nonzero(known)[-1]) + 1
                assert len(tokens) - end < multiple and not tokens[end:].any()
                labels, tokens, known = labels[:end], tokens[:end], known[:end]
            # the label of a position is the next token of the same conversation
            assert torch.equal(labels[:-1][known[:-1]], tokens[1:][known[:-1]])
            if known.any():
                seen[(*tokens.tolist(), int(labels[-1]))] += 1
    expected = Counter(tuple(data.row(i).input_ids.tolist()) for i in range(len(data)))
    assert seen == expected
    supervised = sum(int((packs[i]["labels"] != -100).sum()) for i in range(packs.packs_per_epoch))
    assert supervised == packs.supervised.sum() == data.card.supervised_tokens


def test_the_ragged_end_is_masked(folder: Path) -> None:
    packs = packed(PreparedData.load(folder / "plain"), global_batch_size=64)
    last = packs[packs.packs_per_epoch - 1]
    assert packs.rows(packs.packs_per_epoch - 1) == []
    assert (last["labels"] == -100).all() and last["position_ids"].tolist() == list(range(64))
    assert packs.rows(packs.packs_per_epoch) != []  # the next epoch begins


def test_items_do_not_depend_on_who_asks_or_when(folder: Path) -> None:
    data = PreparedData.load(folder / "plain")
    forwards, other = packed(data), packed(PreparedData.load(folder / "plain"))
    wanted = [0, 7, 3 * forwards.packs_per_epoch + 2, 1]
    for index in wanted:
        one, two = forwards[index], other[index]
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert forwards.rows(0) != forwards.rows(forwards.packs_per_epoch)  # a new order each epoch
    still = packed(data, shuffle=False)
    assert still.rows(2) == still.rows(still.packs_per_epoch + 2)
    assert packed(data, seed=2).rows(0) != forwards.rows(0)


@pytest.mark.parametrize("multiple", [1, 8])
def test_weights_follow_their_tokens(folder: Path, multiple: int) -> None:
    data = PreparedData.load(folder / "weighted")
    packs = packed(data, document_multiple=multiple)
    rows = packs.rows(0)
    item = packs[0]
    at = 0
    for row in rows:
        n = len(data.row(row).input_ids) - 1
        weights, labels = item["token_weights"][at : at + n], item["labels"][at : at + n]
        assert (weights[labels != -100] == float(row)).all() and (labels != -100).any()
        at += -(-n // multiple) * multiple
    assert "token_weights" not in packed(PreparedData.load(folder / "plain"))[0]


def test_too_long_is_refused_or_cut_and_counted(folder: Path) -> None:
    data = PreparedData.load(folder / "plain")
    long = int((data.lengths > 17).sum())
    assert 0 < long < len(data)
    with pytest.raises(
        UserError, match=rf"{long} of 40 .* 17 tokens .*--seq-length is 16.*truncate"
    ):
        packed(data, seq_length=16)
    cut = packed(data, seq_length=16, long_samples="truncate")
    assert cut.pieces.long == long
    row = int(data.lengths.argmax())
    index = next(i for i in range(cut.packs) if row in cut.rows(i))
    assert torch.equal(
        cut[index]["tokens"], torch.from_numpy(data.row(row).input_ids[:16].astype("int64"))
    )
    assert cut.supervised.sum() < data.card.supervised_tokens
    for index in range(cut.packs):
        assert cut.supervised_tokens(index) == int((cut[index]["labels"] != -100).sum())


class SaysTheLabel:
    """A teacher whose first alternative is the token that its record belongs to."""

    top_k = 2

    def __init__(self, data: PreparedData) -> None:
        self.data = data

    def rows(self, index: int) -> TeacherRows:
        sample = self.data.row(index)
        labels = sample.input_ids[sample.loss_mask]
        records = absent_rows(len(labels), self.top_k)
        records.ids[:, 0] = labels
        return records


def test_long_documents_are_split_and_every_token_is_predicted_once(
    folder: Path, tmp_path: Path
) -> None:
    rows = [{"text": "one two three four five " * n, "weight": float(n)} for n in (1, 7, 20)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(tmp_path / "in.jsonl", folder / "tokenizer", tmp_path / "text", progress=False)
    data = PreparedData.load(tmp_path / "text")
    packs = packed(data, seq_length=16, long_samples="split", global_batch_size=1)
    packs = packs.with_teacher(SaysTheLabel(data), weighted=True)
    found: Counter[tuple[int, int, int]] = Counter()
    for index in range(packs.packs):
        item = packs[index]
        assert packs.supervised_tokens(index) == int((item["labels"] != -100).sum())
        known = item["labels"] != -100
        assert torch.equal(item["teacher_ids"][known, 0].long(), item["labels"][known])
        for name, label, weight in zip(
            item["tokens"][known], item["labels"][known], item["token_weights"][known], strict=True
        ):
            found[int(name), int(label), int(weight)] += 1
    wanted: Counter[tuple[int, int, int]] = Counter()
    for number, row in enumerate(rows):
        ids = data.row(number).input_ids.tolist()
        wanted.update((a, b, int(row["weight"])) for a, b in zip(ids, ids[1:], strict=False))
    assert found == wanted and packs.pieces.split and packs.pieces.long == 2
    with pytest.raises(UserError, match="of them are not plain text, whose pieces would lack"):
        packed(PreparedData.load(folder / "plain"), seq_length=16, long_samples="split")


def test_a_micro_batch_lays_packs_end_to_end(folder: Path) -> None:
    packs = packed(PreparedData.load(folder / "plain"))
    batch = MicroBatch.from_packs(default_collate([packs[0], packs[1]]), "cpu")
    assert batch.tokens.shape == batch.labels.shape == batch.sequence_ids.shape == (1, 128)
    assert sum(batch.lengths) == 128 and batch.num_sequences == len(batch.lengths)
    assert batch.index == [0, 1] and batch.token_weights is None
    assert len(documents(packs[0])) + len(documents(packs[1])) == batch.num_sequences
    expected = torch.repeat_interleave(
        torch.arange(batch.num_sequences), torch.tensor(batch.lengths)
    )
    assert torch.equal(batch.sequence_ids[0], expected)
    assert torch.equal(batch.tokens[0, 64:], packs[1]["tokens"])
