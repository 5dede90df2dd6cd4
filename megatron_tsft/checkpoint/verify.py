"""Is a Megatron folder the same model as a Hugging Face folder? Tensors, logits and tokenizer."""

import math
import operator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from megatron_tsft.checkpoint.ahead import ahead
from megatron_tsft.checkpoint.architecture import value_of
from megatron_tsft.checkpoint.card import HF_FOLDER, ModelCard
from megatron_tsft.checkpoint.families import family_of
from megatron_tsft.checkpoint.folder import latest_checkpoint
from megatron_tsft.checkpoint.hf_folder import HfWeights, check_number, check_tensors, load_config
from megatron_tsft.checkpoint.keys import compare_keys
from megatron_tsft.checkpoint.logits import LogitDifference, compare_logits
from megatron_tsft.checkpoint.manifest import check_folder
from megatron_tsft.checkpoint.mapping import model_shapes
from megatron_tsft.checkpoint.tokenizer import has_tokenizer, load_tokenizer, tokenizer_fingerprint
from megatron_tsft.checkpoint.torch_dist_reader import CheckpointReader
from megatron_tsft.checkpoint.units import (
    Piece,
    count_tensors,
    expected_keys,
    hf_shapes,
    pieces_of,
    units,
)
from megatron_tsft.errors import UserError
from megatron_tsft.typed import Count

# tokens of the text that are compared: attention on CPU needs heads * positions^2 numbers
MAX_POSITIONS = 1024
LOGIT_TOLERANCE = 1e-4  # fp32 on both sides, relative to max(1, largest |logit|)
TEXT = """The planet turns once in 24 hours, so the sun seems to rise at 06:12 and to set at 17:58.
How far is 3.5 miles? It is 3.5 * 1.609 = 5.63 kilometres; a runner needs about 28 minutes.
"Is that fast?" she asked. — Not really!

def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0

Der Fluß ist 1.233 km lang.
L'été dernier, nous avons marché jusqu'à la mer. 今日は天気がいいですね。
Спасибо за помощь! 🙂
"""


@dataclass(frozen=True)
class Verification:
    """What a comparison of two folders gave.

    Attributes:
        tensors: how many were compared.
        different: the tensors that differ.
        logits: None where they were not compared.
        rounded: tensors that agree once the checkpoint's numbers have the file's dtype.
        why_no_logits: why they were not compared.
        tokenizer: what is wrong with it, "" for nothing; None where neither folder has one.
        config: what config.json says otherwise than the model card.
    """

    tensors: int
    different: list[str]
    logits: LogitDifference | None
    rounded: list[str] = field(default_factory=list)
    why_no_logits: str = ""
    tokenizer: str | None = None
    config: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Tensors, configs and tokenizers agree; so do logits, if any, to LOGIT_TOLERANCE."""
        close = self.logits is None or self.logits.max_difference <= LOGIT_TOLERANCE * max(
            1.0, self.logits.max_logit
        )
        return close and not (self.different or self.tokenizer or self.config)

    @property
    def summary(self) -> str:
        """Everything in one line."""
        parts = [
            f"{self.tensors - len(self.different) - len(self.rounded)} of {self.tensors} tensors"
            " are identical"
        ]
        if self.rounded:
            parts[0] += f", {len(self.rounded)} after rounding to the file's dtype"
        if self.logits is None:
            parts.append(f"logits not compared ({self.why_no_logits})")
        else:
            it = self.logits
            worst = max(range(len(it.layers)), key=lambda layer: it.layers[layer])
            parts.append(
                f"logits at {it.positions} positions differ by at most {it.max_difference:.1e}"
                f" (largest {it.max_logit:.1f}), same argmax at {100 * it.argmax_agreement:.2f}%,"
                f" worst layer {worst + 1} of {len(it.layers)}: {it.layers[worst]:.1e}"
                + ("" if math.isfinite(it.max_difference) else " (some logits are not finite)")
            )
        if self.config:
            parts.append(f"config.json: {', '.join(self.config)}")
        parts.append(
            {None: "no tokenizer", "": "same tokenizer"}.get(
                self.tokenizer, f"tokenizer: {self.tokenizer}"
            )
        )
        return f"the models {'agree' if self.passed else 'DIFFER'}: {'; '.join(parts)}"


def verify(
    hf_dir: Path | str,
    megatron_dir: Path | str,
    text_file: Path | str | None = None,
    *,
    iteration: int | None = None,
    weights_only: bool = False,
    progress: bool = True,
    verify_files: str = "full",
) -> Verification:
    """Compare a checkpoint of `megatron_dir` with `hf_dir`: tensors in a stream, then logits on a
    text.

    text_file: None takes a short text of ours (random tokens where the folder has no tokenizer).
    Logits need the model in memory as fp32; where it does not fit, a given text is an error, ours
    is left out. iteration: None is the latest. verify_files: how the files are compared with their
    checksums, one of manifest.HOW.

    Raises:
        UserError: one of the folders is incomplete, the checkpoint does not fit its card, or the
            memory does not suffice for the given text.
    """
    hf_dir, megatron_dir = Path(hf_dir), Path(megatron_dir)
    card, checkpoint = ModelCard.load(megatron_dir), latest_checkpoint(megatron_dir, iteration)
    check_folder(megatron_dir, checkpoint, verify_files)
    compare_keys(expected_keys(card), checkpoint)
    hf_config = load_config(hf_dir)
    if (hf_config.architectures or [None])[0] != card.architecture:
        raise UserError(
            f"{hf_dir} holds {hf_config.architectures}, {megatron_dir} was made from"
            f" {card.architecture}: name the two folders of one model"
        )
    weights, reader = HfWeights(hf_dir), CheckpointReader(checkpoint)
    check_number(weights, count_tensors(card))
    steps = units(card)
    names = hf_shapes(steps)
    check_tensors(weights, names, tied=card.tied)
    total = sum(weights.tensors[name].bytes for name in names)
    parameters = sum(torch.Size(shape).numel() for shape in names.values())
    config, same_shapes = _compare_configs(hf_config, card)
    input_ids, why = None, "--weights-only"
    if not weights_only:
        input_ids = _tokens(hf_dir, None if text_file is None else Path(text_file), card)
        why = _too_large(parameters, input_ids, card)
        if why and text_file is not None:
            raise UserError(f"{why}: leave --text out, or use a machine with more memory")
        why = why or ("" if same_shapes else "config.json asks for other shapes")
    tokenizer = _compare_tokenizers(hf_dir, megatron_dir / HF_FOLDER, card)
    unequal: dict[str, bool] = {}  # name -> whether rounding explains all of it
    with tqdm(total=total, desc="verify", unit="B", unit_scale=True, disable=not progress) as bar:
        for piece in ahead(pieces_of(steps, reader)):
            theirs = weights.read(piece.name, piece.start, piece.start + len(piece.rows))
            same, exact = _compare(piece, theirs)
            if not exact:
                unequal[piece.name] = same and unequal.get(piece.name, True)
            bar.update(theirs.nbytes)
    different, rounded = (
        [name for name, same in unequal.items() if same is kind] for kind in (False, True)
    )
    logits = None
    if input_ids is not None and not why:
        kinds = {weights.tensors[name].dtype for name in names}
        if rounded and len(kinds) > 1:
            why = "the file rounds to several dtypes"
        else:
            to = kinds.pop() if rounded else None
            logits = compare_logits(
                hf_dir, megatron_dir, input_ids, iteration=iteration, rounded_to=to
            )
    return Verification(len(names), different, logits, rounded, why, tokenizer, config)


def _compare_configs(config: Any, card: ModelCard) -> tuple[list[str], bool]:
    """What config.json says otherwise than the model card, in Megatron's words; and whether its
    shapes are the same."""
    family = family_of(config)
    theirs = family.arguments(config)
    theirs |= {"vocab_size": value_of(config, "vocab_size", Count)}
    ours = card.megatron_arguments | {"vocab_size": card.vocab_size}
    names = sorted(
        name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)
    )
    shapes = (
        model_shapes(family, args, args["vocab_size"], card.padded_vocab_size)
        for args in (theirs, ours)
    )
    differences = [
        f"{name} is {theirs.get(name)}, in the checkpoint {ours.get(name)}" for name in names
    ]
    return differences, operator.eq(*shapes)


def _compare(piece: Piece, theirs: torch.Tensor) -> tuple[bool, bool]:
    """(the same bits in the file's dtype, and nothing was rounded for it); a key may be stored
    wider than its file."""
    ours = piece.rows.to(theirs.dtype)
    same = torch.equal(ours.view(torch.uint8), theirs.contiguous().view(torch.uint8))
    exact = theirs.dtype == piece.rows.dtype or torch.equal(ours.to(piece.rows.dtype), piece.rows)
    return same, same and exact


def _too_large(parameters: int, input_ids: torch.Tensor, card: ModelCard) -> str:
    """Why the logits cannot be computed here, or ""."""
    length, arguments = input_ids.shape[1], card.megatron_arguments
    attention = 3 * arguments["num_attention_heads"] * length * length
    outputs = arguments["num_layers"] * length * arguments["hidden_size"]
    needed = 4 * (parameters + 3 * length * card.padded_vocab_size + attention + outputs)
    free = psutil.virtual_memory().available
    if needed < free:
        return ""
    return f"the model in fp32 needs {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free"


def _tokens(hf_dir: Path, text_file: Path | None, card: ModelCard) -> torch.Tensor:
    """The first tokens of the text: [1, s] int64."""
    limit = min(MAX_POSITIONS, card.megatron_arguments["max_position_embeddings"])
    if text_file is None and not has_tokenizer(hf_dir):
        return torch.randint(
            card.vocab_size, (1, min(limit, 256)), generator=torch.Generator().manual_seed(0)
        )
    if text_file is not None and not text_file.is_file():
        raise UserError(f"{text_file} does not exist: name a text file")
    if not has_tokenizer(hf_dir):
        raise UserError(f"{hf_dir} has no tokenizer: leave --text out")
    try:
        text = TEXT if text_file is None else text_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{text_file} is no text in UTF-8 ({error}): name another file") from error
    ids = load_tokenizer(hf_dir)(text)["input_ids"]
    if ids and max(ids) >= card.vocab_size:
        raise UserError(
            f"the tokenizer of {hf_dir} makes id {max(ids)}, the model's vocabulary ends at"
            f" {card.vocab_size - 1}"
        )
    if len(ids) < 2:
        raise UserError(f"{text_file} has {len(ids)} tokens: give a longer text")
    return torch.tensor([ids[:limit]])


def _compare_tokenizers(hf_dir: Path, side_files: Path, card: ModelCard) -> str | None:
    """What differs between the two folders' tokenizers: "" for nothing, None where neither has
    one."""
    if not has_tokenizer(hf_dir) and card.tokenizer_fingerprint is None:
        return None
    for folder in (hf_dir, side_files):
        if not has_tokenizer(folder):
            return f"{folder} has none"
    theirs, ours = load_tokenizer(hf_dir), load_tokenizer(side_files)
    if tokenizer_fingerprint(ours) != card.tokenizer_fingerprint:
        return f"{side_files} has another one than the model card"
    ids = theirs(TEXT)["input_ids"]
    if (
        tokenizer_fingerprint(theirs) != card.tokenizer_fingerprint
        or ours(TEXT)["input_ids"] != ids
    ):
        return "other tokens for the same text"
    if ours.decode(ids) != theirs.decode(ids):
        return "another text for the same tokens"
    return "" if ours.chat_template == theirs.chat_template else "another chat template"
