#!/usr/bin/env python3
"""What fine-tuning with this package costs beside plain Megatron: a training step, and the way to
the first one.

Steps: Megatron's own train_step with a random model, on the same packs in turn with Megatron's own
cross-entropy and with one of our objectives; the learning rate is 0, so that every step does the
same. Start-up: processes that train one step and end, in turn ours and a plain one (its data is
Megatron's mock data), from the same checkpoint. All runs on the CPU, one thread a process; ratios
are of pairs that ran one after the other, in changing order. Writes step.json (every pair) and
step.md into the output folder.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import resource
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from megatron_tsft.atomic import write_text
from megatron_tsft.errors import UserError
from shared import command
from shared.machine import environment
from shared.report import markdown_table

EXAMPLE = """examples:
  benchmarks/step.py --output runs/step
  benchmarks/step.py --output runs/step --parts steps --objectives target-sft gem --dtypes bf16
  benchmarks/step.py --output runs/step --parts startup --startup-models tiny smollm2-135m \\
      --startup-pairs 5
"""


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    vocabulary: int


SHAPES = {"smollm2-135m": Shape(30, 576, 1536, 9, 3, 49152), "tiny": Shape(4, 64, 96, 4, 2, 128)}
POSITIONS = 2048
OBJECTIVES: dict[str, dict[str, float]] = {
    "target-sft": {"eta": 0.0},
    "gem": {},
    "sft": {},
    "dft": {},
}
CONTROL = "plain"  # Megatron's cross-entropy against itself: how far from 1 noise alone goes
DTYPES = ("fp32", "bf16")
PARTS = ("steps", "startup")
LIMITS = {"steps": 1.02, "startup": 1.05}  # of the median ratio of CPU times
VERSIONS = ("torch", "megatron-core", "transformers", "datasets")
PLAIN = "--plain-megatron"  # the tool starts itself with this as the plain process
STARTUP_BATCH = (
    "--seq-length 64 --micro-batch-size 1 --global-batch-size 1 --train-iters 1 --lr 1e-5".split()
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see EXAMPLE."""
    parser = command.parser(__doc__, EXAMPLE)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the two files")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: both"
    )
    parser.add_argument(
        "--objectives",
        nargs="+",
        choices=[CONTROL, *OBJECTIVES],
        default=[CONTROL, *OBJECTIVES],
        help="default: all",
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: both"
    )
    parser.add_argument(
        "--model",
        choices=SHAPES,
        default="smollm2-135m",
        help="of the steps (default: %(default)s)",
    )
    parser.add_argument(
        "--seq-length", type=int, default=256, metavar="N", help="of a pack (default: %(default)s)"
    )
    parser.add_argument(
        "--packs",
        type=int,
        default=2,
        metavar="N",
        help="micro-batches a step (default: %(default)s)",
    )
    parser.add_argument(
        "--supervised",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="of the tokens; ours skips the others, Megatron does not (default: %(default)g)",
    )
    parser.add_argument(
        "--pairs", type=int, default=10, metavar="N", help="of steps a row (default: %(default)s)"
    )
    parser.add_argument(
        "--startup-models", nargs="+", choices=SHAPES, default=["tiny"], help="default: tiny"
    )
    parser.add_argument(
        "--startup-pairs",
        type=int,
        default=5,
        metavar="N",
        help="of processes (default: %(default)s)",
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    args.command = command.command_line("benchmarks/step.py", argv)
    return args


def check(args: argparse.Namespace) -> None:
    """Raise UserError for a number that cannot be."""
    for name in ("seq_length", "packs", "pairs", "startup_pairs"):
        if getattr(args, name) < 1:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: it must be at least 1"
            )
    if args.seq_length > POSITIONS:
        raise UserError(f"--seq-length {args.seq_length}: the model has {POSITIONS} positions")
    if not 0 < args.supervised <= 1:
        raise UserError(f"--supervised {args.supervised:g}: it is a share, above 0 and at most 1")
    command.check_output(args.output)


# ---- plain Megatron ------------------------------------------------------------------------------


def megatron_flags(shape: Shape) -> list[str]:
    """Megatron's flags for this Llama on one CPU rank, in the words of its command line."""
    text = f"""
        --num-layers {shape.layers} --hidden-size {shape.hidden} --ffn-hidden-size {shape.ffn}
        --num-attention-heads {shape.heads} --group-query-attention
        --num-query-groups {shape.groups}
        --kv-channels {shape.hidden // shape.heads} --max-position-embeddings {POSITIONS}
        --position-embedding-type rope
        --rotary-base 10000 --normalization RMSNorm --norm-epsilon 1e-5
        --swiglu --disable-bias-linear
        --tokenizer-type NullTokenizer --vocab-size {shape.vocabulary - 1}
        --make-vocab-size-divisible-by 128
        --hidden-dropout 0 --attention-dropout 0 --calculate-per-token-loss
        --dataloader-type single --num-workers 0
        --transformer-impl local --distributed-backend gloo --use-cpu-initialization
        --no-gradient-accumulation-fusion
        --no-persist-layer-norm --no-masked-softmax-fusion --no-rope-fusion
        --lr-decay-style constant --eval-iters 0 --eval-interval 1000 --log-interval 1"""
    return text.split()  # NullTokenizer adds its end token to the vocabulary: one less


def plain_loss(loss_mask: Any, output: Any) -> tuple[Any, Any, dict[str, Any]]:
    """What Megatron's pretrain_gpt.py makes of its model's per-token losses."""
    import torch
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import get_args

    losses, mask = output.view(-1).float(), loss_mask.view(-1).float()
    loss = torch.sum(losses * mask)
    tokens = mask.sum().clone().detach().to(torch.int)
    options: Any = get_args()
    if options.check_for_nan_in_loss_and_grad:
        checker: Any = get_rerun_state_machine()
        for wrong in (torch.isnan, torch.isinf):
            checker.validate_result(
                result=loss,
                rejection_func=wrong,
                message="loss of a micro-batch",
                tolerance=0.0,
                fatal=True,
            )
    return loss, tokens, {"loss": torch.cat([loss.clone().detach().view(1), tokens.view(1)])}


def plain_step(
    data_iterator: Iterator[dict[str, Any]], model: Any
) -> tuple[Any, Callable[..., Any]]:
    """The forward step of Megatron's pretrain_gpt.py; packs come with the lengths of their
    documents."""
    from megatron.training import get_timers

    timers: Any = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = next(data_iterator)
    timers("batch-generator").stop()
    packed = {}
    if "lengths" in batch:
        from megatron_tsft.model.packed_attention import packed_sequences

        packed = {"packed_seq_params": packed_sequences(batch["lengths"].tolist(), "cpu")}
    mask = batch.get("attention_mask")
    output = model(batch["tokens"], batch["position_ids"], mask, labels=batch["labels"], **packed)
    return output, partial(plain_loss, batch["loss_mask"])


def mock_datasets(samples: Any, vp_stage: int | None = None) -> Any:
    """Megatron's mock data, as its pretrain_gpt.py builds it."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import get_args

    args: Any = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split=args.split,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
    )
    return BlendedMegatronDatasetBuilder(MockGPTDataset, samples, lambda: True, config).build()


def prepare_megatron() -> None:
    """The two things without which Megatron's wheel does not start on a CPU; before megatron is
    imported."""
    from megatron_tsft import cpu

    cpu.install()
    from megatron_tsft.upstream import dataset_helpers

    dataset_helpers.apply()


def parsed(argv: list[str]) -> tuple[Any, Any]:
    """Megatron's (arguments, model configuration)."""
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_and_validate_args

    sys.argv = [sys.argv[0], *argv]  # where Megatron reads them
    args: Any = parse_and_validate_args()
    return args, gpt_config_from_args(args)


def train_plainly(argv: list[str]) -> None:
    """Megatron's pretrain() and nothing of ours but the CPU layer."""
    prepare_megatron()
    import torch
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    args, config = parsed(argv)
    mock_datasets.is_distributed = True  # pyright: ignore[reportFunctionMemberAccess]  # where Megatron looks for it
    pretrain(
        pretrain_cfg_container_from_args(args, config),
        mock_datasets,
        ModelType.encoder_or_decoder,
        plain_step,
    )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


# ---- steps ---------------------------------------------------------------------------------------


def make_packs(shape: Shape, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What a data loader would hand over: [1, s] tensors, four documents a pack, each with an
    unsupervised prompt."""
    import torch

    draw, packs = torch.Generator().manual_seed(0), []
    for index in range(args.packs):
        size = args.seq_length
        cuts = (
            (torch.randperm(size - 1, generator=draw)[:3] + 1).sort().values.tolist()
            if size > 3
            else []
        )
        lengths = [b - a for a, b in itertools.pairwise([0, *cuts, size])]
        positions = torch.cat([torch.arange(n) for n in lengths])
        tokens = torch.randint(shape.vocabulary, (size + 1,), generator=draw)
        prompt = torch.cat(
            [torch.arange(n) < n - max(1, round(args.supervised * n)) for n in lengths]
        )
        rows = {
            "tokens": tokens[:-1],
            "position_ids": positions,
            "labels": tokens[1:].masked_fill(prompt, -100),
        }
        rows["lengths"], rows["index"] = torch.tensor(lengths), torch.tensor(index)
        packs.append({name: values.unsqueeze(0) for name, values in rows.items()})
    return packs


def plain_pack(pack: dict[str, Any]) -> dict[str, Any]:
    """The same as Megatron's data sets have it: a mask, and a label that exists under it."""
    kept = {"loss_mask": (pack["labels"] >= 0).float(), "labels": pack["labels"].clamp(min=0)}
    return pack | kept | {"lengths": pack["lengths"][0]}


class Trainer:
    """Megatron's model, optimizer and train_step."""

    def __init__(self, shape: Shape, dtype: str, args: argparse.Namespace):
        prepare_megatron()
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.enums import ModelType
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.utils import get_model_config
        from megatron.training import training
        from megatron.training.argument_utils import pretrain_cfg_container_from_args

        from megatron_tsft.model.packed_attention import packed_local_spec

        batch = (
            f"--seq-length {args.seq_length} --micro-batch-size 1 --global-batch-size {args.packs}"
        )
        run = f"{batch} --train-iters 1000 --lr 0 --min-lr 0".split()
        run += ["--bf16"] if dtype == "bf16" else []
        self.args, model_config = parsed([*megatron_flags(shape), *run])
        model_config.transformer_layer_spec = packed_local_spec
        container = pretrain_cfg_container_from_args(self.args, model_config)
        training.initialize_megatron()
        built: Any = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            cfg_container=container,
            pg_collection=training.ProcessGroupCollection.use_mpu_process_groups(),
        )
        self.model, self.optimizer, self.scheduler = built
        self.model[0].train()
        self.config = get_model_config(self.model[0])
        # these two as Megatron's train() does
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads
        self.schedule, self.train_step, self.done = (
            get_forward_backward_func(),
            training.train_step,
            0,
        )

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model[0].parameters())

    def step(self, forward_step: Any, packs: Any) -> dict[str, float]:
        """One step: its seconds, its loss, its gradient's norm."""
        self.args.curr_iteration = self.done
        cpu, wall = time.process_time(), time.perf_counter()
        rest = (self.model, self.optimizer, self.scheduler, self.config, self.schedule)
        result: Any = self.train_step(forward_step, packs, *rest, iteration=self.done)
        seconds = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        metrics, skipped, *_, norm, _, _ = result
        assert not skipped, "the optimizer took no step"
        self.done += 1
        return seconds | {"loss": float(metrics["loss"]), "grad_norm": float(norm)}


def our_step(name: str, shape: Shape) -> Any:
    """The forward step of our training loop."""
    from megatron_tsft import objectives
    from megatron_tsft.model.target_step import TargetStep
    from megatron_tsft.plan.run_objectives import RunObjectives
    from megatron_tsft.training.forward_step import ForwardStep

    objective = objectives.get(name, **OBJECTIVES[name])
    plan = RunObjectives(["packs"], [objective], objective)
    step = TargetStep(plan, shape.vocabulary, "cpu", where=lambda index: f"pack {index}")
    return ForwardStep(step)


def measure_steps(dtype: str, args: argparse.Namespace, log: str, pipe: Any) -> None:
    """The body of a measuring process: sends the model's size, then (objective, pair) one by one,
    then None."""
    with Path(log).open("wb", buffering=0) as file:  # what Megatron says would bury the result
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    shape = SHAPES[args.model]
    trainer, packs = Trainer(shape, dtype, args), make_packs(shape, args)
    from megatron.core.rerun_state_machine import RerunDataIterator

    pipe.send(trainer.parameters)

    def iterator(kind: list[dict[str, Any]]) -> Any:
        return RerunDataIterator(itertools.cycle(kind))  # what Megatron's own data iterators are

    plain = (plain_step, iterator([plain_pack(pack) for pack in packs]))
    for name in args.objectives:
        other = plain if name == CONTROL else (our_step(name, shape), iterator(packs))
        for number in range(-1, args.pairs):  # the first pair warms up
            sides = [("plain", plain), ("ours", other)]
            pair = {
                side: trainer.step(*what) for side, what in (sides if number % 2 else sides[::-1])
            }
            pipe.send((name, pair if number >= 0 else None))
    pipe.send(None)


def steps_of(dtype: str, args: argparse.Namespace, folder: Path, bar: Any) -> list[dict[str, Any]]:
    """A row for each objective, measured in a new process."""
    context, log = multiprocessing.get_context("spawn"), folder / "steps.log"
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=measure_steps, args=(dtype, args, str(log), theirs))
    take_address()
    process.start()
    theirs.close()
    found: dict[str, list[Any]] = {name: [] for name in args.objectives}
    parameters = 0
    try:
        parameters = ours.recv()
        while (message := ours.recv()) is not None:
            name, pair = message
            found[name] += [pair] if pair else []
            bar.set_postfix_str(f"{dtype} {name}")
            bar.update()
        process.join()
    except EOFError:
        process.join()
        raise RuntimeError(f"the measuring process failed:\n{tail(log)}") from None
    finally:
        process.kill()
    common = {"dtype": dtype, "model": args.model, "parameters": parameters}
    return [
        common | {"objective": name, "arguments": OBJECTIVES.get(name, {})} | summary(pairs)
        for name, pairs in found.items()
    ]


# ---- start-up ------------------------------------------------------------------------------------


def make_inputs(shape: Shape, folder: Path) -> tuple[Path, Path]:
    """(imported random model, prepared conversations), both made here."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    from megatron_tsft.checkpoint.convert import import_hf
    from megatron_tsft.data.prepare import prepare

    transformers.utils.logging.disable_progress_bar()
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(100))]
    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(str(folder / "hf"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(
        str(folder / "hf")
    )
    draw = random.Random(0)
    rows = [
        {
            "prompt": " ".join(draw.choices(words[3:], k=8)),
            "completion": " ".join(draw.choices(words[3:], k=12)),
        }
        for _ in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    import_hf(folder / "hf", folder / "base", progress=False)
    prepare(folder / "rows.jsonl", folder / "hf", folder / "data", progress=False)
    return folder / "base", folder / "data"


def run_process(line: list[str], log: Path) -> dict[str, float]:
    """Seconds of a process that trains one step from the checkpoint, from its start to its end."""
    take_address()
    with log.open("w") as file:
        before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        code = subprocess.run(line, stdout=file, stderr=file).returncode
        wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_CHILDREN)
    text = log.read_text(errors="replace")
    for needed in ("successfully loaded checkpoint", "iteration        1/       1"):
        if code or needed not in text:
            raise RuntimeError(
                f"{shlex.join(line[1:3])}: exit status {code}, expected '{needed}' in\n{tail(log)}"
            )
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu": cpu, "wall": wall}


def startup_of(model: str, args: argparse.Namespace, folder: Path, bar: Any) -> dict[str, Any]:
    """The row of one model."""
    shape, place = SHAPES[model], folder / model
    place.mkdir()
    base, data = make_inputs(shape, place)
    plain = [
        sys.executable,
        str(Path(__file__).resolve()),
        PLAIN,
        *megatron_flags(shape),
        *STARTUP_BATCH,
    ]
    plain += ["--mock-data", "--pretrained-checkpoint", str(base)]
    ours = [
        sys.executable,
        "-m",
        "megatron_tsft.training.pretrain_gpt",
        *STARTUP_BATCH,
        "--tsft-device",
        "cpu",
    ]
    ours += ["--lr-decay-style", "constant", "--tsft-model", str(base), "--tsft-data", str(data)]
    # as much is printed on both sides
    ours += ["--tsft-objective", "target-sft", "--tsft-args", "eta=0", "--tsft-verbose"]
    pairs = []
    for number in range(
        -1, args.startup_pairs
    ):  # the first pair warms up: bytecode, the files in memory
        sides = [("plain", plain), ("ours", ours)]
        pair = {}
        for side, line in sides if number % 2 else sides[::-1]:
            bar.set_postfix_str(f"start-up {model} {side}")
            pair[side] = run_process(line, place / f"{side}.log")
        pairs += [pair] if number >= 0 else []
        bar.update()
    return {
        "model": model,
        "objective": "target-sft",
        "arguments": OBJECTIVES["target-sft"],
    } | summary(pairs)


# ---- results -------------------------------------------------------------------------------------


def take_address() -> None:
    """Make processes that are started from now on the only rank of a job of their own, at a free
    port."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": "0",
        "WORLD_SIZE": "1",
    }


def tail(log: Path) -> str:
    return (
        "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        if log.exists()
        else "no output"
    )


def quartiles(values: list[float]) -> dict[str, float]:
    first, median, third = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {"median": median, "min": min(values), "q1": first, "q3": third, "max": max(values)}


def summary(pairs: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Ratios ours / plain of each pair, by their quartiles; the medians of both sides; every
    pair."""
    result: dict[str, Any] = {"pairs": pairs}
    for clock in ("cpu", "wall"):
        result[f"{clock}_ratio"] = quartiles(
            [pair["ours"][clock] / pair["plain"][clock] for pair in pairs]
        )
        for side in ("plain", "ours"):
            result[f"{side}_{clock}"] = statistics.median(pair[side][clock] for pair in pairs)
    return result


def cells(row: dict[str, Any], limit: float) -> list[str]:
    """Numbers of one row, as text."""
    cpu, wall = row["cpu_ratio"], row["wall_ratio"]
    verdict = "" if row["objective"] == CONTROL else "met" if cpu["median"] <= limit else "not met"
    spread = (f"{cpu[name]:.3f}" for name in ("min", "q1", "q3", "max"))
    times = f"{row['plain_cpu']:.2f}", f"{row['ours_cpu']:.2f}"
    numbers = [
        str(len(row["pairs"])),
        *times,
        f"{cpu['median']:.3f}",
        *spread,
        f"{wall['median']:.3f}",
    ]
    return [*numbers, f"<= {limit:g} {verdict}".strip() if verdict else ""]


HEAD = [
    "pairs",
    "plain CPU s",
    "ours CPU s",
    "CPU ratio",
    "min",
    "q1",
    "q3",
    "max",
    "wall ratio",
    "to reach",
]
STEPS_TEXT = """\
One call of Megatron's train_step (gradients zeroed, forward and backward of {packs} packs of
{seq_length} tokens, clipping, Adam), {share:.0%} of the tokens supervised. "{control}" is
Megatron's cross-entropy against itself: noise."""
STARTUP_TEXT = """\
A process that loads an imported model, trains one step and ends, from its start to its end; neither
side saves. Ours reads a prepared data set, the plain one makes Megatron's mock data. Both load the
same checkpoint."""


def markdown(result: dict[str, Any]) -> str:
    """The whole run, to be read."""
    where, options = result["environment"], result["options"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    parts = [
        "# Training beside plain Megatron",
        f"{result['date']}, {where['device_name']}, {where['cores']} cores, {where['threads']}"
        f" thread; {versions}",
        f"    {result['command']}",
        "Ratios are ours / plain Megatron of pairs of runs, in turn; the CPU ratio is the median"
        " of the pairs' ratios.",
    ]
    if result["steps"]:
        text = STEPS_TEXT.format(**options, share=options["supervised"], control=CONTROL)
        size = (
            f"{result['steps'][0]['model']}, {result['steps'][0]['parameters'] / 1e6:.1f} million"
            " parameters"
        )
        rows = [
            [row["dtype"], titled(row), *cells(row, LIMITS["steps"])] for row in result["steps"]
        ]
        parts += [
            "## A step",
            f"{size}. {text}",
            markdown_table(["dtype", "objective", *HEAD], rows),
        ]
    if result["startup"]:
        rows = [
            [row["model"], titled(row), *cells(row, LIMITS["startup"])] for row in result["startup"]
        ]
        parts += [
            "## To the first step",
            STARTUP_TEXT,
            markdown_table(["model", "objective", *HEAD], rows),
        ]
    return "\n\n".join(parts) + "\n"


def titled(row: dict[str, Any]) -> str:
    return " ".join(
        [row["objective"], *(f"{name}={value:g}" for name, value in row["arguments"].items())]
    )


def benchmark(args: argparse.Namespace) -> None:
    """Measure; what is complete is written after each process of steps and each model's
    start-up."""
    from tqdm import tqdm

    check(args)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": args.command,
        "environment": environment("cpu", 1, VERSIONS),
        "options": {name: getattr(args, name) for name in ("seq_length", "packs", "supervised")},
        "shapes": {
            name: asdict(SHAPES[name]) for name in dict.fromkeys([args.model, *args.startup_models])
        },
        "limits": LIMITS,
        "steps": [],
        "startup": [],
    }
    steps = (
        len(args.dtypes) * len(args.objectives) * (args.pairs + 1) if "steps" in args.parts else 0
    )
    starts = len(args.startup_models) * (args.startup_pairs + 1) if "startup" in args.parts else 0
    layout = "{percentage:3.0f}% {elapsed}<{remaining} {postfix}"

    def write() -> None:
        write_text(folder / "step.json", json.dumps(result, indent=1) + "\n")
        write_text(folder / "step.md", markdown(result))

    with (
        tempfile.TemporaryDirectory() as scratch,
        tqdm(
            total=steps + starts, disable=args.no_progress, bar_format=layout, file=sys.stderr
        ) as bar,
    ):
        for dtype in args.dtypes if steps else []:
            result["steps"] += steps_of(dtype, args, Path(scratch), bar)
            write()
        for model in args.startup_models if starts else []:
            result["startup"].append(startup_of(model, args, Path(scratch), bar))
            write()
    print(markdown(result))
    print(command.wrote(folder, "step.json", "step.md"))


@command.says_errors
def main(argv: list[str] | None = None) -> int:
    """Benchmark; the exit status is 0, or 2 for a user's error."""
    argv = sys.argv[1:] if argv is None else argv
    # one thread, no GPU, no hub, here and in every process that is started
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    if argv[:1] == [PLAIN]:
        train_plainly(argv[1:])
        return 0
    args = parse(argv)
    benchmark(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
