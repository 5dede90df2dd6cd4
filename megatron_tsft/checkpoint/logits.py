"""Do Megatron and transformers compute the same logits from their folders? On CPU, in fp32, at any TP.

Builds Megatron's own GPTModel (local layer spec) from the model card and loads it by Megatron's own
`dist_checkpointing.load`: alone in this process, or in every rank of a gloo group, which are then the tensor parallel
ranks. Two names of Megatron and torch are replaced while it runs: RotaryEmbedding asks for the current CUDA device,
and attention forks a CUDA random state for a dropout of 0.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from megatron_tsft.checkpoint.card import ModelCard
from megatron_tsft.checkpoint.folder import latest_checkpoint
from megatron_tsft.checkpoint.keys import compare_keys
from megatron_tsft.checkpoint.mapping import padded_vocab_size
from megatron_tsft.checkpoint.units import expected_keys
from megatron_tsft.errors import UserError

SAME_NAME = (  # Megatron arguments whose TransformerConfig field has the same name
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels layernorm_epsilon"
    " normalization add_bias_linear add_qkv_bias qk_layernorm rotary_interleaved"
).split()


@dataclass(frozen=True)
class LogitDifference:
    """max_difference: largest |Megatron - Hugging Face|. max_logit: largest |logit|, for scale. argmax_agreement: share
    of positions with the same most probable token. positions: how many were compared."""

    max_difference: float
    max_logit: float
    argmax_agreement: float
    positions: int


def compare_logits(hf_dir: Path | str, megatron_dir: Path | str, input_ids: torch.Tensor) -> LogitDifference:
    """Compare the logits of the latest checkpoint in `megatron_dir` with those of `hf_dir`; input_ids [b, s] int64."""
    return difference(megatron_logits(megatron_dir, input_ids), hf_logits(hf_dir, input_ids))


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> LogitDifference:
    """Of Megatron's and Hugging Face's logits, both [b, s, vocab_size]."""
    return LogitDifference(
        max_difference=(ours - theirs).abs().max().item(),
        max_logit=theirs.abs().max().item(),
        argmax_agreement=(ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
        positions=ours.shape[:-1].numel(),
    )


def hf_logits(hf_dir: Path | str, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits [b, s, vocab_size] of transformers in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(hf_dir), dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad():
        return model(input_ids=input_ids).logits.float()


def megatron_logits(megatron_dir: Path | str, input_ids: torch.Tensor, *, rope_scaling: bool = True) -> torch.Tensor:
    """Logits [b, s, vocab_size] of the latest checkpoint in fp32; rope_scaling False leaves the card's scaling out.

    In a process group every rank calls this and gets all logits.

    Raises:
        UserError: no card, no complete checkpoint, or one that does not fit the card.
    """
    card, checkpoint = ModelCard.load(megatron_dir), latest_checkpoint(megatron_dir)
    compare_keys(expected_keys(card), checkpoint)
    with cpu_ranks() as world, torch.no_grad():
        from megatron.core import dist_checkpointing, parallel_state

        model = build_model(card, rope_scaling=rope_scaling, tensor_parallel=world)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        sharded = {"model": model.sharded_state_dict(metadata={"dp_cp_group": group})}
        loaded: Any = dist_checkpointing.load(sharded, str(checkpoint))
        model.load_state_dict(loaded["model"])
        length = input_ids.shape[1]
        mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]  # True: not attended
        positions = torch.arange(length).expand_as(input_ids)
        return model(input_ids, positions, mask)[..., : card.vocab_size].float()


def build_model(card: ModelCard, *, rope_scaling: bool = True, tensor_parallel: int = 1) -> Any:
    """Megatron's GPTModel of a dense card: fp32, CPU, local layer spec, no dropout, weights not initialised."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    arguments = card.megatron_arguments
    if not arguments["swiglu"] or arguments.get("num_experts"):
        raise UserError(f"logits of family {card.family!r} cannot be compared: only dense SwiGLU models can")
    config = TransformerConfig(
        **{name: arguments[name] for name in SAME_NAME},
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=tensor_parallel,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(
            qk_layernorm=arguments["qk_layernorm"], normalization=arguments["normalization"]
        ),
        vocab_size=padded_vocab_size(card.vocab_size, card.make_vocab_size_divisible_by * tensor_parallel),
        max_sequence_length=arguments["max_position_embeddings"],
        position_embedding_type=arguments["position_embedding_type"],
        rotary_percent=arguments["rotary_percent"],
        rotary_base=arguments["rotary_base"],
        rope_scaling=arguments["use_rope_scaling"] and rope_scaling,
        rope_scaling_factor=card.rope_scaling_factor or 1.0,
        share_embeddings_and_output_weights=card.tied,
        parallel_output=False,
    )
    return model.eval()


class _NoRandomState:
    """Stands in for the tracker of CUDA random states: nothing is drawn at dropout 0."""

    def fork(self, *_: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


@contextlib.contextmanager
def cpu_ranks() -> Iterator[int]:
    """Megatron's groups over gloo and the two replaced names; everything is put back. Yields the number of ranks.

    The tensor parallel ranks are those of the default process group; without one, this process alone.
    """
    with _quiet(), _groups() as world:
        yield world


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings: Megatron's are about CUDA devices and fused kernels, which are missing here on purpose."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def _groups() -> Iterator[int]:
    from megatron.core import parallel_state, tensor_parallel

    alone = not dist.is_initialized()
    if alone:
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    world = dist.get_world_size()
    device, tracker = torch.cuda.current_device, tensor_parallel.get_cuda_rng_tracker
    torch.cuda.current_device = lambda: "cpu"  # pyright: ignore[reportAttributeAccessIssue]
    tensor_parallel.get_cuda_rng_tracker = _NoRandomState  # pyright: ignore[reportAttributeAccessIssue]
    try:
        parallel_state.initialize_model_parallel(world)
        yield world
    finally:
        torch.cuda.current_device, tensor_parallel.get_cuda_rng_tracker = device, tracker
        parallel_state.destroy_model_parallel()
        for name, value in list(vars(parallel_state).items()):
            if isinstance(value, dist.ProcessGroup):  # it forgets some, whose threads would live on
                setattr(parallel_state, name, None)
        if alone:
            dist.destroy_process_group()
