"""Nothing in a folder is run, and nothing outside of one is read, unless the user says --trust."""

import enum
import importlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_tsft.checkpoint.convert import export_hf, import_hf
from megatron_tsft.checkpoint.folder import latest_checkpoint, read_metadata
from megatron_tsft.checkpoint.pickles import OBJECTS, load_object
from megatron_tsft.checkpoint.saved_arguments import saved_arguments
from megatron_tsft.checkpoint.verify import verify
from megatron_tsft.data.prepare import prepare
from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.errors import UserError
from megatron_tsft.teacher.folder import read_megatron_folder
from megatron_tsft.trust import trusting
from tests.data.chat_tokenizers import byte_level

ROOT = Path(__file__).resolve().parents[2]
Make = Callable[..., Path]


class Payload:
    """A harmless stand-in for a hostile object: unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def imported(make_hf: Make, tmp_path: Path) -> Path:
    import_hf(make_hf(), tmp_path / "megatron", progress=False)
    return tmp_path / "megatron"


CALLS = r" is a pickle that would call posix\.mkdir.*--trust"
READERS: dict[str, Callable[[Path, Path], Any]] = {
    "export": lambda folder, out: export_hf(folder, out / "exported", progress=False),
    "verify": lambda folder, out: verify(out / "hf", folder, weights_only=True, progress=False),
    "run": lambda folder, out: latest_checkpoint(folder),
    "arguments": lambda folder, out: saved_arguments(folder / "release"),
    "teacher of a cache": lambda folder, out: read_megatron_folder(folder),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_description_that_would_run_something(
    imported: Path, tmp_path: Path, reader: str
) -> None:
    """`.metadata`, which every reader opens."""
    file = imported / "release" / ".metadata"
    file.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(UserError, match=rf"\.metadata{CALLS}"):
        READERS[reader](imported, tmp_path)
    assert not (tmp_path / "ran").exists()


def hide(imported: Path, payload: Any, key: str = "common_state") -> None:
    """Put an object in the place of one among a checkpoint's data."""
    checkpoint = imported / "release"
    described = read_metadata(checkpoint)
    index = next(i for i in described.storage_data if i.fqn.split("/")[0].endswith(key))
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    (checkpoint / "__9_0.distcp").write_bytes(buffer.getvalue())
    place = described.storage_data[index]
    described.storage_data[index] = type(place)("__9_0.distcp", 0, len(buffer.getvalue()))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(described))


@pytest.mark.parametrize(
    ("key", "nested"),
    [
        ("common_state", "plain"),
        ("common_state", "bytes in bytes"),
        ("_extra_state", "plain"),
        ("_extra_state", "bytes in bytes"),
        ("_extra_state", "a tensor of bytes"),
    ],
)
def test_an_object_that_would_run_something(
    imported: Path, tmp_path: Path, nested: str, key: str
) -> None:
    """Where Megatron, torch or Transformer Engine would unpickle it."""
    payload: Any = [Payload(tmp_path / "ran")]
    if nested == "bytes in bytes":
        inner = io.BytesIO()
        torch.save(payload, inner)
        payload = [{"state": inner}]
    elif nested == "a tensor of bytes":
        payload = torch.frombuffer(bytearray(pickle.dumps(payload)), dtype=torch.uint8)
    hide(imported, payload, key)
    with pytest.raises(UserError, match=rf"{key}.*{CALLS}"):
        latest_checkpoint(imported)
    assert not (tmp_path / "ran").exists()
    with trusting(True):
        latest_checkpoint(imported)
    assert not (tmp_path / "ran").exists()  # trusted is whoever loads it, and that is not us


def test_random_states_are_no_pickles(imported: Path) -> None:
    """Tensors of bytes, which are what they are."""
    hide(imported, [{"random": torch.get_rng_state(), "numpy": np.random.get_state()}])
    assert latest_checkpoint(imported) == imported / "release"


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "builtins.getattr", "torch.os.system", "torch.load"]
)
def test_names_that_would_lead_elsewhere(name: str) -> None:
    """Also dotted ones, which a pickle resolves through a module that is on the list."""
    module, _, attribute = name.partition(".")
    for words in (
        f"c{module}\n{attribute}\n.".encode(),
        b"\x80\x04" + _text(module) + _text(attribute) + b"\x93.",
    ):
        archive = io.BytesIO()
        torch.save(None, archive)
        with pytest.raises(pickle.UnpicklingError, match=attribute):
            load_object(_with_pickle(archive, words))


def _text(word: str) -> bytes:
    return b"\x8c" + bytes([len(word)]) + word.encode()


def _with_pickle(archive: io.BytesIO, words: bytes) -> io.BytesIO:
    """A file of torch.save with another pickle in it."""
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.namelist():
            new.writestr(entry, words if entry.endswith("data.pkl") else old.read(entry))
    return out


@pytest.mark.parametrize(
    "module",
    [
        "megatron.core.enums",
        "megatron.core.transformer.enums",
        "megatron.core.rerun_state_machine",
        "megatron.core.inference.config",
    ],
)
def test_megatrons_enumerations_are_on_the_list(module: str) -> None:
    found = {
        name
        for name, value in vars(importlib.import_module(module)).items()
        if isinstance(value, type) and issubclass(value, enum.Enum) and value.__module__ == module
    }
    assert found and found <= {name for home, name in OBJECTS if home == module}


def test_a_name_that_leaves_the_folder(imported: Path, make_hf: Make, tmp_path: Path) -> None:
    """In .metadata, an index, a card; by its path or by a link."""
    checkpoint = imported / "release"
    (data,) = checkpoint.glob("*.distcp")
    described = read_metadata(checkpoint)
    for name in (f"../../{data.name}", str(tmp_path / data.name)):
        shutil.copy(data, tmp_path / data.name)
        for index, place in described.storage_data.items():
            described.storage_data[index] = type(place)(name, place.offset, place.length)
        (checkpoint / ".metadata").write_bytes(pickle.dumps(described))
        with pytest.raises(UserError, match="lies outside of it: copy the file itself there"):
            latest_checkpoint(imported)
    sharded = make_hf(name="sharded", shard="60KB")
    index_file = sharded / "model.safetensors.index.json"
    values = json.loads(index_file.read_text())
    first = next(iter(values["weight_map"].values()))
    shutil.move(sharded / first, tmp_path / first)
    moved = {k: f"../{v}" if v == first else v for k, v in values["weight_map"].items()}
    index_file.write_text(json.dumps(values | {"weight_map": moved}))
    with pytest.raises(UserError, match="lies outside of it"):
        import_hf(sharded, tmp_path / "other", progress=False)
    index_file.write_text(json.dumps(values))
    (sharded / first).symlink_to(tmp_path / first)
    with pytest.raises(UserError, match="lies outside of it"):
        import_hf(sharded, tmp_path / "other", progress=False)
    with trusting(True):
        import_hf(sharded, tmp_path / "other", progress=False)


def test_a_prepared_folder_whose_card_leaves_it(tmp_path: Path) -> None:
    byte_level().save_pretrained(str(tmp_path / "tokenizer"))
    (tmp_path / "in.jsonl").write_text('{"prompt": "two", "completion": "five"}\n')
    prepare(tmp_path / "in.jsonl", tmp_path / "tokenizer", tmp_path / "data", progress=False)
    card = tmp_path / "data" / "tsft_data.json"
    values = json.loads(card.read_text())
    (name,) = values["files"]
    del values["checksum"]
    shutil.move(tmp_path / "data" / name, tmp_path / name)
    values["files"] = {f"../{name}": values["files"][name]}
    card.write_text(json.dumps(values))
    with pytest.raises(UserError, match="lies outside of it"):
        PreparedData.load(tmp_path / "data")


def test_a_link_to_elsewhere_is_not_copied(make_hf: Make, tmp_path: Path) -> None:
    source = make_hf()
    (tmp_path / "secret").write_text("secret")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"notes\.txt is named in .* and lies outside of it"):
        import_hf(source, tmp_path / "megatron", progress=False)
    assert not (tmp_path / "megatron").exists()
    (source / "notes.txt").unlink()
    (source / "notes.txt").symlink_to("config.json")  # within the folder
    import_hf(source, tmp_path / "megatron", progress=False)
    (tmp_path / "megatron" / "hf" / "more.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="lies outside of it"):
        export_hf(tmp_path / "megatron", tmp_path / "out", progress=False)


def test_the_hubs_cache_is_one_folder(make_hf: Make, tmp_path: Path) -> None:
    source = make_hf()
    cache = tmp_path / "models--some--model"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "abc").mkdir(parents=True)
    for number, file in enumerate(source.iterdir()):
        shutil.copy(file, cache / "blobs" / str(number))
        (cache / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{number}")
    import_hf(cache / "snapshots" / "abc", tmp_path / "megatron", progress=False)
    (tmp_path / "secret").write_text("secret")
    (cache / "snapshots" / "abc" / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="lies outside of it"):
        import_hf(cache / "snapshots" / "abc", tmp_path / "more", progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["import", "prepare"])
def test_a_tokenizers_own_python_is_not_run_and_nobody_is_asked(
    make_hf: Make, tmp_path: Path, tool: str
) -> None:
    """Not even where "y" waits on standard input."""
    source = make_hf()
    byte_level().save_pretrained(str(source))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "own.py").write_text(
        f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    (tmp_path / "in.jsonl").write_text('{"prompt": "two", "completion": "five"}\n')
    words = {
        "import": ["convert", "import", "--hf", str(source), "--megatron", str(tmp_path / "out")],
        "prepare": ["prepare", "--input", str(tmp_path / "in.jsonl"), "--tokenizer", str(source)]
        + ["--output", str(tmp_path / "out")],
    }[tool]
    line = "import sys; from megatron_tsft.commands.{} import main; sys.exit(main(sys.argv[1:]))"

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", line.format(words[0]), *words[1:], *more, "--no-progress"],
            input="y\ny\n",
            capture_output=True,
            text=True,
            env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
            cwd=ROOT,
        )

    done = run()
    assert done.returncode == 2 and "needs Python of its own, which was not run" in done.stderr
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
    done = run("--trust")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ran").exists()
