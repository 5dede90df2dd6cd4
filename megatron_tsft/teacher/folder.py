"""What a teacher's folder says of it: a Megatron checkpoint and card, or a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path

from megatron_tsft.checkpoint.architecture import value_of
from megatron_tsft.checkpoint.card import CARD_FILE, ModelCard
from megatron_tsft.checkpoint.fingerprint import weights_fingerprint
from megatron_tsft.checkpoint.folder import latest_checkpoint
from megatron_tsft.checkpoint.hf_folder import load_config
from megatron_tsft.checkpoint.keys import compare_keys
from megatron_tsft.checkpoint.tokenizer import load_tokenizer, tokenizer_fingerprint
from megatron_tsft.checkpoint.units import expected_keys
from megatron_tsft.errors import UserError
from megatron_tsft.typed import Count


@dataclass(frozen=True)
class TeacherFolder:
    """A teacher that can be asked.

    Attributes:
        path: the folder.
        what: its architecture, for people.
        weights_hash: 16 hex digits over its weights.
        positions: the longest input that it knows; None where nobody says.
        tokenizer: fingerprint; None where the folder has none.
        vocab_size: its tokens.
    """

    path: Path
    what: str
    weights_hash: str
    positions: int | None
    tokenizer: str | None
    vocab_size: int


@dataclass(frozen=True)
class MegatronFolder(TeacherFolder):
    """An imported or trained folder: its card, and its newest checkpoint."""

    card: ModelCard
    checkpoint: Path


def is_megatron(path: Path) -> bool:
    """Whether a teacher's folder is Megatron's; raises UserError where it is none at all."""
    if (path / CARD_FILE).is_file():
        return True
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} is no teacher: it has neither {CARD_FILE} (imported) nor config.json (Hugging"
            " Face)"
        )
    return False


def read_megatron_folder(path: Path) -> MegatronFolder:
    """Raises UserError where the checkpoint is not whole, or not the card's model."""
    card, checkpoint = ModelCard.load(path), latest_checkpoint(path)
    compare_keys(expected_keys(card), checkpoint)
    architecture = sorted(card.megatron_arguments.items())
    return MegatronFolder(
        path=path,
        what=f"{card.architecture}, {checkpoint.name}",
        weights_hash=weights_fingerprint(checkpoint, "*", architecture=architecture),
        positions=card.megatron_arguments["max_position_embeddings"],
        tokenizer=card.tokenizer_fingerprint,
        vocab_size=card.vocab_size,
        card=card,
        checkpoint=checkpoint,
    )


def read_hf_folder(path: Path) -> TeacherFolder:
    """Raises UserError where there is no configuration or no tokenizer that can be read."""
    config = load_config(path)
    return TeacherFolder(
        path=path,
        what=(value_of(config, "architectures", list[str] | None) or ["?"])[0],
        weights_hash=weights_fingerprint(path, "config.json", "*.safetensors", "*.bin"),
        positions=value_of(config, "max_position_embeddings", Count | None),
        tokenizer=tokenizer_fingerprint(load_tokenizer(path)),
        vocab_size=value_of(config, "vocab_size", Count),
    )
