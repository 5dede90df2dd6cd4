"""Import and export hold about one tensor: anonymous memory stays far below the size of the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_tsft.checkpoint.families.llama import FAMILY
from megatron_tsft.checkpoint.mapping import Shape, sizes
from megatron_tsft.checkpoint.safetensors_stream import SafetensorsStream

ROOT = Path(__file__).resolve().parents[2]
MEGABYTE = 2**20

# prints the largest growth of anonymous memory (not mapped files) while one function of convert runs, in bytes
MEASURE = """
import sys, threading
from transformers import AutoConfig, LlamaConfig  # imported before the measurement starts
from megatron_tsft.checkpoint import convert
def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
start, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch)
thread.start()
getattr(convert, sys.argv[1])(sys.argv[2], sys.argv[3], progress=False)
done.set()
thread.join()
print(peak - start)
"""


def write_model(folder: Path) -> int:
    """A bf16 Llama of 8 layers and its bytes, written without ever being in memory as a whole."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=16000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(str(folder))
    arguments = FAMILY.arguments(config)
    shapes: dict[str, Shape] = {}
    for row in FAMILY.active_rows(arguments):
        for index in row.indices(arguments):
            shapes |= zip(row.names(index), row.shapes(sizes(arguments, 16000)), strict=True)
    announced = {name: (shape, torch.bfloat16) for name, shape in shapes.items()}
    with SafetensorsStream(folder / "model.safetensors", announced) as stream:
        for name, shape in shapes.items():
            stream.write(name, torch.randn(shape, dtype=torch.bfloat16))
    return sum(torch.Size(shape).numel() * 2 for shape in shapes.values())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
def test_anonymous_memory_is_bounded_by_a_tensor(tmp_path: Path) -> None:
    total = write_model(tmp_path / "hf")
    assert total > 800 * MEGABYTE
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    peaks = {}
    for name, source, target in (("import_hf", "hf", "megatron"), ("export_hf", "megatron", "back")):
        line = [sys.executable, "-c", MEASURE, name, str(tmp_path / source), str(tmp_path / target)]
        done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr
        peaks[name] = int(done.stdout)
    print(json.dumps({"model": total} | peaks))
    # the largest tensor has 66 MB; a writer that kept the last tensor of every key would hold 250 MB
    assert all(peak < 200 * MEGABYTE for peak in peaks.values()), peaks
