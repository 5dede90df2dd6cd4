"""Flags of Megatron's that cannot work here, and numbers of ours that mean nothing, each with its
reason."""

import math

from megatron_tsft.errors import UserError
from megatron_tsft.plan.command_line import CommandLine
from megatron_tsft.plan.config import destination, option

REFUSED: dict[str, str] = {
    "sft": (
        "it evaluates by means over micro-batches; supervised fine-tuning is what this entry point"
        " does anyway"
    ),
    "full_validation": "it fails in this Megatron; --tsft-eval-data is one exact pass already",
    "use_checkpoint_args": (
        "it loses norm epsilon, rope scaling and more; --tsft-model knows the architecture"
    ),
    "yaml_cfg": "pass flags",
    "data_path": "pass --tsft-data",
    "mock_data": "pass --tsft-data",
    "pretrained_checkpoint": "pass --tsft-model",
    "spec": (
        "the layer spec is chosen here; --transformer-impl decides between local and"
        " transformer_engine"
    ),
    "rampup_batch_size": "an epoch is padded to one global batch size",
    "decrease_batch_size_if_needed": "an epoch is padded to one global batch size",
    "perform_rl_step": "reinforcement learning is another job",
    "logits_load_dir": "Megatron's logit cache is tied to the data's order; use --tsft-teacher",
    "logits_save_dir": "Megatron's logit cache is tied to the data's order; use --tsft-teacher",
    "mtp_num_layers": "multi-token prediction heads would be trained on prompts",
    "defer_embedding_wgrad_compute": "its weight gradient expects Megatron's own loss",
    "hybrid_layer_pattern": "HybridModel has no hook for the loss (0.19.2)",
    "overlap_moe_expert_parallel_comm": (
        "it bypasses the model's forward, where the teacher rides along"
    ),
    "multiple_validation_sets": "pass one --tsft-eval-data",
    "eval_iters": "an evaluation is one exact pass over --tsft-eval-data",
    "skip_train": (
        "Megatron writes such an evaluation nowhere; evaluate an export, or train with"
        " --tsft-eval-data"
    ),
    "check_for_spiky_loss": "it reads Megatron's own loss",
    "use_torch_fsdp2": (
        "Megatron does not divide its gradients by the supervised tokens (0.19.2: the wrapper has"
        " no scale_gradients of its own) and cannot save its optimizer;"
        " --use-distributed-optimizer shards the optimizer"
    ),
    "use_megatron_fsdp": (
        "it saves in fsdp_dtensor alone, which loads in no other layout;"
        " --use-distributed-optimizer shards the optimizer"
    ),
    "hybrid_context_parallel": "it moves documents between ranks by a schedule of its own",
    "hierarchical_context_parallel_sizes": "not tested: --context-parallel-size alone is",
}
OTHER_DATA = """
train_data_path valid_data_path test_data_path data_args_path per_split_data_args_path split
reset_position_ids reset_attention_mask eod_mask_loss dataloader_inter_document_masking
phase_transition_iterations
"""
# what would make another model than the imported weights belong to, without a word in the card
OTHER_MODELS = """
rotary_seq_len_interpolation_factor window_size window_attn_skip_freq softmax_type no_rope_freq
openai_gelu squared_relu quick_geglu apply_residual_connection_post_layernorm
layernorm_zero_centered_gamma glu_linear_offset activation_func_clamp_value qk_l2_norm
attention_output_gate apply_query_key_layer_scaling use_mup num_experts multi_latent_attention
experimental_attention_variant heterogeneous_layers_config_path encoder_num_layers
heterogeneous_layers_config_encoded_json moe_use_upcycling moe_shared_expert_intermediate_size
moe_latent_size moe_router_score_function moe_router_enable_expert_bias moe_router_num_groups
moe_router_topk_scaling_factor moe_router_force_load_balancing moe_router_force_biased
moe_router_quantile_balancing_ema moe_layer_freq moe_apply_probs_on_input
moe_mlp_glu_interleave_size
"""
REFUSED |= dict.fromkeys(
    OTHER_DATA.split(), "the data comes from --tsft-data, packed by conversation"
)
REFUSED |= dict.fromkeys(
    OTHER_MODELS.split(), "it makes another model than the one in --tsft-model"
)
# destination -> the one value that works, and why
ONLY = {
    "dataloader_type": ("single", "only single resumes exactly"),
    "ckpt_format": ("torch_dist", "only torch_dist loads in any layout"),
}


def check_numbers(line: CommandLine) -> None:
    """Raise UserError for a number of our own flags that means nothing."""
    config = line.config
    for name in ("keep_last", "keep_every"):
        value = getattr(config, name)
        if destination(name) in line.given and value < 1:
            raise UserError(f"{option(name)} {value}: pass at least 1, or leave it out")
    if config.keep_every and not config.keep_last:
        raise UserError(
            f"--tsft-keep-every {config.keep_every} does nothing alone, all checkpoints are kept:"
            " add --tsft-keep-last"
        )
    if destination("stop_at_spike") in line.given and not 1 < config.stop_at_spike < math.inf:
        raise UserError(
            f"--tsft-stop-at-spike {config.stop_at_spike}: pass a number above 1, such as 3, or"
            " leave it out"
        )
    refresh = config.reference_refresh
    if refresh and config.keep_last and (not config.keep_every or refresh % config.keep_every):
        raise UserError(
            f"--tsft-keep-last {config.keep_last} would delete the weights that are the reference"
            f" of --tsft-reference-refresh {refresh}: add --tsft-keep-every {refresh}"
        )
    if "save_retain_interval" in line.given and config.keep_last:
        raise UserError(
            "--save-retain-interval and --tsft-keep-last both delete checkpoints: leave one out"
            " (--tsft-keep-every keeps every K-th)"
        )


def check_refused_flags(line: CommandLine) -> None:
    """Raise UserError for a flag that cannot work here, with the reason."""
    for name, reason in REFUSED.items():
        if line.given.get(name):
            raise UserError(f"{line.option(name)} is not supported: {reason}")
    for name, (value, reason) in ONLY.items():
        if line.given.get(name, value) != value:
            raise UserError(f"{line.option(name)} {line.given[name]} is not supported: {reason}")
    if line.config.fuse_head and line.given.get("fp8_output_proj"):
        raise UserError(
            "--fp8-output-proj does not go with --tsft-fuse-head: it computes in FP8, the fused one"
            " in the model's type; leave one of them out"
        )
