"""A Hugging Face folder on disk: its config, its memory-mapped safetensors, its other files."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_tsft.checkpoint.architecture import value_of
from megatron_tsft.checkpoint.tokenizer import own_code
from megatron_tsft.errors import UserError
from megatron_tsft.inside import check_links, inside
from megatron_tsft.plain_json import read_object
from megatron_tsft.trust import trusted
from megatron_tsft.typed import Misfit, Parts, typed

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MORE = 10_000  # tensors that are missing and still looked for by name
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NO_WEIGHT = "rotary_emb.inv_freq"  # the end of the name of a buffer that old transformers saved
WEIGHT_SUFFIXES = {
    ".safetensors",
    ".bin",
    ".gguf",
    ".pt",
    ".pth",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ckpt",
    ".distcp",
}


@dataclass(frozen=True)
class HfTensor:
    """Where one tensor lies: its file, shape and dtype."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class HfWeights:
    """The tensors of a folder with `model.safetensors` or shards and their index, read slice by
    slice.

    The files are memory-mapped, so reading makes no anonymous memory beyond the slice that is
    returned.
    """

    def __init__(self, directory: Path) -> None:
        """Open every shard and read its header.

        Raises:
            UserError: no safetensors, a missing or damaged shard, an index that its shards
                contradict, or a dtype other than fp32, fp16, bf16.
        """
        self.directory = directory
        self.tensors: dict[str, HfTensor] = {}
        self._open: dict[Path, Any] = {}
        index = self._index()
        for file in sorted(
            {inside(directory, name) for name in index.values() or ["model.safetensors"]}
        ):
            if not file.is_file():
                raise UserError(
                    f"{file} is missing: the folder is incomplete, download or copy it again"
                )
            try:
                handle = safe_open(str(file), framework="pt")  # pyright: ignore[reportCallIssue]
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{file} is damaged ({error}): download or copy it again"
                ) from error
            self._open[file] = handle
            for name in handle.keys():
                view = handle.get_slice(name)
                if view.get_dtype() not in DTYPES:
                    raise UserError(
                        f"{name} in {file} is {view.get_dtype()}: save the model as F32, F16 or"
                        " BF16 first"
                    )
                if name in self.tensors:
                    raise UserError(
                        f"{name} is in {self.tensors[name].file} and in {file}: copy the folder"
                        " again"
                    )
                self.tensors[name] = HfTensor(
                    file, tuple(view.get_shape()), DTYPES[view.get_dtype()]
                )
        for name, file_name in index.items():
            if name not in self.tensors or self.tensors[name].file.name != file_name:
                raise UserError(
                    f"{name} is not in {directory / file_name}, where the index says: copy the"
                    " folder again"
                )

    def _index(self) -> dict[str, str]:
        """Tensor name -> file name; empty where `model.safetensors` is there, which wins."""
        if (self.directory / "model.safetensors").is_file():
            return {}
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            again = "download or copy it again"
            try:
                found = read_object(index, again).get("weight_map")
                return typed(found, dict[str, str], "weight_map")
            except Misfit as error:
                raise UserError(f"{index} is damaged ({error}): {again}") from error
        suffixes = {path.suffix for path in self.directory.iterdir()}
        load = "load it once with AutoModelForCausalLM.from_pretrained(DIR"
        if ".gguf" in suffixes:
            hint = (
                f"only .gguf files: {load}, gguf_file=NAME) and .save_pretrained(NEW_DIR), then"
                " import NEW_DIR"
            )
        elif suffixes & {".bin", ".pt", ".pth"}:
            hint = (
                f"only .bin files: {load}) and .save_pretrained(NEW_DIR), which writes safetensors"
            )
        else:
            hint = (
                "no model.safetensors and no model.safetensors.index.json: name the folder that"
                " holds them"
            )
        raise UserError(f"{self.directory} holds {hint}")

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of one tensor, in its own dtype."""
        return self._open[self.tensors[name].file].get_slice(name)[start:stop]


class ContentHash:
    """A hash of tensors' names and contents, however they are sharded into files."""

    def __init__(self) -> None:
        self._hashers: dict[str, Any] = {}

    def update(self, name: str, rows: torch.Tensor) -> None:
        """Add the next rows of one tensor: its rows come in order, the tensors in any."""
        hasher = self._hashers.setdefault(name, hashlib.sha256())
        hasher.update(rows.contiguous().view(torch.uint8).numpy())

    def digest(self) -> str:
        """16 hex digits over everything that was added."""
        parts = [[name, hasher.hexdigest()] for name, hasher in sorted(self._hashers.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def check_number(weights: HfWeights, number: int) -> None:
    """Refuse a model of many more tensors than there are, before each of them is given a name.

    Raises:
        UserError: config.json asks for `number`.
    """
    if number > len(weights.tensors) + MORE:
        raise UserError(
            f"{weights.directory} holds {len(weights.tensors)} tensors, its config.json asks for"
            f" {number}: its config.json and weights disagree"
        )


def check_tensors(weights: HfWeights, expected: dict[str, tuple[int, ...]], *, tied: bool) -> None:
    """Compare what the folder holds with what the family's table expects.

    tied: the model's head is its embedding; a copy that was saved, too, is left out.

    Raises:
        UserError: names the missing tensors, those that the table does not know, one of another
            shape, or a head that is no copy of the embedding (transformers then ties nothing).
    """
    present = {name for name in weights.tensors if not name.endswith(NO_WEIGHT)}
    if tied:
        present.discard(HEAD)
    for what, names in (
        ("missing", expected.keys() - present),
        ("unexpected", present - expected.keys()),
    ):
        if names:
            some = ", ".join(sorted(names)[:5])
            raise UserError(
                f"{weights.directory}: {len(names)} {what} tensors, e.g. {some}: its config.json"
                " and weights disagree"
            )
    for name, shape in expected.items():
        if weights.tensors[name].shape != shape:
            raise UserError(
                f"{weights.directory}: {name} is {weights.tensors[name].shape}, config.json says"
                f" {shape}: correct one of them"
            )
    if tied and HEAD in weights.tensors and not _same(weights, HEAD, EMBEDDING):
        raise UserError(
            f"{weights.directory}: config.json says tie_word_embeddings=true, but {HEAD} is not"
            f" {EMBEDDING}: say false there, or save the model without {HEAD}"
        )


def _same(weights: HfWeights, one: str, other: str, rows: int = 4096) -> bool:
    """Whether two tensors are equal, bit by bit and a few rows at a time."""
    left, right = weights.tensors[one], weights.tensors[other]
    return (left.shape, left.dtype) == (right.shape, right.dtype) and all(
        torch.equal(
            *(
                weights.read(name, start, start + rows).contiguous().view(torch.uint8)
                for name in (one, other)
            )
        )
        for start in range(0, left.shape[0], rows)
    )


def load_config(directory: Path) -> Any:
    """The transformers config of a local folder; never a hub, and none of the folder's own Python,
    unless folders are trusted.

    Raises:
        UserError: the folder or config.json is missing, or transformers cannot read it.
    """
    from transformers import AutoConfig

    if not directory.is_dir():
        raise UserError(f"{directory} does not exist: name a local Hugging Face folder")
    if (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{directory} holds a LoRA adapter: merge it into its model first (merge_and_unload of"
            " peft)"
        )
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory} has no config.json: name a Hugging Face model folder")
    values = read_object(path, "download or copy it again")
    if values.get("num_hidden_layers") is not None:
        # transformers makes a list of them
        value_of(SimpleNamespace(**values), "num_hidden_layers", Parts)
    try:
        return AutoConfig.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=trusted()
        )
    except (
        Exception
    ) as error:  # transformers raises its own, huggingface_hub's and json's errors for a bad config
        raise own_code(error, f"the config.json of {directory}") or UserError(
            f"{path} cannot be read ({' '.join(str(error).split())}): correct it, or download or"
            " copy it again"
        ) from error


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy what is not weights (config, tokenizer, templates, licence, ...); returns the names.

    Raises:
        UserError: one is a link that leaves the folder.
    """
    check_links(source)
    target.mkdir(parents=True, exist_ok=True)
    copied = []
    for path in sorted(source.iterdir()):
        if path.is_dir() and path.name == "additional_chat_templates":
            shutil.copytree(path, target / path.name)
        elif path.is_file() and not is_weight_file(path):
            shutil.copyfile(path, target / path.name)
        else:
            continue
        copied.append(path.name)
    return copied


def is_weight_file(path: Path) -> bool:
    """Whether a file holds weights or their index, or is hidden and so nothing of the model."""
    index = path.name.endswith(".index.json")
    return (
        index
        or path.suffix in WEIGHT_SUFFIXES
        or path.name.startswith(".")
        or path.name == "training_args.bin"
    )
