"""A pack carries each conversation's records at its supervised positions, wherever it lies and
however it is cut."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from megatron_tsft.data.batch import MicroBatch
from megatron_tsft.data.packed_dataset import PackedDataset
from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.data.teacher_rows import TeacherRows
from megatron_tsft.errors import UserError
from megatron_tsft.teacher.reader import CachedTeacher
from tests.teacher.caches import record, same, write_cache
from tests.teacher.conftest import Home

K = 4
NAMES = ("teacher_ids", "teacher_logprobs", "teacher_label_logp", "teacher_tail_logmass")


@pytest.fixture(scope="module")
def teacher(home: Home, tmp_path_factory: pytest.TempPathFactory) -> CachedTeacher:
    directory = tmp_path_factory.mktemp("packs") / "cache"
    return CachedTeacher([write_cache(directory, [home.both, home.train], K, 2000)], home.train)


def packs_of(data: PreparedData, teacher: CachedTeacher | None, **options: Any) -> PackedDataset:
    given: dict[str, Any] = {"seq_length": 64, "global_batch_size": 4, "seed": 1}
    packs = PackedDataset(data, **(given | options))
    return packs.with_teacher(teacher, weighted=False)


def rows_at(item: dict[str, torch.Tensor], place: int) -> tuple[Any, ...]:
    return tuple(item[name][place].tolist() for name in NAMES)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    ("seq_length", "truncate", "multiple"),
    [
        (32, False, 1),
        (64, False, 1),
        (64, False, 16),
        (200, False, 1),
        (16, True, 1),
        (16, True, 4),
        (9, True, 1),
    ],
)
def test_records_lie_at_their_tokens(
    home: Home, teacher: CachedTeacher, seq_length: int, truncate: bool, multiple: int, seed: int
) -> None:
    data = home.train
    packs = packs_of(
        data,
        teacher,
        seq_length=seq_length,
        long_samples="truncate" if truncate else "refuse",
        seed=seed,
        document_multiple=multiple,
    )
    assert (packs.pieces.long > 0) == truncate
    taught = 0
    for index in range(
        packs.packs_per_epoch + 2
    ):  # with the masked packs at its end, and two of the next epoch
        item, at = packs[index], 0
        wanted: dict[int, tuple[Any, ...]] = {}
        for row in packs.rows(index):
            sample = data.row(row)
            # its k-th supervised token is predicted one position before it
            at_tokens = at - 1 + np.flatnonzero(sample.loss_mask)
            known = record(sample.sample_id, len(at_tokens), K)
            end = at + min(len(sample.input_ids) - 1, seq_length)
            for i, place in enumerate(at_tokens.tolist()):
                if place < end:
                    values = (known.ids, known.logprobs, known.label_logp, known.tail_logmass)
                    wanted[place] = tuple(value[i].tolist() for value in values)
            at += -(-(end - at) // multiple) * multiple
        assert torch.nonzero(item["labels"] != -100)[:, 0].tolist() == sorted(wanted)
        for place in range(seq_length):
            nothing = ([-1] * K, [-np.inf] * K, -np.inf, -np.inf)
            assert rows_at(item, place) == wanted.get(place, nothing)
        taught += len(wanted) if index < packs.packs_per_epoch else 0
    assert taught == packs.supervised.sum()


def test_the_packs_are_those_without_a_teacher(home: Home, teacher: CachedTeacher) -> None:
    plain, taught = packs_of(home.train, None), packs_of(home.train, teacher)
    for index in range(plain.packs_per_epoch):
        one, two = plain[index], taught[index]
        assert set(two) - set(one) == set(NAMES) and not set(one) - set(two)
        assert all(torch.equal(one[name], two[name]) for name in one)
        kinds = [two[name].dtype for name in NAMES]
        assert kinds == [torch.int32, torch.float16, torch.float16, torch.float32]


@pytest.mark.parametrize("tail", ["uniform", "drop"])
def test_a_micro_batch_has_the_records_of_its_packs(
    home: Home, teacher: CachedTeacher, tail: Any
) -> None:
    packs = packs_of(home.train, teacher)
    batch = MicroBatch.from_packs(default_collate([packs[0], packs[1], packs[2]]), "cpu", tail)
    found = batch.teacher
    assert found is not None and batch.teacher_tail == tail
    assert found.ids.shape == found.logprobs.shape == (1, 3 * 64, K)
    assert found.label_logp.shape == found.tail_logmass.shape == batch.labels.shape == (1, 3 * 64)
    for i in range(3):
        place = slice(64 * i, 64 * (i + 1))
        values = (found.ids, found.logprobs, found.label_logp, found.tail_logmass)
        for name, value in zip(NAMES, values, strict=True):
            assert torch.equal(value[0, place], packs[i][name])
    assert torch.equal((found.ids >= 0).all(-1), batch.labels != -100)
    assert (
        MicroBatch.from_packs(default_collate([packs_of(home.train, None)[0]]), "cpu").teacher
        is None
    )


def test_a_pickled_teacher_gives_the_same_rows(home: Home, tmp_path: Path) -> None:
    """What a loader's worker processes get: paths, not records."""
    caches = [
        write_cache(tmp_path / "n", [home.held], 3),
        write_cache(tmp_path / "w", [home.both], K),
    ]
    teacher = CachedTeacher(caches, home.both)
    sent = pickle.dumps(teacher)
    assert len(sent) < 2000
    other = pickle.loads(sent)
    assert isinstance(other, CachedTeacher) and other.top_k == K
    assert all(same(teacher.rows(i), other.rows(i)) for i in range(len(home.both)))
    packs = packs_of(home.both, teacher)
    again = pickle.loads(pickle.dumps(packs))
    assert all(torch.equal(packs[1][name], again[1][name]) for name in packs[1])


class Shifted:
    """A source whose rows are those of the next conversation."""

    top_k = K

    def __init__(self, teacher: CachedTeacher, rows: int) -> None:
        self.teacher, self.count = teacher, rows

    def rows(self, index: int) -> TeacherRows:
        return self.teacher.rows((index + 1) % self.count)


def test_the_record_of_another_conversation_is_refused(home: Home, teacher: CachedTeacher) -> None:
    packs = packs_of(home.train, None).with_teacher(
        Shifted(teacher, len(home.train)), weighted=False
    )
    with pytest.raises(
        UserError,
        match="record of conversation [0-9a-f]{32} has .* tokens, the conversation .*again",
    ):
        for index in range(packs.packs_per_epoch):
            packs[index]
