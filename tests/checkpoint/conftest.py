"""Tiny random models on disk, with weights large enough that every part of the computation shows in
the logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CHAT_TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"

# 8 heads over 2 groups and a head_dim that is not hidden /
# heads; 1003 is prime, so the vocabulary needs padding
TINY = {
    "vocab_size": 1003,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}

FAMILIES: dict[str, dict[str, Any]] = {  # arguments of make_hf, below
    "llama2: no groups": {"num_key_value_heads": 8},
    "llama3.1: scaled rope": {"rope_factor": 8.0, "shard": "60KB"},
    "llama3.2: scaled rope, tied": {"rope_factor": 32.0, "tie_word_embeddings": True},
    "mistral": {"architecture": "MistralForCausalLM", "sliding_window": None},
    "qwen2: biases": {"architecture": "Qwen2ForCausalLM", "head_dim": 8, "rms_norm_eps": 1e-6},
    "qwen2.5: biases, tied": {
        "architecture": "Qwen2ForCausalLM",
        "head_dim": 8,
        "tie_word_embeddings": True,
    },
    "qwen3: norms, head size": {"architecture": "Qwen3ForCausalLM", "head_dim": 24},
    "qwen3-moe": {
        "architecture": "Qwen3MoeForCausalLM",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
    "qwen3-moe: softmax over all experts": {
        "architecture": "Qwen3MoeForCausalLM",
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "norm_topk_prob": False,
    },
    "mixtral": {
        "architecture": "MixtralForCausalLM",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
}


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer of ten words with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "one", "two", "three", "and", "is", "plus", "user"]
    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(str(folder))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub, whatever the environment says."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def make_hf(tmp_path: Path) -> Callable[..., Path]:
    """make_hf(architecture, dtype=, name=, tokenizer=, shard=, rope_factor=, **config) -> folder of
    a random model."""

    def make(
        architecture: str = "LlamaForCausalLM",
        *,
        dtype: torch.dtype = torch.float32,
        name: str = "hf",
        tokenizer: bool = False,
        shard: str = "5GB",
        rope_factor: float | None = None,
        **overrides: Any,
    ) -> Path:
        import transformers

        if rope_factor is not None:
            overrides = {"rope_parameters": LLAMA3_ROPE | {"factor": rope_factor}} | overrides
        config_class = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
        model = getattr(transformers, architecture)(config_class(**(TINY | overrides)))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                centre = 1.0 if "norm" in key else 0.0
                parameter.copy_(centre + noise * (0.3 if parameter.dim() == 1 else 0.15))
        folder = tmp_path / name
        model.to(dtype).save_pretrained(str(folder), max_shard_size=shard)
        if tokenizer:
            save_tokenizer(folder)
        return folder

    return make


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.fixture
def read_tensors() -> Callable[[Path], dict[str, torch.Tensor]]:
    """read_tensors(folder): every tensor of a Hugging Face folder by name."""
    return _read_tensors


@pytest.fixture
def assert_same_tensors() -> Callable[[Path, Path], None]:
    """assert_same_tensors(folder, other): the same names, dtypes, shapes and bits."""

    def check(left: Path, right: Path) -> None:
        ours, theirs = _read_tensors(left), _read_tensors(right)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype and tensor.shape == theirs[name].shape, name
            assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name

    return check
