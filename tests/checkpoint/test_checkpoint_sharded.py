"""Checkpoints that Megatron itself saved at TP 2 or PP 2, with optimizer state, export to the
original bits."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_tsft.checkpoint.card import copy_card
from megatron_tsft.checkpoint.convert import export_hf, import_hf
from megatron_tsft.checkpoint.folder import read_metadata
from megatron_tsft.checkpoint.keys import checkpoint_keys
from megatron_tsft.checkpoint.units import expected_keys

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tp", "pp", "tied"),
    [
        (
            2,
            1,
            False,
        ),  # qkv and gate/up split inside a layer; both vocabulary tensors padded otherwise
        (1, 2, True),  # layers in two files; the last stage has its own copy of the tied embedding
    ],
)
def test_a_sharded_training_checkpoint_exports_to_the_original(
    tp: int,
    pp: int,
    tied: bool,
    make_hf: Callable[..., Path],
    assert_same_tensors: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    source = make_hf(dtype=torch.bfloat16, tie_word_embeddings=tied, num_hidden_layers=4)
    base, save = tmp_path / "base", tmp_path / "save"
    card = import_hf(source, base, progress=False)
    program = Path(__file__).with_name("save_sharded.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    parts = [str(tmp_path / "store"), str(base), str(save), str(tp), str(pp)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program), str(rank), *parts],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)

    saved = checkpoint_keys(save / "iter_0000020")
    assert saved.keys() == expected_keys(card).keys()
    assert saved["embedding.word_embeddings.weight"] == (1152, 64)  # 1024 in the import
    assert any(
        key.startswith("optimizer.state.exp_avg") for key in _all_keys(save / "iter_0000020")
    )
    copy_card(base, save)
    done = export_hf(save, tmp_path / "back", progress=False)
    assert done.checkpoint.name == "iter_0000020" and done.dtype == "bfloat16"
    assert_same_tensors(source, tmp_path / "back")


def _all_keys(checkpoint: Path) -> set[str]:
    return set(read_metadata(checkpoint).state_dict_metadata)
