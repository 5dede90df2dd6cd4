"""Whatever is wrong with a folder is said in one line, with the value and the remedy, before
anything is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_tsft.checkpoint.card import ModelCard, copy_card
from megatron_tsft.checkpoint.convert import export_hf, import_hf
from megatron_tsft.checkpoint.folder import TRACKER, latest_checkpoint
from megatron_tsft.checkpoint.keys import compare_keys
from megatron_tsft.checkpoint.mapping import TableRow, TensorPattern, check_table
from megatron_tsft.checkpoint.units import expected_keys
from megatron_tsft.errors import UserError

Make = Callable[..., Path]
Read = Callable[[Path], dict[str, torch.Tensor]]


def refused(source: Path, target: Path, words: str) -> None:
    """Import must fail with one line that holds `words`, and leave nothing behind."""
    with pytest.raises(UserError, match=words) as error:
        import_hf(source, target, progress=False)
    assert "\n" not in str(error.value).strip()
    assert not target.exists()
    assert not [path for path in target.parent.iterdir() if path.name.endswith(".partial")]


def edit_config(source: Path, **values: object) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | values))


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
}
BAD_CONFIGS = {
    "another family": ({"architectures": ["OPTForCausalLM"]}, "OPTForCausalLM.*LlamaForCausalLM"),
    "attention bias": ({"attention_bias": True}, "attention_bias=True"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias=True"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "window": ({"sliding_window": 512}, "sliding_window=512"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    "linear rope": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        "'linear'",
    ),
    "old-style yarn": (
        {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 2.0}},
        "'yarn'",
    ),
    "llama3 low": (
        {"rope_parameters": LLAMA3 | {"low_freq_factor": 2.0, "high_freq_factor": 4.0}},
        "low_freq_factor=2.0: Megatron hard-codes 1.0",
    ),
    "llama3 high": (
        {"rope_parameters": LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 8.0}},
        "high_freq_factor=8.0: Megatron hard-codes 4.0",
    ),
    "llama3 original": (
        {
            "rope_parameters": LLAMA3
            | {
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 4096,
            }
        },
        "original_max_position_embeddings=4096: Megatron hard-codes 8192",
    ),
    "another width": ({"intermediate_size": 96}, "gate_proj.weight is .112, 64.*says .96, 64"),
    "another depth": ({"num_hidden_layers": 4}, "9 missing tensors.*layers.3"),
    "another depth, fewer": ({"num_hidden_layers": 2}, "9 unexpected tensors.*layers.2"),
    "llama3 without its constants": (
        {"rope_parameters": LLAMA3},
        "cannot be read.*low_freq_factor",
    ),
    "nonsense": ({"hidden_size": "wide"}, "cannot be read"),
}


@pytest.mark.parametrize(("values", "words"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_a_config_that_megatron_cannot_express(
    values: dict, words: str, make_hf: Make, tmp_path: Path
) -> None:
    source = make_hf()
    edit_config(source, **values)
    refused(source, tmp_path / "megatron", words)


def test_folders_that_are_not_complete(make_hf: Make, tmp_path: Path) -> None:
    target = tmp_path / "megatron"
    refused(tmp_path / "nowhere", target, "nowhere does not exist")
    source = make_hf(shard="60KB")
    shard = sorted(source.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    refused(source, target, f"{shard.name} is missing")
    shard.write_bytes(content[: len(content) // 2])
    refused(source, target, f"{shard.name} is damaged")
    shutil.copy(sorted(source.glob("*.safetensors"))[0], shard)
    refused(source, target, f"and in .*{shard.name}: copy the folder again")
    index = source / "model.safetensors.index.json"
    for text in ('{"metadata": {', '{"metadata": {}}', '{"weight_map": 3}'):
        index.write_text(text)
        refused(source, target, f"{index.name} is damaged")
    for file in source.glob("*safetensors*"):
        file.unlink()
    refused(source, target, "no model.safetensors")
    (source / "pytorch_model.bin").touch()
    refused(source, target, r"only .bin files.*save_pretrained")
    (source / "model.gguf").touch()
    refused(source, target, "only .gguf files.*gguf_file")
    (source / "config.json").unlink()
    refused(source, target, "no config.json")


def test_tensors_that_the_table_does_not_know(
    make_hf: Make, read_tensors: Read, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    source, target = make_hf(tie_word_embeddings=True), tmp_path / "megatron"
    tensors = read_tensors(source)
    harmless = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "lm_head.weight": tensors[
            "model.embed_tokens.weight"
        ].clone(),  # what old transformers saved of tied models
    }
    save_file(tensors | harmless, source / "model.safetensors", metadata={"format": "pt"})
    import_hf(source, target, progress=False)
    shutil.rmtree(target)
    save_file(
        tensors | {"model.extra": torch.ones(2)},
        source / "model.safetensors",
        metadata={"format": "pt"},
    )
    refused(source, target, "1 unexpected tensors, e.g. model.extra")
    del tensors["model.norm.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refused(source, target, "1 missing tensors, e.g. model.norm.weight")
    tensors["model.norm.weight"] = torch.ones(64, dtype=torch.float64)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refused(source, target, "is F64")


def test_a_damaged_tokenizer(make_hf: Make, tmp_path: Path) -> None:
    source = make_hf(tokenizer=True)
    for text in ('{"trunc', '{"version": "1.0"}'):
        (source / "tokenizer.json").write_text(text)
        words = f"no tokenizer could be loaded from {source}|{source}/tokenizer.json is damaged"
        refused(source, tmp_path / "megatron", words)


def test_no_space_on_the_disk(
    make_hf: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage(tmp_path))(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused(make_hf(), tmp_path / "megatron", "0.00 GB free")


def test_only_folders_of_ours_are_overwritten(make_hf: Make, tmp_path: Path) -> None:
    source, target = make_hf(), tmp_path / "megatron"
    precious = target / "thesis.txt"
    target.mkdir()
    precious.touch()
    for overwrite in (False, True):
        with pytest.raises(
            UserError, match="holds other files and no tsft_model.json, so it is kept"
        ):
            import_hf(source, target, overwrite=overwrite, progress=False)
    precious.unlink()
    import_hf(source, target, progress=False)
    run, project = tmp_path / "run", tmp_path / "project"
    copy_card(target, run)  # a training run's own folder has a card too
    (run / "iter_0000020").mkdir()
    with pytest.raises(UserError, match="holds other files and no release, so it is kept"):
        import_hf(source, run, overwrite=True, progress=False)
    project.mkdir()
    (project / "config.json").touch()
    with pytest.raises(UserError, match=r"holds other files and no \*.safetensors, so it is kept"):
        export_hf(target, project, overwrite=True, progress=False)
    (project / "config.json").unlink()
    export_hf(target, project, progress=False)
    with pytest.raises(UserError, match="pass --overwrite"):
        export_hf(target, project, progress=False)
    export_hf(target, project, overwrite=True, progress=False)
    with pytest.raises(UserError, match="is a file"):
        export_hf(target, project / "config.json", overwrite=True, progress=False)
    with pytest.raises(UserError, match="pass --overwrite"):
        import_hf(source, target, progress=False)
    import_hf(source, target, overwrite=True, progress=False)
    for place in (source, source / "inside", source.parent):
        with pytest.raises(UserError, match="lies in the other"):
            import_hf(source, place, overwrite=True, progress=False)


def test_checkpoints_that_are_not_complete(make_hf: Make, tmp_path: Path) -> None:
    folder = tmp_path / "megatron"
    with pytest.raises(UserError, match="does not exist"):
        latest_checkpoint(folder)
    folder.mkdir()
    with pytest.raises(UserError, match=TRACKER):
        latest_checkpoint(folder)
    folder.rmdir()
    import_hf(make_hf(), folder, progress=False)
    assert latest_checkpoint(folder) == folder / "release"
    (folder / "release").rename(folder / "iter_0000020")
    (folder / TRACKER).write_text("20\n")
    assert latest_checkpoint(folder) == latest_checkpoint(folder, 20) == folder / "iter_0000020"
    with pytest.raises(UserError, match="iter_0000010 does not exist: .* holds iter_0000020"):
        latest_checkpoint(folder, 10)
    for torn in ("yesterday", "", "30"):  # the newest that is whole
        (folder / TRACKER).write_text(torn)
        assert latest_checkpoint(folder) == folder / "iter_0000020"
    (folder / "iter_0000020").rename(folder / "release")
    (folder / TRACKER).write_text("yesterday")
    with pytest.raises(UserError, match="says b'yesterday': it must say 'release' or an iteration"):
        latest_checkpoint(folder)
    (folder / "release").rename(folder / "iter_0000020")
    (folder / TRACKER).write_text("20")
    data = folder / "iter_0000020" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(UserError, match="__0_0.distcp is missing or shorter"):
        latest_checkpoint(folder)
    (folder / "iter_0000020" / ".metadata").unlink()
    with pytest.raises(UserError, match="no .metadata"):
        export_hf(folder, tmp_path / "back", progress=False)


def test_a_checkpoint_of_another_model_is_refused_by_name(make_hf: Make, tmp_path: Path) -> None:
    card = import_hf(make_hf(), tmp_path / "a", progress=False)
    checkpoint = latest_checkpoint(tmp_path / "a")
    expected = expected_keys(card)
    compare_keys(expected, checkpoint)
    compare_keys(
        expected | {"output_layer.weight": (1152, 64)}, checkpoint
    )  # padded for another TP
    norm = "decoder.layers.self_attention.q_layernorm.weight"
    with pytest.raises(UserError, match=f"missing: {norm}"):
        compare_keys(expected | {norm: (3, 16)}, checkpoint)
    smaller = {key: shape for key, shape in expected.items() if key != "output_layer.weight"}
    with pytest.raises(UserError, match="unexpected: output_layer.weight"):
        compare_keys(smaller, checkpoint)
    final = "decoder.final_layernorm.weight"
    with pytest.raises(UserError, match=rf"{final} is \[64\], the model's is \[65\]"):
        compare_keys(expected | {final: (65,)}, checkpoint)
    with pytest.raises(
        UserError, match=r"word_embeddings.weight is \[1024, 64\], the model's is \[1024, 32\]"
    ):
        compare_keys(expected | {"embedding.word_embeddings.weight": (1024, 32)}, checkpoint)


def test_cards(make_hf: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="convert_checkpoint.py import"):
        ModelCard.load(tmp_path)
    card = import_hf(make_hf(tokenizer=True), tmp_path / "a", progress=False)
    save = tmp_path / "save"
    copy_card(tmp_path / "a", save)
    copy_card(tmp_path / "a", save)  # a second time, as a resumed run does
    assert ModelCard.load(save) == card
    names = {path.name for path in (tmp_path / "a" / "hf").iterdir()}
    assert (
        {path.name for path in (save / "hf").iterdir()} == names > {"config.json", "tokenizer.json"}
    )
    import_hf(make_hf(name="other", hidden_size=32), tmp_path / "b", progress=False)
    with pytest.raises(UserError, match="belongs to another model"):
        copy_card(tmp_path / "b", save)
    (save / "tsft_model.json").write_text('{"format_version": 99}')
    with pytest.raises(UserError, match="format version 99, not 2"):
        ModelCard.load(save)


def test_a_folder_that_lost_its_side_files(make_hf: Make, tmp_path: Path) -> None:
    import_hf(make_hf(), tmp_path / "megatron", progress=False)
    shutil.rmtree(tmp_path / "megatron" / "hf")
    with pytest.raises(UserError, match="has no hf/config.json"):
        export_hf(tmp_path / "megatron", tmp_path / "back", progress=False)


def test_an_unknown_dtype(make_hf: Make, tmp_path: Path) -> None:
    import_hf(make_hf(), tmp_path / "megatron", progress=False)
    with pytest.raises(UserError, match="unknown dtype 'int8': choose one of fp32, fp16, bf16"):
        export_hf(tmp_path / "megatron", tmp_path / "back", dtype="int8", progress=False)


def test_a_table_that_contradicts_itself() -> None:
    import dataclasses

    from megatron_tsft.checkpoint.families.llama import FAMILY

    wrong = TableRow(
        "decoder.layers.x.weight",
        "qkv",
        (TensorPattern("model.layers.{layer}.x", ("hidden_size",)),),
    )
    with pytest.raises(UserError, match="decoder.layers.x.weight is wrong"):
        check_table(dataclasses.replace(FAMILY, rows=(wrong,)))
