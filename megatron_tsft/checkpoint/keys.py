"""The weights of a checkpoint against a model's: Megatron itself loads a mismatch silently."""

from collections.abc import Mapping
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_tsft.checkpoint.folder import read_metadata
from megatron_tsft.errors import UserError

VOCABULARY_KEYS = (
    "embedding.word_embeddings.weight",
    "output_layer.weight",
)  # padding may differ with TP
NOT_MODEL = (
    "optimizer.",
    "chained_",
    "rng_state",
    "rerun_state_machine",
    "opt_param_scheduler",
    "common_state",
)


def model_keys(metadata: Metadata) -> dict[str, tuple[int, ...]]:
    """Key -> global shape of the model's own tensors: no optimizer, no RNG, no extra state."""
    return {
        key: tuple(value.size)
        for key, value in metadata.state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata)
        and not key.startswith(NOT_MODEL)
        and "_extra_state" not in key
    }


def checkpoint_keys(checkpoint_dir: Path | str) -> dict[str, tuple[int, ...]]:
    """Key -> global shape of the model's tensors in `release/` or `iter_XXXXXXX/`, read from
    `.metadata` only.

    Raises:
        UserError: the folder is no complete torch_dist checkpoint.
    """
    return model_keys(read_metadata(checkpoint_dir))


def compare_keys(expected: Mapping[str, tuple[int, ...]], checkpoint_dir: Path | str) -> None:
    """Check that a checkpoint holds exactly the weights of a model; `expected`: key -> global
    shape.

    The number of rows of the embedding and the output layer may differ (padding depends on the
    parallel layout).

    Raises:
        UserError: one line with every missing and unexpected key (the first few) and every shape
            that differs.
    """
    actual = checkpoint_keys(checkpoint_dir)
    wrong = []
    for what, names in (
        ("missing", expected.keys() - actual.keys()),
        ("unexpected", actual.keys() - expected.keys()),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            wrong.append(f"{what}: {', '.join(sorted(names)[:5])}{more}")
    for key in sorted(expected.keys() & actual.keys()):
        skip = 1 if key in VOCABULARY_KEYS else 0
        if tuple(expected[key])[skip:] != actual[key][skip:] or len(expected[key]) != len(
            actual[key]
        ):
            wrong.append(f"{key} is {list(actual[key])}, the model's is {list(expected[key])}")
    if wrong:
        raise UserError(
            f"{checkpoint_dir} does not fit the model ({'; '.join(wrong)}): use the model that it"
            " was made from"
        )
