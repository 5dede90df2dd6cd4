"""Megatron's own GPTModel of a model card on CPU, in any layout: built, loaded by Megatron's own
loader, run forward.

Local layer spec, alone in this process or in every rank of a gloo group. Three names of Megatron
and torch are replaced while it runs: RotaryEmbedding asks for the current CUDA device, attention
forks a CUDA random state for a dropout of 0, and embeddings that two pipeline stages share are sent
to CUDA first.
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
from megatron_tsft.checkpoint.mapping import padded_vocab_size
from megatron_tsft.errors import UserError
from megatron_tsft.upstream import moe_norm_key

# Megatron argument -> field of TransformerConfig
FIELDS = {
    name: name
    for name in (
        "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels"
        " layernorm_epsilon normalization add_bias_linear add_qkv_bias qk_layernorm"
        " rotary_interleaved"
    ).split()
}
EXPERT_FIELDS = {
    "num_experts": "num_moe_experts",
    "moe_router_topk": "moe_router_topk",
    "moe_ffn_hidden_size": "moe_ffn_hidden_size",
    "moe_router_pre_softmax": "moe_router_pre_softmax",
}


GIVEN_DIRECTLY = {  # to GPTModel, or implied by what build_model builds
    "swiglu": True,
    "group_query_attention": None,
    "untie_embeddings_and_output_weights": None,
    "max_position_embeddings": None,
    "position_embedding_type": "rope",
    "rotary_base": None,
    "rotary_percent": None,
    "use_rope_scaling": None,
    "rope_scaling_factor": None,
}  # argument -> the only value, None for any


@dataclass(frozen=True)
class Layout:
    """How many ranks share the tensors, the layers and the experts, out of the default group."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1


ONE_RANK = Layout()


def build_model(
    card: ModelCard,
    layout: Layout = ONE_RANK,
    *,
    rope_scaling: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """This rank's part of the model: no dropout, weights not initialised; rope_scaling False leaves
    it out.

    Raises:
        UserError: the card has an argument, or a value, that is not built here.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    if moe_norm_key.applies():
        moe_norm_key.apply()
    arguments = card.megatron_arguments
    for name, value in arguments.items():
        known = name in FIELDS or name in EXPERT_FIELDS or name in GIVEN_DIRECTLY
        if not known or GIVEN_DIRECTLY.get(name) not in (None, value):
            raise UserError(
                f"logits of family {card.family!r} cannot be compared: {name}={value!r} is not"
                " built for that (FIELDS in checkpoint/megatron_model.py): pass --weights-only"
            )
    fields: dict[str, Any] = {field: arguments[name] for name, field in FIELDS.items()}
    experts = arguments.get("num_experts")
    if experts:
        fields |= {field: arguments[name] for name, field in EXPERT_FIELDS.items()}
        fields |= {
            "moe_token_dispatcher_type": "allgather",
            "moe_router_load_balancing_type": "none",
        }
    config = TransformerConfig(
        **fields,
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
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        expert_model_parallel_size=layout.expert,
    )
    spec = get_gpt_layer_local_spec(
        experts, qk_layernorm=arguments["qk_layernorm"], normalization=arguments["normalization"]
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=padded_vocab_size(
            card.vocab_size, card.make_vocab_size_divisible_by * layout.tensor
        ),
        max_sequence_length=arguments["max_position_embeddings"],
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type=arguments["position_embedding_type"],
        rotary_percent=arguments["rotary_percent"],
        rotary_base=arguments["rotary_base"],
        rope_scaling=arguments["use_rope_scaling"] and rope_scaling,
        rope_scaling_factor=arguments.get("rope_scaling_factor", 1.0),
        share_embeddings_and_output_weights=card.tied,
        parallel_output=False,
    )
    return model.eval()


def load_weights(model: Any, checkpoint: Path) -> None:
    """Fill a built model from a torch_dist checkpoint by Megatron's own loader."""
    from megatron.core import dist_checkpointing, parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    sharded = {"model": model.sharded_state_dict(metadata={"dp_cp_group": group})}
    loaded: Any = dist_checkpointing.load(sharded, str(checkpoint))
    model.load_state_dict(loaded["model"])


def forward(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits [b, s, padded vocabulary] of input_ids [b, s] int64, on every rank: hidden states go
    down the pipeline, the logits come back from its last stage."""
    from megatron.core import parallel_state

    batch, length = input_ids.shape
    mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[
        None, None
    ]  # True: not attended
    positions = torch.arange(length).expand_as(input_ids)
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    if not first:
        hidden = torch.empty(
            length, batch, model.config.hidden_size, dtype=model.config.params_dtype
        )
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden)
    output = model(input_ids, positions, mask)
    if not last:
        dist.send(output, parallel_state.get_pipeline_model_parallel_next_rank())
    if first and last:
        return output
    logits = (
        output
        if last
        else torch.empty(batch, length, model.vocab_size, dtype=model.config.params_dtype)
    )
    group: Any = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast(logits, parallel_state.get_pipeline_model_parallel_last_rank(), group)
    return logits


class _NoRandomState:
    """Stands in for the tracker of CUDA random states: nothing is drawn at dropout 0."""

    def fork(self, *_: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


@contextlib.contextmanager
def cpu_ranks(layout: Layout = ONE_RANK) -> Iterator[None]:
    """Megatron's groups over gloo and the three replaced names; everything is put back.

    The ranks are those of the default process group; without one, this process alone.
    """
    with _quiet(), _groups(layout):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings: Megatron's are about CUDA and fused kernels, which are not here on purpose."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def _groups(layout: Layout) -> Iterator[None]:
    from megatron.core import parallel_state, tensor_parallel

    alone = not dist.is_initialized()
    if alone:
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    device, tracker, cuda = (
        torch.cuda.current_device,
        tensor_parallel.get_cuda_rng_tracker,
        torch.Tensor.cuda,
    )
    torch.cuda.current_device = lambda: "cpu"  # pyright: ignore[reportAttributeAccessIssue]
    tensor_parallel.get_cuda_rng_tracker = _NoRandomState  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.cuda = lambda self, *_, **__: self  # pyright: ignore[reportAttributeAccessIssue]
    try:
        parallel_state.initialize_model_parallel(
            layout.tensor, layout.pipeline, expert_model_parallel_size=layout.expert
        )
        yield
    finally:
        torch.cuda.current_device, tensor_parallel.get_cuda_rng_tracker, torch.Tensor.cuda = (
            device,
            tracker,
            cuda,
        )
        parallel_state.destroy_model_parallel()
        for name, value in list(vars(parallel_state).items()):
            if isinstance(value, dist.ProcessGroup):  # it forgets some, whose threads would live on
                setattr(parallel_state, name, None)
        if alone:
            dist.destroy_process_group()
