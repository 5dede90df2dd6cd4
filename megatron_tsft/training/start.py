"""Starts Megatron: its own parser and validation, and its configuration of a model. For a run, and
for a teacher that is only asked."""

import argparse
import contextlib
import io
import sys
import traceback
from pathlib import Path
from typing import Any

from megatron.training.arguments import parse_and_validate_args
from megatron.training.models.gpt import GPTModelConfig

from megatron_tsft import upstream
from megatron_tsft.errors import UserError
from megatron_tsft.model.packed_attention import packed_local_spec
from megatron_tsft.plan.config import add_flags
from megatron_tsft.plan.plan import Startup


def start(startup: Startup) -> argparse.Namespace:
    """Megatron's arguments, parsed and validated by Megatron itself.

    Raises:
        UserError: Megatron refuses the combination of flags.
    """
    repairs = upstream.apply_all(asynchronous_saves="--async-save" in startup.argv)
    if not startup.quiet:
        print(f"repairs of Megatron's defects: {', '.join(repairs) or 'none needed'}")

    def extra_args_provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_flags(parser)
        parser.set_defaults(**startup.defaults)
        return parser

    # Megatron reads them there (training/arguments.py, parse_args)
    before, sys.argv = sys.argv, [sys.argv[0], *startup.argv]
    printed = io.StringIO() if startup.quiet else sys.stdout
    try:
        with contextlib.redirect_stdout(printed):  # the list of 800 arguments
            args = parse_and_validate_args(extra_args_provider)
    except (AssertionError, ValueError) as error:
        raise _refused(error) from error
    finally:
        sys.argv = before
    keep_start_weights(args)
    for name, value in startup.settings.items():
        setattr(args, name, value)
    return args


def model_config(args: argparse.Namespace, kind: type[GPTModelConfig] = GPTModelConfig) -> Any:
    """Megatron's configuration of a model with packed attention.

    Raises:
        UserError: Megatron refuses the combination of flags.
    """
    from megatron.training import argument_utils  # upstream/rope_factor.py replaces it there

    try:
        config = argument_utils.gpt_config_from_args(args, model_config_cls=kind)
    except (AssertionError, ValueError) as error:
        raise _refused(error) from error
    if args.transformer_impl == "local":
        if args.cp_comm_type != ["p2p"]:  # Megatron's default
            raise UserError(
                f"--cp-comm-type {' '.join(args.cp_comm_type)} is for Transformer Engine's"
                " attention; local layers gather keys and values: leave it out"
            )
        config.transformer_layer_spec = packed_local_spec
    return config


def _refused(error: Exception) -> UserError:
    """Megatron's assertion as one line; one without a text is quoted by its source."""
    text = " ".join(str(error).split())
    if not text:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{frame.line} ({Path(frame.filename).name}:{frame.lineno})"
    return UserError(f"Megatron refuses these flags: {text}")


def keep_start_weights(args: Any) -> None:
    """Make the fp32 weights of the optimizer out of the checkpoint, where the model itself holds
    FP8 ones.

    args: Megatron's, parsed. With --fp8-param-gather Megatron would make them out of the model's
    FP8 numbers when it loads without an optimizer (training/checkpointing.py, reload_model_params):
    the start weights would be rounded for good. The flag against it has an assertion,
    --no-load-optim, that a run which resumes must not meet; so it is set after the parser. It reads
    the loaded tensors, which are FP8, too, where the loader quantizes as it reads
    (dist_checkpointing/strategies/torch.py, stream_ckpt_dequant). A run that resumes has these
    weights from the optimizer's checkpoint: Megatron then reads neither setting.
    """
    if args.fp8_param_gather or args.fp4_param_gather:
        args.load_main_params_from_ckpt, args.stream_ckpt_dequant = True, False
