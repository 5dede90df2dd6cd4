"""One command line out of three sources: the user's flags, the imported model's architecture, what
every run needs.

The last two become defaults of Megatron's own parser, so a short command line runs and a user's
flag still wins, except where it contradicts the model: that is an error.
"""

import argparse
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron.training.arguments import add_megatron_arguments, parse_and_validate_args
from megatron.training.models.gpt import GPTModelConfig

from megatron_tsft.checkpoint.card import ModelCard
from megatron_tsft.checkpoint.mapping import padded_vocab_size
from megatron_tsft.errors import UserError
from megatron_tsft.model.packed_attention import packed_local_spec
from megatron_tsft.training.config import TsftConfig, add_flags

TP = "tensor_model_parallel_size"

EVERY_RUN = {
    "calculate_per_token_loss": True,  # gradients over the global number of supervised tokens
    "dataloader_type": "single",  # its order is a function of the consumed samples alone
    "tokenizer_type": "NullTokenizer",  # the data is tokenized already
    "log_interval": 1,
    # a resumed run follows its flags, also where --train-iters has grown
    "override_opt_param_scheduler": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    # the other optimizer formats resume wrong in bf16, silently, or not with another number of
    # ranks
    "dist_ckpt_optim_fully_reshardable": True,
}
WITHOUT_TE = {
    "transformer_impl": "local",
    "no_persist_layer_norm": True,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
}
EXPERTS = {  # for a model with experts, unless a flag says otherwise
    # Megatron's default takes no batches of varying length
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none",  # an auxiliary loss belongs to pre-training
}
ON_CPU = WITHOUT_TE | {
    "distributed_backend": "gloo",
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    # packs are cheap to cut; worker processes would take the cores from the ranks
    "num_workers": 0,
}

REFUSED: dict[str, str] = {
    "sft": "it evaluates by means over micro-batches; supervised fine-tuning is what this entry"
    " point does anyway",
    "full_validation": "it fails in this Megatron; --tsft-eval-data is one exact pass already",
    "use_checkpoint_args": "it loses norm epsilon, rope scaling and more; --tsft-model knows the"
    " architecture",
    "yaml_cfg": "pass flags",
    "data_path": "pass --tsft-data",
    "mock_data": "pass --tsft-data",
    "pretrained_checkpoint": "pass --tsft-model",
    "spec": "the layer spec is chosen here; --transformer-impl decides between local and"
    " transformer_engine",
    "rampup_batch_size": "an epoch is padded to one global batch size",
    "decrease_batch_size_if_needed": "an epoch is padded to one global batch size",
    "perform_rl_step": "reinforcement learning is another job",
    "logits_load_dir": "Megatron's logit cache is tied to the data's order; use --tsft-teacher",
    "logits_save_dir": "Megatron's logit cache is tied to the data's order; use --tsft-teacher",
    "mtp_num_layers": "multi-token prediction heads would be trained on prompts",
    "defer_embedding_wgrad_compute": "its weight gradient expects Megatron's own loss",
    "hybrid_layer_pattern": "HybridModel has no hook for the loss (0.19.2)",
    "overlap_moe_expert_parallel_comm": "it bypasses the model's forward, where the teacher rides"
    " along",
    "multiple_validation_sets": "pass one --tsft-eval-data",
    "eval_iters": "an evaluation is one exact pass over --tsft-eval-data",
    "skip_train": "Megatron writes such an evaluation nowhere; evaluate an export, or train with"
    " --tsft-eval-data",
    "check_for_spiky_loss": "it reads Megatron's own loss",
    "use_torch_fsdp2": "Megatron does not divide its gradients by the supervised tokens (0.19.2:"
    " the wrapper has no"
    " scale_gradients of its own) and cannot save its optimizer; --use-distributed-optimizer"
    " shards the optimizer",
    "use_megatron_fsdp": "it saves in fsdp_dtensor alone, which loads in no other layout;"
    " --use-distributed-optimizer"
    " shards the optimizer",
    "hybrid_context_parallel": "it moves documents between ranks by a schedule of its own",
    "hierarchical_context_parallel_sizes": "not tested: --context-parallel-size alone is",
}
# data of Megatron's own kind: our data set knows nothing of them
REFUSED |= dict.fromkeys(
    "train_data_path valid_data_path test_data_path data_args_path per_split_data_args_path split"
    " reset_position_ids"
    " reset_attention_mask eod_mask_loss dataloader_inter_document_masking"
    " phase_transition_iterations".split(),
    "the data comes from --tsft-data, packed by conversation",
)
# flags that would make another model than the imported weights belong to, and that the model card
# has no word for
REFUSED |= dict.fromkeys(
    "rotary_seq_len_interpolation_factor window_size window_attn_skip_freq softmax_type"
    " no_rope_freq openai_gelu"
    " squared_relu quick_geglu apply_residual_connection_post_layernorm"
    " layernorm_zero_centered_gamma glu_linear_offset"
    " activation_func_clamp_value qk_l2_norm attention_output_gate apply_query_key_layer_scaling"
    " use_mup num_experts"
    " multi_latent_attention experimental_attention_variant heterogeneous_layers_config_path"
    " encoder_num_layers"
    " heterogeneous_layers_config_encoded_json moe_use_upcycling"
    " moe_shared_expert_intermediate_size moe_latent_size"
    " moe_router_score_function moe_router_enable_expert_bias moe_router_num_groups"
    " moe_router_topk_scaling_factor"
    " moe_router_force_load_balancing moe_router_force_biased moe_router_quantile_balancing_ema"
    " moe_layer_freq"
    " moe_apply_probs_on_input moe_mlp_glu_interleave_size".split(),
    "it makes another model than the one in --tsft-model",
)
SAVE_INTERVAL = 200
NEVER = (
    1 << 30
)  # an interval beyond any run: Megatron saves and evaluates once more when training is over


class _Parser(argparse.ArgumentParser):
    """One line for a wrong flag, where argparse would print the usage of some 900 flags first."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists our flags, --help-megatron Megatron's")


def parser_of() -> argparse.ArgumentParser:
    """Megatron's parser with our group."""
    return add_flags(add_megatron_arguments(_Parser(allow_abbrev=False)))


def print_help() -> None:
    """Megatron's flags and ours. Some of Megatron's help texts hold a bare "%", which argparse
    cannot format."""
    parser = parser_of()
    for action in parser._actions:
        try:
            _ = (action.help or "") % (
                vars(action) | {"prog": parser.prog, "type": "", "choices": ""}
            )
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")
    parser.print_help()


def given_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Destination -> value of the flags that are on the command line, defaults left out.

    Raises:
        UserError: an unknown flag, or a value that is none for its flag.
    """
    parser = parser_of()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    parser._defaults.clear()
    return vars(parser.parse_args(list(argv)))


def option_of(name: str) -> str:
    """The first flag that sets a destination, for messages."""
    for action in parser_of()._actions:
        if action.dest == name:
            return action.option_strings[0]
    return f"--{name.replace('_', '-')}"


def refuse_flags(given: dict[str, Any]) -> None:
    """Raise UserError for a flag that cannot work here, with the reason."""
    for name, reason in REFUSED.items():
        if given.get(name):
            raise UserError(f"{option_of(name)} is not supported: {reason}")
    if given.get("dataloader_type", "single") != "single":
        raise UserError(
            f"--dataloader-type {given['dataloader_type']} is not supported: only single resumes"
            " exactly"
        )
    if given.get("ckpt_format", "torch_dist") != "torch_dist":
        raise UserError(
            f"--ckpt-format {given['ckpt_format']} is not supported: only torch_dist loads in any"
            " layout"
        )


def engine_installed() -> bool:
    """Whether Transformer Engine is there."""
    return importlib.util.find_spec("transformer_engine") is not None


def uses_engine(given: dict[str, Any], device: str) -> bool:
    """Whether the layers are Transformer Engine's: Megatron's default, unless it is not
    installed."""
    default = "local" if device == "cpu" or not engine_installed() else "transformer_engine"
    return given.get("transformer_impl", default) != "local"


def check_fused_head(config: TsftConfig, given: dict[str, Any]) -> None:
    """Raise UserError for a flag that makes another output layer than the one --tsft-fuse-head
    takes over."""
    if config.fuse_head and given.get("fp8_output_proj"):
        raise UserError(
            "--fp8-output-proj does not go with --tsft-fuse-head: it computes in FP8, the fused"
            " one in the model's"
            " type; leave one of them out"
        )


def check_card(given: dict[str, Any], card: ModelCard, folder: str) -> None:
    """Raise UserError where a given flag says another architecture than the imported model."""
    wanted = card.megatron_arguments | {"vocab_size": card.vocab_size}
    for name, value in wanted.items():
        if name in given and given[name] != value:
            raise UserError(
                f"{option_of(name)} says {given[name]}, the model in {folder} has {value}: leave"
                " the flag out"
            )


def defaults_for(
    card: ModelCard, config: TsftConfig, device: str, given: dict[str, Any]
) -> dict[str, Any]:
    """What the parser assumes unless a flag says otherwise; destinations of Megatron's argparse."""
    values = EVERY_RUN | card.megatron_arguments
    if card.megatron_arguments.get("num_experts"):
        values |= EXPERTS
        values["sequence_parallel"] = (
            given.get(TP, 1) > 1
        )  # Megatron trains experts on tensor-parallel ranks only so
    if device == "cpu":
        values |= ON_CPU
    else:
        if not engine_installed():
            values |= WITHOUT_TE
        if (
            importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None
        ):  # NVIDIA's Apex, by its own module
            values["gradient_accumulation_fusion"] = False
    values["vocab_size"] = card.vocab_size
    multiple = given.get("make_vocab_size_divisible_by", card.make_vocab_size_divisible_by)
    values["make_vocab_size_divisible_by"] = multiple
    # given outright, because NullTokenizer would count one token more
    values["padded_vocab_size"] = padded_vocab_size(card.vocab_size, multiple * given.get(TP, 1))
    values["pretrained_checkpoint"] = config.model
    if "use_checkpoint_opt_param_scheduler" in given:
        del values["override_opt_param_scheduler"]
    if "save" in given:
        values["load"] = given["save"]  # a run that finds its own checkpoint resumes
    values |= {"save_interval": SAVE_INTERVAL, "eval_interval": NEVER}
    return values


def refused_by_megatron(error: Exception) -> UserError:
    """Megatron's assertion as one line; one without a text is quoted by its source."""
    text = str(error)
    if not text:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{frame.line} ({Path(frame.filename).name}:{frame.lineno})"
    return UserError(f"Megatron refuses these flags: {text}")


def parse(argv: Sequence[str], defaults: dict[str, Any]) -> argparse.Namespace:
    """Megatron's own parse and validation; what it refuses by assertion becomes a UserError.

    Raises:
        UserError: Megatron refuses the combination of flags.
    """

    def extra_args_provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_flags(parser)
        parser.set_defaults(**defaults)
        return parser

    before, sys.argv = (
        sys.argv,
        [sys.argv[0], *argv],
    )  # Megatron reads them there (training/arguments.py, parse_args)
    try:
        return parse_and_validate_args(extra_args_provider)
    except (AssertionError, ValueError) as error:
        raise refused_by_megatron(error) from error
    finally:
        sys.argv = before


def model_config(args: argparse.Namespace, kind: type[GPTModelConfig] = GPTModelConfig) -> Any:
    """Megatron's configuration of a model with packed attention.

    Raises:
        UserError: Megatron refuses the combination of flags.
    """
    from megatron.training import (
        argument_utils,
    )  # upstream/rope_factor.py replaces the function there

    try:
        config = argument_utils.gpt_config_from_args(args, model_config_cls=kind)
    except (AssertionError, ValueError) as error:
        raise refused_by_megatron(error) from error
    if args.transformer_impl == "local":
        if args.cp_comm_type != ["p2p"]:  # Megatron's default
            raise UserError(
                f"--cp-comm-type {' '.join(args.cp_comm_type)} is for Transformer Engine's"
                " attention; local layers"
                " gather keys and values: leave it out"
            )
        config.transformer_layer_spec = packed_local_spec
    return config
