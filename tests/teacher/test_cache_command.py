"""tools/cache_teacher.py on a Hugging Face folder: what a dense forward of each conversation
says."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.data.teacher_rows import TeacherRows
from megatron_tsft.teacher.format import CARD_FILE, CacheCard
from megatron_tsft.teacher.reader import CachedTeacher, TeacherCache
from tests.teacher.caches import VOCABULARY, contents, load_tool, prepared
from tests.teacher.conftest import Home
from tests.training.runs import make_hf, make_tokenizer

TOOL = load_tool("cache_teacher")
K = 6
# fp32 logits of some tens, in batches of another shape: 2^-24 * 30 times what four layers add
NOISE = 1e-4
Cache = Callable[..., Path]


@pytest.fixture
def cache(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """cache(name, *flags, teacher=home.hf, data=[home.held]): run the command; the folder that it
    wrote."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the tool sets it; undone afterwards

    def run(
        name: str,
        *flags: object,
        teacher: Path = home.hf,
        data: Sequence[PreparedData] = (home.held,),
        k: int = K,
    ) -> Path:
        line = [
            "--teacher",
            teacher,
            "--data",
            *(part.directory for part in data),
            "--output",
            tmp_path / name,
        ]
        line += ["--top-k", k, "--device", "cpu", "--no-progress", *flags]
        assert TOOL.main([str(word) for word in line]) == 0
        return tmp_path / name

    return run


def dense(
    folder: Path, data: PreparedData, vocab_size: int = VOCABULARY, temperature: float = 1.0
) -> list[Any]:
    """(labels [n], log-probs [n, vocab_size] fp64) of each conversation's supervised tokens, one
    forward each."""
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    out = []
    for i in range(len(data)):
        sample = data.row(i)
        tokens = torch.from_numpy(sample.input_ids.astype(np.int64))
        with torch.no_grad():
            logits = model(tokens[None], use_cache=False).logits[0, :, :vocab_size]
        log_t = torch.log_softmax(logits.double() / temperature, -1)
        supervised = torch.from_numpy(np.flatnonzero(sample.loss_mask))
        out.append((tokens[supervised], log_t[supervised - 1]))
    return out


def check(
    directory: Path, data: PreparedData, expected: list[Any], k: int = K, noise: float = NOISE
) -> None:
    """The cache is the top-k of `expected`; rounding to fp16 is 2^-11 of a log-prob."""
    cache = TeacherCache.load(directory)
    cache.verify()
    teacher = CachedTeacher([cache], data)

    def close(found: np.ndarray, exact: torch.Tensor) -> None:
        exact = exact.clamp(min=float(np.finfo(np.float16).min))  # where there is no mass at all
        np.testing.assert_allclose(found.astype(np.float64), exact.numpy(), rtol=2**-11, atol=noise)

    for i, (labels, log_t) in enumerate(expected):
        rows: TeacherRows = teacher.rows(i)
        ids = torch.from_numpy(rows.ids.astype(np.int64))
        assert ids.shape == (len(labels), k) and len(labels) > 0
        close(rows.logprobs, log_t.topk(k).values)
        close(
            rows.logprobs, log_t.gather(1, ids)
        )  # the ids are those tokens', or others' as likely
        close(rows.label_logp, log_t.gather(1, labels[:, None])[:, 0])
        tail = log_t.scatter(1, ids, -torch.inf).logsumexp(-1)
        np.testing.assert_allclose(rows.tail_logmass, tail.numpy(), rtol=0, atol=noise)


@pytest.mark.parametrize("batch_tokens", [1, 70, 100000])
def test_it_is_the_dense_forward(home: Home, cache: Cache, batch_tokens: int) -> None:
    data = (home.train, home.both)
    directory = cache("cache", "--batch-tokens", batch_tokens, "--shard-bytes", 4000, data=data)
    for part in data:
        check(directory, part, dense(home.hf, part))
    card = CacheCard.load(directory)
    assert len(card.shards) > 3 and card.conversations == len(home.train) + len(home.both)
    assert (
        card.identity.teacher == "hf"
        and card.identity.dtype == "fp32"
        and card.identity.vocab_size == VOCABULARY
    )


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature(home: Home, cache: Cache, temperature: float) -> None:
    directory = cache("cache", "--temperature", temperature)
    check(directory, home.held, dense(home.hf, home.held, temperature=temperature))
    assert CacheCard.load(directory).identity.temperature == temperature


def test_vocab_size_leaves_the_rest_out(tmp_path: Path, cache: Cache) -> None:
    """A teacher with more columns than its tokenizer has tokens; they get no mass."""
    wide = make_hf(tmp_path / "hf", vocab_size=96)
    data = prepared(tmp_path, "data", 12, 4)
    check(cache("all", teacher=wide, data=[data]), data, dense(wide, data, 96))
    directory = cache("true", "--vocab-size", VOCABULARY, teacher=wide, data=[data])
    check(directory, data, dense(wide, data, VOCABULARY))
    assert CacheCard.load(directory).identity.vocab_size == VOCABULARY
    check(
        cache("k", "--vocab-size", VOCABULARY, teacher=wide, data=[data], k=500),
        data,
        dense(wide, data),
        VOCABULARY,
    )


def test_low_precision_is_what_was_asked_for(home: Home, cache: Cache) -> None:
    directory = cache("cache", "--dtype", "bf16")
    assert CacheCard.load(directory).identity.dtype == "bf16"
    assert contents(directory) != contents(cache("fp32"))


def permuted(folder: Path, tokens: list[int], columns: int) -> Path:
    """The model of make_hf whose token i of old is now tokens[i], of `columns`; the others are
    noise."""
    import transformers

    make_hf(folder, vocab_size=VOCABULARY)
    # Any: transformers declares its embeddings as modules of no kind
    model: Any = transformers.LlamaForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    place = torch.tensor(tokens)
    old = [
        layer.weight.detach().clone()
        for layer in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    model.resize_token_embeddings(columns, mean_resizing=False)
    with torch.no_grad():
        for before, layer in zip(
            old, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True
        ):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
            layer.weight[place] = before
    model.save_pretrained(str(folder))
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(
        [f"x{i}" for i in range(columns - VOCABULARY + 1)]
    )  # another tokenizer than the data's
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("columns", [VOCABULARY, 90])
def test_a_token_map_makes_a_permuted_teacher_the_same(
    home: Home, cache: Cache, tmp_path: Path, columns: int
) -> None:
    """Also where the teacher has tokens that the student lacks: they get no mass."""
    tokens = torch.randperm(columns, generator=torch.Generator().manual_seed(9))[
        :VOCABULARY
    ].tolist()
    teacher = permuted(tmp_path / "other", tokens, columns)
    (tmp_path / "map.json").write_text(json.dumps(tokens))
    flags = ("--token-map", tmp_path / "map.json", "--vocab-size", VOCABULARY)
    mapped = cache("mapped", *flags, teacher=teacher)
    check(mapped, home.held, dense(home.hf, home.held))
    plain, other = (
        CachedTeacher([TeacherCache.load(path)], home.held) for path in (cache("plain"), mapped)
    )
    for i in range(len(home.held)):
        assert np.array_equal(plain.rows(i).ids, other.rows(i).ids)
    hashes = [CacheCard.load(path).identity.token_map for path in (tmp_path / "plain", mapped)]
    assert hashes[0] is None and hashes[1] is not None


def test_tokens_without_a_counterpart_get_no_mass(home: Home, cache: Cache, tmp_path: Path) -> None:
    used = np.concatenate([home.held.row(i).input_ids for i in range(len(home.held))])
    absent = [token for token in range(VOCABULARY) if token not in used]
    assert 1 < len(absent) < 20
    (tmp_path / "map.json").write_text(
        json.dumps([-1 if token in absent else token for token in range(VOCABULARY)])
    )
    directory = cache("cache", "--token-map", tmp_path / "map.json", "--vocab-size", VOCABULARY)
    expected = []
    for labels, log_t in dense(home.hf, home.held):
        log_t[:, absent] = -torch.inf
        expected.append((labels, torch.log_softmax(log_t, -1)))
    check(directory, home.held, expected)


def test_refusals_are_one_line_and_leave_no_folder(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    other = make_hf(tmp_path / "hf")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["w60"])
    tokenizer.save_pretrained(str(other))
    data = prepared(tmp_path, "data", 5, 6)
    (tmp_path / "empty").mkdir()
    (tmp_path / "map.json").write_text(json.dumps([0, 0]))
    whole = {"--teacher": home.hf, "--data": home.held.directory, "--top-k": 4}
    cases: list[tuple[dict[str, object], str]] = [
        ({"--top-k": 0}, "--top-k 0: pass a positive number"),
        ({"--batch-tokens": 0}, "--batch-tokens 0: pass a positive number"),
        ({"--shard-bytes": -1}, "--shard-bytes -1: pass a positive number"),
        ({"--temperature": 0}, "--temperature 0.0: pass a positive number"),
        ({"--temperature": "nan"}, "--temperature nan: pass a positive number"),
        ({"--teacher": tmp_path / "empty"}, "is no teacher: it has neither"),
        ({"--tensor-model-parallel-size": 2}, "a Hugging Face teacher takes no Megatron flags"),
        ({"--data": tmp_path / "empty"}, "has no tsft_data.json"),
        ({"--teacher": other}, "has another tokenizer"),
        ({"--data": data.directory}, "was prepared with"),
        ({"--vocab-size": 68}, "the teacher's vocabulary is 67, pass at most that"),
        ({"--vocab-size": 5}, "beyond a vocabulary of 5: pass a larger one"),
        ({"--token-map": tmp_path / "map.json"}, "--token-map needs --vocab-size N"),
        (
            {"--token-map": tmp_path / "map.json", "--vocab-size": 67},
            "names the teacher's token 0 twice",
        ),
    ]
    capsys.readouterr()
    for change, match in cases:
        words = [str(word) for pair in (whole | change).items() for word in pair]
        assert TOOL.main([*words, "--output", str(tmp_path / "cache"), "--device", "cpu"]) == 2, (
            change
        )
        out, err = capsys.readouterr()
        assert not out and err.startswith("error: ") and err.count("\n") == 1 and match in err, (
            change,
            err,
        )
        assert not (tmp_path / "cache").exists()
    words = [str(word) for pair in whole.items() for word in pair]
    two = [
        *words[:3],
        str(home.held.directory),
        str(data.directory),
        *words[4:],
        "--output",
        str(tmp_path / "cache"),
    ]
    assert TOOL.main([*two, "--device", "cpu"]) == 2
    assert (
        "were prepared with different tokenizers: make a cache of each" in capsys.readouterr().err
    )


def test_it_says_what_it_writes(
    home: Home, cache: Cache, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    directory = cache("cache")
    out, tokens = capsys.readouterr().out, home.held.card.supervised_tokens
    assert (
        f"teacher {home.hf} (LlamaForCausalLM): top-{K} of {tokens} supervised tokens in 12"
        " distinct" in out
    )
    assert (
        f"wrote {directory}: 12 conversations, {tokens} supervised tokens, " in out
        and (directory / CARD_FILE).exists()
    )


def test_a_flipped_byte_of_the_weights_is_another_teacher(
    home: Home, cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = make_hf(tmp_path / "hf")
    one = CacheCard.load(cache("one", teacher=teacher)).identity
    assert (
        one.teacher_hash == CacheCard.load(cache("two")).identity.teacher_hash
    )  # the same weights elsewhere
    (weights,) = teacher.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    line = [
        "--teacher",
        teacher,
        "--data",
        home.held.directory,
        "--output",
        tmp_path / "one",
        "--top-k",
        K,
    ]
    assert TOOL.main([*map(str, line), "--device", "cpu"]) == 2
    assert (
        f"holds a teacher cache of another job (teacher_hash {one.teacher_hash}, now"
        in capsys.readouterr().err
    )


def test_other_weights_in_a_bin_file_are_another_teacher(
    home: Home, cache: Cache, tmp_path: Path
) -> None:
    import transformers

    hashes = set()
    for factor in (1.0, 1.5):
        teacher = make_hf(tmp_path / f"hf{factor}")
        model = transformers.LlamaForCausalLM.from_pretrained(str(teacher), dtype=torch.float32)
        (teacher / "model.safetensors").unlink()
        torch.save(
            {name: value * factor for name, value in model.state_dict().items()},
            teacher / "pytorch_model.bin",
        )
        hashes.add(CacheCard.load(cache(f"cache{factor}", teacher=teacher)).identity.teacher_hash)
    assert len(hashes) == 2
