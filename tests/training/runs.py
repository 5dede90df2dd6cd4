"""Training runs for the tests: a tiny Llama, prepared data, and a server that runs Megatron's real
loop on gloo."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Run:
    """What a training command left: exit status of each rank, what rank 0 said, the rows of
    metrics.jsonl."""

    codes: list[int]
    logs: list[str]
    save: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Training rows by step."""
        return [row for row in self._all if "split" not in row]

    @property
    def heldout(self) -> list[dict[str, Any]]:
        return [row for row in self._all if row.get("split") == "heldout"]

    @property
    def _all(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.save / "metrics.jsonl").read_text().splitlines()]

    @property
    def error(self) -> str:
        """The line that starts with "error:"; empty without one."""
        return next((line for line in self.logs[0].splitlines() if line.startswith("error:")), "")


class Server:
    """tests/training/rank_server.py, started once a session."""

    def __init__(self) -> None:
        environment = os.environ | {
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        program = Path(__file__).with_name("rank_server.py")
        self.process = subprocess.Popen(
            [sys.executable, str(program)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == "ready"

    def run(
        self, world: int, argv: list[str], log: Path, timeout: float, tool: str = ""
    ) -> list[int]:
        assert self.process.stdin is not None and self.process.stdout is not None
        case = {"world": world, "argv": argv, "log": str(log), "timeout": timeout, "tool": tool}
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())["codes"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


WORDS = 60
MODEL: dict[str, Any] = {
    "vocab_size": WORDS
    + 7,  # padded to 128 at TP 1; at TP 2 to 256, so that a whole shard is padding
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}
CHAT_TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"


def make_tokenizer() -> Any:
    """A word-level tokenizer."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = [
        "<unk>",
        "<s>",
        "</s>",
        "plus",
        "is",
        "user",
        "assistant",
        *(f"w{i}" for i in range(WORDS)),
    ]
    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, chat_template=CHAT_TEMPLATE, **special
    )


def make_hf(folder: Path, architecture: str = "LlamaForCausalLM", **overrides: Any) -> Path:
    """A random model (a Llama unless told otherwise) with peaked predictions and a word-level
    tokenizer, as a Hugging Face folder."""
    import transformers

    config = getattr(transformers, architecture.replace("ForCausalLM", "Config"))(
        **(MODEL | overrides)
    )
    return _save(getattr(transformers, architecture)(config), folder)


# four experts, two a token
QWEN3_MOE: tuple[str, dict[str, Any]] = (
    "Qwen3MoeForCausalLM",
    {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    }
    | {"decoder_sparse_step": 1, "mlp_only_layers": []},
)


def make_moe(folder: Path) -> Path:
    """The same with experts."""
    architecture, config = QWEN3_MOE
    return make_hf(folder, architecture, **config)


def _save(model: Any, folder: Path) -> Path:
    """Give a model its random weights and save it with the tokenizer."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.25 * noise)
    model.save_pretrained(str(folder))
    make_tokenizer().save_pretrained(str(folder))
    return folder


def write_rows(path: Path, count: int, seed: int, **extra: Any) -> Path:
    """Completion-only rows of different lengths: the completion repeats the prompt, shifted by one
    word."""
    import random

    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            start, length = draw.randrange(WORDS), draw.randrange(3, 14)
            words = [f"w{(start + i) % WORDS}" for i in range(length)]
            row = {
                "prompt": " ".join(words) + " plus is",
                "completion": " " + " ".join(words[1:] + words[:1]),
            }
            file.write(json.dumps(row | extra) + "\n")
    return path


@dataclass(frozen=True)
class World:
    """A session's folders: hf (the model), base (imported), train and held (prepared)."""

    root: Path

    @property
    def hf(self) -> Path:
        return self.root / "hf"

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def train(self) -> Path:
        return self.root / "train"

    @property
    def held(self) -> Path:
        return self.root / "held"


Train = Callable[..., Run]
Cache = Callable[..., Path]
CACHE_TOOL = REPOSITORY / "tools" / "cache_teacher.py"
BATCH = (
    "--seq-length 64 --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --lr-decay-style constant"
)


# torchrun's words for a free port of this machine
RENDEZVOUS = "--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1".split()


def under_torchrun(
    base: Path, data: Path, save: Path, steps: int, *flags: str, ranks: int = 2
) -> list[str]:
    """A training command on the CPU, as the launcher starts it."""
    words = [sys.executable, "-m", "megatron_tsft.commands.torchrun", *RENDEZVOUS]
    words += ["--nproc-per-node", str(ranks), "-m", "megatron_tsft.training.pretrain_gpt"]
    words += [*BATCH.split(), "--tsft-model", str(base), "--tsft-data", str(data)]
    words += ["--tsft-objective", "sft", "--tsft-device", "cpu", "--save", str(save)]
    return [*words, "--train-iters", str(steps), *flags]


def step_values(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what depends on the clock."""
    return [
        {key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows
    ]


def weights(save: Path, step: int) -> dict[str, bytes]:
    """Every tensor of a checkpoint, model and optimizer, as bytes."""
    import torch
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from megatron_tsft.checkpoint.torch_dist_reader import CheckpointReader

    reader = CheckpointReader(save / f"iter_{step:07d}")
    found = {}
    for key, value in reader.metadata.state_dict_metadata.items():
        if isinstance(value, TensorStorageMetadata):
            whole = reader.read(key, (0,) * len(value.size), tuple(value.size))
            found[key] = whole.reshape(-1).view(torch.uint8).numpy().tobytes()
    return found


def check_ran(run: Run) -> Run:
    """Assert that every rank ended well; shows the end of the log that has a traceback, else rank
    0's."""
    worst = next((log for log in run.logs if "Traceback" in log), run.logs[0])
    assert run.codes == [0] * len(run.codes), worst[-3000:]
    return run
