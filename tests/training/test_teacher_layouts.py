"""A teacher says the same in every layout, vocabulary and order, riding along or cached, also after
a resume."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tsft.checkpoint.convert import import_hf
from megatron_tsft.checkpoint.keys import checkpoint_keys
from megatron_tsft.data.prepare import prepare
from tests.training.runs import (
    Cache,
    Run,
    Train,
    World,
    check_ran,
    make_hf,
    make_tokenizer,
    write_rows,
)
from tests.training.test_teachers import HELD, WHOLE, Dense, agrees

KEYS = ("loss", "nll", "gamma", "entropy", "kl", "tokens", "grad_norm")


def same_rows(ours: Run, theirs: Run, tolerance: float = 3e-5) -> None:
    """Training and evaluation rows, step by step."""
    assert [row["step"] for row in ours.rows] == [row["step"] for row in theirs.rows]
    for a, b in zip(ours.rows + ours.heldout, theirs.rows + theirs.heldout, strict=True):
        for key in KEYS:
            if b.get(key) is not None:
                assert a[key] == pytest.approx(b[key], rel=tolerance), (
                    ours.save.name,
                    a["step"],
                    key,
                )


def online(teacher: Path) -> tuple[str, ...]:
    return ("--tsft-teacher", "model", "--tsft-teacher-load", str(teacher))


def cached(folder: Path) -> tuple[str, ...]:
    return ("--tsft-teacher", "cache", "--tsft-teacher-cache", str(folder))


@pytest.mark.slow
def test_a_deeper_and_wider_teacher_in_every_pipeline(
    train: Train, world: World, teacher: Path
) -> None:
    start = (*online(teacher), *HELD, str(world.held), "--eval-interval", "2")
    alone = check_ran(train("alone", *start, steps=4, keep=True))
    layouts = {
        "pp2": "--pipeline-model-parallel-size 2",
        "vpp2": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
        "dp2": "--use-distributed-optimizer",
        "uneven": "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1",
    }
    for name, flags in layouts.items():
        same_rows(
            check_ran(train(name, *start, *flags.split(), ranks=2, steps=4, keep=True)), alone
        )
        # the teacher is never saved with the student
        keys = checkpoint_keys(world.base / "release").keys()
        assert checkpoint_keys(alone.save.parent / name / "iter_0000004").keys() == keys

    # on resume it comes from its own folder again
    flags = layouts["vpp2"].split()
    check_ran(train("halves", *start, *flags, "--exit-interval", "2", ranks=2, steps=4, keep=True))
    halves = check_ran(train("halves", *start, *flags, ranks=2, steps=4, keep=True))
    same_rows(halves, alone)


@pytest.mark.slow
def test_one_cache_serves_every_length_order_and_layout(
    train: Train, world: World, teacher: Path, cache: Cache
) -> None:
    """The whole data set is one batch, so neither packs nor order may matter; 8 of 67 tokens are
    known."""
    tp2 = cache(teacher, "--tensor-model-parallel-size", "2", "--batch-tokens", "128", ranks=2)
    one = cache(teacher.parent / "teacher_hf", "--batch-tokens", "64")
    start = (*WHOLE, *HELD, str(world.held))
    first = check_ran(train("first", *start, *cached(tp2), steps=1))
    runs = {
        "long": (1, ("--seq-length", "256", "--global-batch-size", "6", "--seed", "5")),
        "pp2": (
            2,
            (
                "--pipeline-model-parallel-size",
                "2",
                "--seq-length",
                "96",
                "--global-batch-size",
                "14",
            ),
        ),
        "dp2": (
            2,
            (
                "--seed",
                "9",
            ),
        ),
        "tp2": (2, ("--tensor-model-parallel-size", "2", "--micro-batch-size", "1")),
    }
    for name, (ranks, flags) in runs.items():
        same_rows(check_ran(train(name, *start, *cached(tp2), *flags, ranks=ranks, steps=1)), first)
    # made by two data-parallel ranks, a shard each in turn
    two = cache(teacher, "--shard-bytes", "4000", "--batch-tokens", "128", ranks=2)
    assert len(list(two.glob("*.arrow"))) > 4
    same_rows(check_ran(train("two", *start, *cached(two), steps=1)), first, 1e-4)
    # made by transformers, one conversation after the
    # other: fp16 rounds to either side of the same number
    same_rows(check_ran(train("one", *start, *cached(one), steps=1)), first, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["target-sft", "kd"])
def test_all_tokens_cached_equal_the_riding_teacher(
    train: Train, world: World, teacher: Path, cache: Cache, objective: str
) -> None:
    everything = cache(teacher, top_k=67)
    flags = (*WHOLE, "--tsft-objective", objective)
    drop = ("--tsft-teacher-tail", "drop")
    ours = check_ran(train("cached", *flags, *cached(everything), *drop, steps=1)).rows[0]
    theirs = check_ran(train("online", *flags, *online(teacher), steps=1)).rows[0]
    for key in ("loss", "kl", "grad_norm"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key


@pytest.fixture(scope="module")
def wide(world: World) -> Path:
    """A teacher with more rows than the tokenizer has tokens: another padded vocabulary, the same
    tokens."""
    hf = make_hf(world.root / "wide_hf", vocab_size=150, num_hidden_layers=2)
    import_hf(hf, world.root / "wide", progress=False)
    return world.root / "wide"


@pytest.mark.slow
@pytest.mark.parametrize("fused", [(), ("--tsft-fuse-head",)], ids=["plain", "fused"])
def test_another_padded_vocabulary(
    train: Train, world: World, wide: Path, fused: tuple[str, ...]
) -> None:
    """Larger than the student's: its own extra columns get no mass. Smaller: what it lacks has
    none."""
    tp2 = ("--tensor-model-parallel-size", "2", *fused)
    larger = train("larger", *WHOLE, *online(wide), *tp2, ranks=2, steps=1)
    agrees(larger, "target-sft", Dense(world.train, world.hf, world.root / "wide_hf", columns=True))
    smaller = train(
        "smaller", *WHOLE, *online(world.base), "--tsft-model", str(wide), *tp2, ranks=2, steps=1
    )
    agrees(
        smaller, "target-sft", Dense(world.train, world.root / "wide_hf", world.hf, columns=True)
    )


@pytest.fixture(scope="module")
def renamed(world: World) -> tuple[Path, Path]:
    """The teacher of `teacher` with its tokens in another order, and the map that says so."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model: Any = AutoModelForCausalLM.from_pretrained(str(world.root / "teacher_hf"))
    order = torch.randperm(
        67, generator=torch.Generator().manual_seed(3)
    )  # new row i is the old row order[i]
    with torch.no_grad():
        for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
            weight.copy_(weight[order].clone())
    model.save_pretrained(str(world.root / "renamed_hf"))
    inner = json.loads(make_tokenizer().backend_tokenizer.to_str())
    new_id = torch.argsort(order).tolist()
    inner["model"]["vocab"] = {token: new_id[i] for token, i in inner["model"]["vocab"].items()}
    for token in inner["added_tokens"]:
        token["id"] = new_id[token["id"]]
    from tokenizers import Tokenizer

    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(inner)), **special
    ).save_pretrained(str(world.root / "renamed_hf"))
    import_hf(world.root / "renamed_hf", world.root / "renamed", progress=False)
    file = world.root / "map.json"
    file.write_text(json.dumps(new_id))
    return world.root / "renamed", file


@pytest.mark.slow
def test_another_tokenizer_needs_a_map(
    train: Train, world: World, teacher: Path, renamed: tuple[Path, Path], cache: Cache
) -> None:
    folder, file = renamed
    refused = train("refused", *online(folder))
    assert refused.codes == [2]
    for text in ("another tokenizer", "other tokens", "--tsft-teacher-token-map"):
        assert text in refused.error
    layout = ("--pipeline-model-parallel-size", "2")
    mapped = (*online(folder), "--tsft-teacher-token-map", str(file))
    same_rows(
        check_ran(train("mapped", *mapped, *layout, ranks=2)),
        check_ran(train("plain", *online(teacher))),
    )
    tp2 = ("--tensor-model-parallel-size", "2", "--token-map", str(file), "--vocab-size", "67")
    ours = check_ran(train("cache-mapped", *cached(cache(folder, *tp2, ranks=2))))
    same_rows(ours, check_ran(train("cache-plain", *cached(cache(teacher)))), 1e-4)


@pytest.mark.slow
def test_what_cannot_work_is_refused_by_name(
    train: Train, world: World, teacher: Path, cache: Cache
) -> None:
    hf = make_hf(
        world.root / "three_hf",
        num_hidden_layers=3,
        hidden_size=48,
        num_attention_heads=3,
        num_key_value_heads=3,
    )
    import_hf(hf, world.root / "three", progress=False)
    three = world.root / "three"
    import_hf(
        make_hf(world.root / "narrow_hf", vocab_size=60), world.root / "narrow", progress=False
    )
    narrow = world.root / "narrow"
    cases = {
        "load": (
            1,
            ("--tsft-teacher", "model"),
            ["--tsft-teacher model needs --tsft-teacher-load"],
        ),
        "cache": (
            1,
            ("--tsft-teacher", "cache"),
            ["--tsft-teacher cache needs --tsft-teacher-cache"],
        ),
        "stray": (
            1,
            ("--tsft-teacher", "none", "--tsft-teacher-load", str(teacher)),
            ["--tsft-teacher model", "none"],
        ),
        "layers": (
            2,
            (*online(three), "--pipeline-model-parallel-size", "2"),
            ["3 layers", "2 pipeline stages"],
        ),
        "heads": (
            2,
            (*online(three), "--tensor-model-parallel-size", "2"),
            ["3 attention heads", "does not divide"],
        ),
        "tail": (
            1,
            (*online(teacher), "--tsft-teacher-tail", "drop"),
            ["--tsft-teacher-tail", "--tsft-teacher cache"],
        ),
        "narrow": (1, online(narrow), ["token id 66", "ends at 59"]),
        "no-model": (1, online(world.root / "nowhere"), ["nowhere", "import"]),
        "no-cache": (1, cached(world.root / "nowhere"), ["nowhere", "cache_teacher"]),
        "map": (
            1,
            (*online(teacher), "--tsft-teacher-token-map", str(world.root / "none.json")),
            ["none.json", "JSON list"],
        ),
    }
    for name, (ranks, flags, texts) in cases.items():
        run = train(name, *flags, ranks=ranks)
        assert run.codes[0] == 2, (name, run.logs[0][-2000:])
        for text in texts:
            assert text in run.error, (name, run.error)

    folder = cache(teacher, "--batch-tokens", "256")
    shard = folder / "shard-00000.arrow"
    whole = shard.read_bytes()
    broken = bytearray(whole)
    broken[len(broken) // 2] ^= 1
    shard.write_bytes(broken)
    flipped = train("flipped", *cached(folder))
    shard.write_bytes(whole)
    assert flipped.codes == [2] and "shard-00000.arrow is damaged" in flipped.error


@pytest.mark.slow
def test_a_cache_of_more_rows_than_the_student_has(
    train: Train, world: World, wide: Path, cache: Cache
) -> None:
    """Refused where a record names such a row; with --vocab-size of the student it is the narrowed
    teacher."""
    refused = train("refused", *cached(cache(wide)))
    assert (
        refused.codes == [2]
        and "--vocab-size 67" in refused.error
        and "outside the vocabulary of 67" in refused.error
    )
    everything = cache(wide, "--vocab-size", "67", top_k=67)
    ours = check_ran(train("narrowed", *WHOLE, *cached(everything), steps=1)).rows[0]
    theirs = check_ran(train("online", *WHOLE, *online(wide), steps=1)).rows[0]
    for key in ("loss", "kl", "grad_norm"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key


@pytest.mark.slow
def test_a_data_set_that_reads_no_teacher_needs_no_records(
    train: Train, world: World, teacher: Path, cache: Cache
) -> None:
    """Packs of both kinds in one batch; the held-out data, by sft, is in no cache either."""
    other = prepare_rows(world, "untaught", 5)
    mixture = ("--tsft-data", f"{world.train}:0.5:kd", f"{other}:0.5:sft")
    evaluation = (
        "--tsft-eval-data",
        str(prepare_rows(world, "unseen", 6)),
        "--tsft-objective",
        "sft",
    )
    ours = check_ran(
        train("cached", *mixture, *cached(cache(teacher, top_k=67)), *evaluation, keep=True)
    )
    theirs = check_ran(train("online", *mixture, *online(teacher), *evaluation, keep=True))
    same_rows(ours, theirs, 1e-3)
    assert ours.rows[0]["tokens/untaught"] > 0 < ours.rows[0]["tokens/train"]


def prepare_rows(world: World, name: str, seed: int) -> Path:
    """Prepared rows of their own."""
    prepare(
        write_rows(world.root / f"{name}.jsonl", 30, seed),
        world.hf,
        world.root / name,
        progress=False,
    )
    return world.root / name
