"""The model card: everything that builds a model, saved as JSON beside its checkpoint (Megatron's
own loses some)."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tsft.atomic import new_directory
from megatron_tsft.cards import load_card, save_card
from megatron_tsft.checkpoint.arguments import check_arguments
from megatron_tsft.checkpoint.manifest import LISTS, write_list
from megatron_tsft.errors import UserError
from megatron_tsft.inside import check_links
from megatron_tsft.typed import Count, Dtype

CARD_FILE = "tsft_model.json"
SERVED_FILE = "tsft_served.json"  # served.py
HF_FOLDER = "hf"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class ModelCard:
    """One model: its family, its architecture and where it came from.

    Attributes:
        family: name of the mapping table.
        architecture: Hugging Face class name.
        megatron_arguments: argparse destination -> value, for Megatron's own flags.
        vocab_size: of the Hugging Face config, which may exceed len(tokenizer).
        padded_vocab_size: rows of the imported checkpoint.
        dtype: of the Hugging Face weights ("bfloat16").
        source_hash: 16 hex digits over the weights.
        tokenizer_fingerprint: None where the Hugging Face folder had no tokenizer.
        other_dtypes: tensor name -> dtype of those that differ.
    """

    family: str
    architecture: str
    megatron_arguments: dict[str, Any]
    vocab_size: Count
    make_vocab_size_divisible_by: Count
    padded_vocab_size: Count
    dtype: Dtype
    source_hash: str
    tokenizer_fingerprint: str | None
    other_dtypes: dict[str, Dtype] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ValueError: the arguments are not those of a model."""
        check_arguments(self.megatron_arguments)

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding."""
        return not self.megatron_arguments["untie_embeddings_and_output_weights"]

    @staticmethod
    def load(directory: Path | str) -> "ModelCard":
        """The card of a Megatron checkpoint folder.

        Raises:
            UserError: there is none, or it was written by another version.
        """
        path = Path(directory) / CARD_FILE
        state = f"has no {CARD_FILE}" if Path(directory).is_dir() else "does not exist"
        missing = (
            f"{directory} {state}: name a Megatron checkpoint folder; `tools/convert_checkpoint.py"
            " import --hf DIR --megatron DIR` makes one"
        )
        return load_card(
            ModelCard,
            path,
            FORMAT_VERSION,
            what="model card",
            missing=missing,
            again="import the model again",
        )

    def save(self, directory: Path | str) -> None:
        """Write the card into a folder, atomically."""
        save_card(self, Path(directory) / CARD_FILE, FORMAT_VERSION)


def copy_card(source_dir: Path | str, target_dir: Path | str) -> None:
    """Copy `tsft_model.json` and `hf/` of an imported folder into a training save folder, so that
    export works from it.

    Call it on one rank. A target that already has the same card is left as it is.

    Raises:
        UserError: the source has no card, or the target belongs to another model.
    """
    source, target = Path(source_dir), Path(target_dir)
    card = ModelCard.load(source)
    if (target / CARD_FILE).is_file():
        other = ModelCard.load(target)
        if other != card:
            raise UserError(
                f"{target} belongs to another model (weights {other.source_hash}, {source} is"
                f" {card.source_hash}): save into another folder"
            )
        if (target / HF_FOLDER).is_dir() and any(target.glob(LISTS)):
            return
    check_links(source / HF_FOLDER)
    target.mkdir(parents=True, exist_ok=True)
    with new_directory(target / HF_FOLDER, overwrite=True) as folder:
        shutil.copytree(source / HF_FOLDER, folder, dirs_exist_ok=True)
    card.save(target)
    list_around(target)


def list_around(folder: Path, *, but: str = "") -> None:
    """Write the checksums of what stands around a folder's checkpoints, `but` left out."""
    files = [folder / CARD_FILE, folder / SERVED_FILE, *(folder / HF_FOLDER).rglob("*")]
    names = [path.relative_to(folder).as_posix() for path in files if path.is_file()]
    write_list(folder, [name for name in names if name != but])
