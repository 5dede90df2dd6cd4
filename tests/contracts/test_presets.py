"""Every preset's command passes our checks, Megatron's real parser, its validation and its
configurations.

Where Transformer Engine is not installed (this test needs none) the cases ask for its layers by
--transformer-impl, and the entry point's other defaults are those without it: no rope fusion, no
persistent layer norm. So what is checked is what Megatron says of the flags; nothing is computed.
"""

import importlib.util
import multiprocessing
import os
import shlex
import subprocess
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_tsft.plan.precision import FP8
from tests.fresh import fresh

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCH = REPOSITORY / "launch" / "pretrain_gpt_tsft.sh"
PRESETS = {path.stem: path for path in sorted((REPOSITORY / "launch" / "presets").glob("*.sh"))}
ENGINE = ("--transformer-impl", "transformer_engine")
GATHER, REUSE = ("--fp8-param-gather",), ("--reuse-grad-buf-for-mxfp8-param-ag",)
GPU = {
    "a100": (8, 0),
    "h100": (9, 0),
    "b200": (10, 0),
}  # compute capability, by the first word of a preset's name
ONE = {"GPUS_PER_NODE": "1"}
EIGHT = {"GPUS_PER_NODE": "8", "TP": "2", "PP": "2", "CP": "2"}
ROPE = {"rope_type": "default", "rope_theta": 1e6}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5} | {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
    }
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072}
    | {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5},  # Llama 3.1 8B
    "Qwen3": {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
    }
    | {
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 40960,
        "head_dim": 128,
    }
    | {"rope_parameters": ROPE, "tie_word_embeddings": True},  # 0.6B
    "Qwen3Moe": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
    }
    | {
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 40960,
        "head_dim": 128,
    }
    | {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    }
    | {"decoder_sparse_step": 1, "mlp_only_layers": [], "rope_parameters": ROPE},  # 30B-A3B
}


def command(preset: str, *flags: str, **variables: str) -> list[str]:
    """The flags that the launcher gives the entry point."""
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1", "DEVICE": "cuda", "PRESET": preset}
    environment |= {
        "MODEL": "base",
        "DATA": "data/train",
        "SAVE": "runs/a",
        "TRAIN_ITERS": "40",
    } | variables
    done = subprocess.run(
        ["bash", str(LAUNCH), *flags], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    return words[words.index("megatron_tsft.training.pretrain_gpt") + 1 :]


def case(
    preset: str,
    variables: dict[str, str],
    *flags: str,
    model: str = "Llama",
    engine: bool | None = None,
) -> dict[str, Any]:
    """What `configure_one` is asked. engine: Transformer Engine is there; None: where the preset
    needs it."""
    engine = "fp8" in preset if engine is None else engine
    argv = command(preset, *(ENGINE if engine else ()), *flags, **variables)
    return {
        "argv": argv,
        "world": int(variables["GPUS_PER_NODE"]),
        "model": model,
        "engine": engine,
    }


def cases() -> dict[str, dict[str, Any]]:
    """Name -> what is tried, in one process."""
    found: dict[str, dict[str, Any]] = {}
    for preset in PRESETS:
        found[preset] = case(preset, ONE)
        found[f"{preset} 8 ranks"] = case(preset, EIGHT, model="Qwen3")
        if "fp8" in preset:
            found[f"{preset} gather"] = case(
                preset, EIGHT, *GATHER, *(REUSE if "mxfp8" in preset else ())
            )
            found[f"{preset} in local layers"] = case(
                preset, ONE, "--transformer-impl", "local", engine=False
            )
        else:
            found[f"{preset} with Transformer Engine"] = case(
                preset, EIGHT, model="Qwen3", engine=True
            )
    for preset in ("h100-bf16", "h100-fp8-delayed"):
        found[f"{preset} experts"] = case(preset, EIGHT, model="Qwen3Moe")
    found["bf16 layers with delayed"] = case("h100-fp8-delayed", ONE, "--first-last-layers-bf16")
    found["odd packs"] = case("h100-fp8-delayed", ONE | {"SEQ_LENGTH": "4088"})
    return found


def configure(asked: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Run each case as training/run.py does, without a GPU: what our check says, what Megatron
    makes of the flags."""
    from megatron_tsft.cpu import install

    install()
    import transformers  # noqa: F401  # once, for the cases below

    import megatron_tsft.training.start  # noqa: F401

    # Megatron parses one command line a process: each case has its own
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        return dict(zip(asked, pool.map(configure_alone, asked.values(), chunksize=1), strict=True))


def configure_alone(asked: dict[str, Any]) -> dict[str, Any]:
    """One case, in a process of its own."""
    return configure_one(**asked)


def configure_one(argv: list[str], world: int, model: str, engine: bool) -> dict[str, Any]:
    """Our check and Megatron's own functions on one command line."""
    import transformers
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_tsft.checkpoint.card import ModelCard
    from megatron_tsft.checkpoint.families import family_of
    from megatron_tsft.errors import UserError
    from megatron_tsft.plan.defaults import parser_defaults
    from megatron_tsft.plan.flags import Flags
    from megatron_tsft.plan.pack_length import check_pack
    from megatron_tsft.plan.plan import Startup
    from megatron_tsft.plan.precision import check_precision
    from megatron_tsft.training.read_flags import read_flags
    from megatron_tsft.training.start import model_config, start

    os.environ.update(
        WORLD_SIZE=str(world), RANK="0", LOCAL_RANK="0", CUDA_DEVICE_MAX_CONNECTIONS="1"
    )
    hf = getattr(transformers, f"{model}Config")(
        **MODELS[model], architectures=[f"{model}ForCausalLM"]
    )
    family = family_of(hf)
    shape = family.arguments(hf)
    card = ModelCard(
        family.name, hf.architectures[0], shape, hf.vocab_size, 128, 0, "bfloat16", "", None
    )
    line = read_flags(argv)
    defaults = parser_defaults(card, line.config.model, "cuda", line.given)
    flags = Flags.of(line.given, defaults)
    result: dict[str, Any] = {"ours": dict.fromkeys(GPU, ""), "megatron": ""}
    for name, capability in GPU.items():
        try:
            check_precision(flags, "cuda", engine=engine, capability=capability, cuda=(13, 0))
            check_pack(flags)
        except UserError as error:
            result["ours"][name] = str(error)
    try:
        args = start(Startup(tuple(argv), defaults, {}))
        built = model_config(args)
    except UserError as error:
        return result | {"megatron": str(error)}
    container = pretrain_cfg_container_from_args(args, built)
    return result | facts(args, built.transformer, container)


def facts(args: Namespace, layers: Any, container: Any) -> dict[str, Any]:
    """What Megatron's configurations say of precision and layout."""
    names = (
        "bf16 fp16 fp8 fp8_recipe fp8_param fp8_amax_history_len fp8_amax_compute_algo"
        " first_last_layers_bf16 num_layers_at_start_in_bf16 sequence_parallel"
        " tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size"
        " calculate_per_token_loss fp8_output_proj transformer_impl num_moe_experts"
    ).split()
    values = {name: getattr(layers, name) for name in names}
    values |= {
        name: str(getattr(layers, name))
        for name in ("params_dtype", "pipeline_dtype", "attention_backend")
    }
    ddp, optimizer = container.ddp, container.optimizer
    values |= {"reduce_in_fp32": ddp.grad_reduce_in_fp32, "ddp_gather": ddp.fp8_param_gather}
    values |= {
        "overlap": [ddp.overlap_grad_reduce, ddp.overlap_param_gather],
        "optimizer_recipe": optimizer.fp8_recipe,
    }
    values |= {
        "reuse": [
            ddp.reuse_grad_buf_for_mxfp8_param_ag,
            optimizer.reuse_grad_buf_for_mxfp8_param_ag,
        ]
    }
    values |= {
        "distributed": ddp.use_distributed_optimizer,
        "manual_gc": [args.manual_gc, args.manual_gc_interval],
    }
    return values | {
        "timeout": args.distributed_timeout_minutes,
        "data_parallel": args.data_parallel_size,
    }


@pytest.fixture(scope="module")
def configured() -> dict[str, dict[str, Any]]:
    return fresh(configure, cases())


pytestmark = pytest.mark.slow
Configured = dict[str, dict[str, Any]]
IN_FP8 = [name for name in PRESETS if "fp8" in name]


def home(preset: str) -> str:
    """The GPU that a preset is for."""
    return preset.split("-")[0]


@pytest.mark.parametrize("variant", ["", " 8 ranks"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_taken(preset: str, variant: str, configured: Configured) -> None:
    found = configured[preset + variant]
    assert (found["ours"][home(preset)], found["megatron"]) == ("", "")
    assert (found["bf16"], found["fp16"], found["params_dtype"]) == (True, False, "torch.bfloat16")
    assert found["pipeline_dtype"] == "torch.bfloat16"
    assert (found["reduce_in_fp32"], found["overlap"], found["distributed"]) == (
        False,
        [True, True],
        True,
    )
    assert (found["manual_gc"], found["timeout"]) == ([True, 100], 60)
    assert found["calculate_per_token_loss"]
    recipe = preset.split("-")[-1]
    if recipe in FP8:
        assert found["fp8"] == ("e4m3" if recipe in ("blockwise", "mxfp8") else "hybrid")
        assert found["fp8_recipe"] == found["optimizer_recipe"] == recipe
    else:
        assert found["fp8"] is None and recipe == "bf16"
    assert found["transformer_impl"] == ("local" if recipe == "bf16" else "transformer_engine")
    assert found["attention_backend"] == (
        "AttnBackend.auto" if preset == "a100-bf16" else "AttnBackend.fused"
    )
    assert not found["fp8_output_proj"]  # the head, and so the loss, sees bf16
    assert (
        not found["fp8_param"] and not found["ddp_gather"]
    )  # precision.keep_start_weights says why
    sizes = [
        found[f"{name}_parallel_size"] for name in ("tensor_model", "pipeline_model", "context")
    ]
    assert sizes == ([2, 2, 2] if variant else [1, 1, 1])
    assert (found["data_parallel"], found["sequence_parallel"]) == (1, bool(variant))


def test_what_the_recipes_add(configured: Configured) -> None:
    delayed, tensorwise = configured["h100-fp8-delayed"], configured["h100-fp8-tensorwise"]
    assert (delayed["fp8_amax_history_len"], delayed["fp8_amax_compute_algo"]) == (1024, "max")
    assert not delayed["first_last_layers_bf16"]
    assert (tensorwise["first_last_layers_bf16"], tensorwise["num_layers_at_start_in_bf16"]) == (
        True,
        1,
    )


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in IN_FP8])
def test_a_bf16_preset_goes_with_either_layers(preset: str, configured: Configured) -> None:
    engine, local = configured[f"{preset} with Transformer Engine"], configured[f"{preset} 8 ranks"]
    assert (engine["ours"], engine["megatron"]) == (dict.fromkeys(GPU, ""), "")
    assert engine["transformer_impl"] == "transformer_engine"
    assert {name for name in local if local[name] != engine[name]} == {"transformer_impl"}


def test_experts(configured: Configured) -> None:
    """With FP8 this is where Megatron does look for Transformer Engine itself."""
    bf16, fp8 = configured["h100-bf16 experts"], configured["h100-fp8-delayed experts"]
    assert (bf16["ours"]["h100"], bf16["megatron"], bf16["num_moe_experts"]) == ("", "", 128)
    assert bf16["sequence_parallel"]
    installed = importlib.util.find_spec("transformer_engine") is not None
    assert fp8["ours"]["h100"] == ""
    assert ("transformer-engine>=1.7.0" in fp8["megatron"]) == (not installed)


@pytest.mark.parametrize("preset", IN_FP8)
def test_parameters_in_fp8_are_a_flag_more(preset: str, configured: Configured) -> None:
    """Megatron takes --fp8-param-gather with every recipe; ours refuses it with delayed."""
    found = configured[f"{preset} gather"]
    assert (found["megatron"], found["fp8_param"], found["ddp_gather"]) == ("", True, True)
    assert found["reuse"] == [preset == "b200-mxfp8"] * 2
    assert ("--fp8-param-gather" in found["ours"][home(preset)]) == (preset == "h100-fp8-delayed")


@pytest.mark.parametrize("preset", IN_FP8)
def test_megatron_takes_what_our_check_refuses(preset: str, configured: Configured) -> None:
    """Why there is a check: local layers would compute in bf16, and another GPU would fail in the
    first step."""
    local, right = configured[f"{preset} in local layers"], configured[preset]
    assert (local["megatron"], local["transformer_impl"], bool(local["fp8"])) == ("", "local", True)
    assert "needs Transformer Engine" in local["ours"]["h100"]
    assert "this GPU has compute capability 8.0: train in bf16" in right["ours"]["a100"]
    assert (right["ours"]["h100"] == "") == (preset != "b200-mxfp8")
    assert right["ours"]["b200"] == ""


def test_packs_that_megatron_takes(configured: Configured) -> None:
    found = configured["odd packs"]
    assert found["megatron"] == ""
    assert "--seq-length 4088 is not a multiple of 16" in found["ours"]["h100"]


def test_what_megatron_refuses_itself(configured: Configured) -> None:
    found = configured["bf16 layers with delayed"]
    assert "Delayed scaling does not support first / last layer in BF16" in found["megatron"]
