"""Hugging Face folder -> Megatron folder and back, in a stream: a few buffers of 32 MB."""

import dataclasses
import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_tsft.atomic import new_directory
from megatron_tsft.checkpoint.ahead import ahead
from megatron_tsft.checkpoint.architecture import value_of
from megatron_tsft.checkpoint.card import CARD_FILE, HF_FOLDER, ModelCard, list_around
from megatron_tsft.checkpoint.families import family_of
from megatron_tsft.checkpoint.folder import TRACKER, latest_checkpoint
from megatron_tsft.checkpoint.hf_folder import (
    ContentHash,
    HfWeights,
    check_number,
    check_tensors,
    copy_side_files,
    load_config,
)
from megatron_tsft.checkpoint.keys import compare_keys
from megatron_tsft.checkpoint.manifest import check_folder, data_files, write_list
from megatron_tsft.checkpoint.mapping import padded_vocab_size
from megatron_tsft.checkpoint.safetensors_stream import SafetensorsStream, TensorSpec
from megatron_tsft.checkpoint.served import Served
from megatron_tsft.checkpoint.tokenizer import has_tokenizer, load_tokenizer, tokenizer_fingerprint
from megatron_tsft.checkpoint.torch_dist import COMMON_STATE_KEY, common_state, write_checkpoint
from megatron_tsft.checkpoint.torch_dist_reader import CheckpointReader
from megatron_tsft.checkpoint.units import (
    ConversionUnit,
    boxes_of,
    count_tensors,
    expected_keys,
    extra_states,
    hf_shapes,
    pieces_of,
    units,
)
from megatron_tsft.errors import UserError
from megatron_tsft.plain_json import read_object
from megatron_tsft.typed import Count

VOCABULARY_MULTIPLE = 128  # Megatron's default of --make-vocab-size-divisible-by
SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def import_hf(
    hf_dir: Path | str, megatron_dir: Path | str, *, overwrite: bool = False, progress: bool = True
) -> ModelCard:
    """Write a Megatron folder (`release/`, tracker, model card, `hf/`) from a Hugging Face folder;
    its model card.

    Weights keep their dtype; Megatron casts when it loads. Nothing appears under `megatron_dir`
    before all is written.

    Raises:
        UserError: the folder is incomplete or its model is one that Megatron cannot express;
            nothing is written then.
    """
    hf_dir, megatron_dir = Path(hf_dir), Path(megatron_dir)
    _check_target(
        megatron_dir, hf_dir, overwrite, (CARD_FILE, "release")
    )  # a run's own folder has no release
    config = load_config(hf_dir)
    family = family_of(config)
    arguments, vocabulary = family.arguments(config), value_of(config, "vocab_size", Count)
    weights = HfWeights(hf_dir)
    card = ModelCard(
        family=family.name,
        architecture=config.architectures[0],
        megatron_arguments=arguments,
        vocab_size=vocabulary,
        make_vocab_size_divisible_by=VOCABULARY_MULTIPLE,
        padded_vocab_size=padded_vocab_size(vocabulary, VOCABULARY_MULTIPLE),
        dtype="",  # the weights decide these two, below
        source_hash="",
        tokenizer_fingerprint=_fingerprint(hf_dir),
    )
    check_number(weights, count_tensors(card))
    steps = units(card)
    names = hf_shapes(steps)
    check_tensors(weights, names, tied=card.tied)
    dtype, others = _dtypes(weights, list(names))
    total = sum(weights.tensors[name].bytes for name in names)
    _check_space(megatron_dir, total)

    content = ContentHash()
    with (
        new_directory(megatron_dir, overwrite=overwrite) as folder,
        tqdm(total=total, desc="import", unit="B", unit_scale=True, disable=not progress) as bar,
    ):

        def read(name: str, start: int, stop: int) -> torch.Tensor:
            rows = weights.read(name, start, stop)
            content.update(name, rows)
            bar.update(rows.nbytes)
            return rows

        stored = _stored_dtypes(weights, steps)
        boxes = [box for unit in steps for box in boxes_of(unit, stored[unit.row.megatron], read)]
        objects = dict.fromkeys(extra_states(card))
        write_checkpoint(
            folder / "release", boxes, objects | {COMMON_STATE_KEY: common_state(card)}
        )
        write_list(folder / "release", data_files(folder / "release"))
        copy_side_files(hf_dir, folder / HF_FOLDER)
        card = dataclasses.replace(
            card, dtype=dtype, other_dtypes=others, source_hash=content.digest()
        )
        card.save(folder)
        list_around(folder)
        (folder / TRACKER).write_text("release")
    return card


@dataclass(frozen=True)
class Export:
    """What `export_hf` wrote: from which checkpoint, how much, and in which dtype."""

    checkpoint: Path
    tensors: int
    bytes: int
    files: int
    dtype: str


def export_hf(
    megatron_dir: Path | str,
    hf_dir: Path | str,
    *,
    iteration: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    max_shard_bytes: float = 5e9,
    verify_files: str = "full",
) -> Export:
    """Write a Hugging Face folder from an imported or trained Megatron folder (any TP and PP,
    optimizer state or not).

    iteration: None takes the latest. dtype: bf16, fp16 or fp32; None takes the dtypes of the
    original weights, so an untouched model comes back bit by bit. verify_files: how the files are
    compared with their checksums, one of manifest.HOW. Nothing appears under `hf_dir` before all is
    written.

    Raises:
        UserError: no card, no complete checkpoint, one that does not fit the card, or an unknown
            dtype.
    """
    megatron_dir, hf_dir = Path(megatron_dir), Path(hf_dir)
    _check_target(hf_dir, megatron_dir, overwrite, ("config.json", "*.safetensors"))
    card = ModelCard.load(megatron_dir)
    again = f"copy the folder {HF_FOLDER} from the imported checkpoint"
    if not (megatron_dir / HF_FOLDER / "config.json").is_file():
        raise UserError(f"{megatron_dir} has no {HF_FOLDER}/config.json: {again}")
    served = Served.load(megatron_dir)
    one_dtype = None if dtype is None else _dtype_name(dtype)
    checkpoint = latest_checkpoint(megatron_dir, iteration)
    check_folder(megatron_dir, checkpoint, verify_files)
    config = read_object(megatron_dir / HF_FOLDER / "config.json", again)
    compare_keys(expected_keys(card), checkpoint)
    reader, steps = CheckpointReader(checkpoint), units(card)
    tensors = {
        name: TensorSpec(
            shape, getattr(torch, one_dtype or card.other_dtypes.get(name, card.dtype))
        )
        for name, shape in hf_shapes(steps).items()
    }
    nbytes = {name: tensor.bytes for name, tensor in tensors.items()}
    _check_space(hf_dir, sum(nbytes.values()))
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    files = _shard_files(steps, nbytes, max_shard_bytes)
    with (
        new_directory(hf_dir, overwrite=overwrite) as folder,
        tqdm(
            total=sum(nbytes.values()),
            desc="export",
            unit="B",
            unit_scale=True,
            disable=not progress,
        ) as bar,
    ):
        for file, shard in files.items():
            announced = {name: tensors[name] for unit in shard for name in unit.names}
            with SafetensorsStream(folder / file, announced) as stream:
                for piece in ahead(pieces_of(shard, reader, dtypes)):
                    stream.write(piece.name, piece.rows)
                    bar.update(piece.rows.nbytes)
        if len(files) > 1:
            where = {
                name: file for file, shard in files.items() for unit in shard for name in unit.names
            }
            index = {"metadata": {"total_size": sum(nbytes.values())}, "weight_map": where}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        copy_side_files(megatron_dir / HF_FOLDER, folder)
        # what may have changed; torch_dtype is for servers, dtype stands where it stood
        config |= {"dtype": one_dtype or card.dtype} if "dtype" in config else {}
        config |= {"torch_dtype": one_dtype or card.dtype, "vocab_size": card.vocab_size}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if served is not None:
            served.write_into(folder)
    return Export(
        checkpoint, len(tensors), sum(nbytes.values()), len(files), one_dtype or card.dtype
    )


def _shard_files(
    steps: list[ConversionUnit], nbytes: dict[str, int], max_shard_bytes: float
) -> dict[str, list[ConversionUnit]]:
    """File name -> its units, in order; a file exceeds `max_shard_bytes` only by a unit alone."""
    shards: list[list[ConversionUnit]] = [[]]
    used = 0
    for unit in steps:
        size = sum(nbytes[name] for name in unit.names)
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(unit)
        used += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard
        for i, shard in enumerate(shards)
    }


def _dtype_name(dtype: str) -> str:
    name = SHORT_DTYPES.get(dtype, dtype)
    if name not in SHORT_DTYPES.values():
        raise UserError(f"unknown dtype {dtype!r}: choose one of {', '.join(SHORT_DTYPES)}")
    return name


def _dtypes(weights: HfWeights, names: list[str]) -> tuple[str, dict[str, str]]:
    """The dtype of most bytes, and the tensors that have another one."""
    count: Counter[str] = Counter()
    dtypes = {name: str(weights.tensors[name].dtype).removeprefix("torch.") for name in names}
    for name, kind in dtypes.items():
        count[kind] += weights.tensors[name].bytes
    most = count.most_common(1)[0][0]
    return most, {name: kind for name, kind in dtypes.items() if kind != most}


def _stored_dtypes(weights: HfWeights, steps: list[ConversionUnit]) -> dict[str, torch.dtype]:
    """Megatron key -> the dtype that holds all its Hugging Face tensors (of all layers) exactly."""
    result: dict[str, torch.dtype] = {}
    for unit in steps:
        for name in unit.names:
            kind = weights.tensors[name].dtype
            result[unit.row.megatron] = torch.promote_types(
                result.get(unit.row.megatron, kind), kind
            )
    return result


def _fingerprint(hf_dir: Path) -> str | None:
    return tokenizer_fingerprint(load_tokenizer(hf_dir)) if has_tokenizer(hf_dir) else None


def _check_target(target: Path, source: Path, overwrite: bool, markers: tuple[str, ...]) -> None:
    """Refuse a target that would destroy something: `markers` match files that only such a folder
    has all of."""
    new, old = target.resolve(), source.resolve()
    if new == old or new in old.parents or old in new.parents:
        raise UserError(
            f"one of {target} and {source} lies in the other: write to a folder of its own"
        )
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file: name a folder")
    if target.is_dir() and any(target.iterdir()):
        missing = [marker for marker in markers if not any(target.glob(marker))]
        if missing:
            raise UserError(
                f"{target} holds other files and no {missing[0]}, so it is kept: name another"
                " folder"
            )
        if not overwrite:
            raise UserError(f"{target} exists already: name another folder, or pass --overwrite")


def _check_space(target: Path, needed: int) -> None:
    """Refuse to start without room for `needed` bytes of weights, with a margin for other files."""
    place = next(folder for folder in target.resolve().parents if folder.exists())
    free = shutil.disk_usage(place).free
    space = needed * 1.01 + 2**26
    if free < space:
        raise UserError(
            f"{place} has {free / 1e9:.2f} GB free, {target.name} needs {space / 1e9:.2f} GB: free"
            " some space or choose another disk"
        )
