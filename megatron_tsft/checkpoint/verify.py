"""Is a Megatron folder the same model as a Hugging Face folder? Every tensor bit by bit, and logits on a text."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_tsft.checkpoint.card import ModelCard
from megatron_tsft.checkpoint.folder import latest_checkpoint
from megatron_tsft.checkpoint.hf_folder import HfWeights, check_tensors
from megatron_tsft.checkpoint.keys import compare_keys
from megatron_tsft.checkpoint.logits import LogitDifference, compare_logits
from megatron_tsft.checkpoint.mapping import Shape
from megatron_tsft.checkpoint.tokenizer import load_tokenizer
from megatron_tsft.checkpoint.torch_dist import CheckpointReader
from megatron_tsft.checkpoint.units import expected_keys, hf_shapes, read_unit, units
from megatron_tsft.errors import UserError

MAX_POSITIONS = 1024  # tokens of the text that are compared: attention on CPU needs heads * positions^2 numbers
LOGIT_TOLERANCE = 1e-4  # fp32 on both sides, relative to max(1, largest |logit|)


@dataclass(frozen=True)
class Verification:
    """tensors: how many were compared bit by bit. different: those that differ. logits: None without a text."""

    tensors: int
    different: list[str]
    logits: LogitDifference | None

    @property
    def passed(self) -> bool:
        """Every bit is the same and, where a text was given, so are the logits within LOGIT_TOLERANCE."""
        close = self.logits is None or self.logits.max_difference <= LOGIT_TOLERANCE * max(1.0, self.logits.max_logit)
        return not self.different and close


def verify(
    hf_dir: Path | str, megatron_dir: Path | str, text_file: Path | str | None = None, *, progress: bool = True
) -> Verification:
    """Compare the latest checkpoint of `megatron_dir` with `hf_dir`: tensors one at a time, and logits on `text_file`.

    Logits need both models in memory as fp32; without a text only tensors are compared.

    Raises:
        UserError: one of the folders is incomplete, or the checkpoint does not fit its card.
    """
    hf_dir, megatron_dir = Path(hf_dir), Path(megatron_dir)
    card, checkpoint = ModelCard.load(megatron_dir), latest_checkpoint(megatron_dir)
    compare_keys(expected_keys(card), checkpoint)
    if not hf_dir.is_dir():
        raise UserError(f"{hf_dir} does not exist: name a local Hugging Face folder")
    weights, reader, steps = HfWeights(hf_dir), CheckpointReader(checkpoint), units(card)
    names = hf_shapes(steps)
    check_tensors(weights, names, tied_copy="lm_head.weight" if card.tied else None)
    different = []
    total = sum(weights.tensors[name].bytes for name in names)
    with tqdm(total=total, desc="verify", unit="B", unit_scale=True, disable=not progress) as bar:
        for unit in steps:
            for name, ours in zip(unit.names, read_unit(reader, unit), strict=True):
                if not _same_bits(ours, weights, name, names[name]):
                    different.append(name)
                bar.update(weights.tensors[name].bytes)
    logits = None
    if text_file is not None:
        logits = compare_logits(hf_dir, megatron_dir, _tokens(hf_dir, Path(text_file), card))
    return Verification(len(names), different, logits)


def _same_bits(ours: torch.Tensor, weights: HfWeights, name: str, shape: Shape) -> bool:
    """Whether the checkpoint's tensor is the file's bit by bit (a key may be stored wider than one of its tensors)."""
    theirs = weights.read(name, 0, shape[0])
    exact = theirs.dtype == ours.dtype or torch.equal(ours.to(theirs.dtype).to(ours.dtype), ours)
    return exact and torch.equal(ours.to(theirs.dtype).view(torch.uint8), theirs.contiguous().view(torch.uint8))


def _tokens(hf_dir: Path, text_file: Path, card: ModelCard) -> torch.Tensor:
    """The first tokens of the text: [1, s] int64."""
    if not text_file.is_file():
        raise UserError(f"{text_file} does not exist: name a text file")
    ids = load_tokenizer(hf_dir)(text_file.read_text(encoding="utf-8"))["input_ids"]
    limit = min(MAX_POSITIONS, card.megatron_arguments["max_position_embeddings"])
    if len(ids) < 2:
        raise UserError(f"{text_file} has {len(ids)} tokens: give a longer text")
    return torch.tensor([ids[:limit]])
