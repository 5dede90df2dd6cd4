"""Small real inputs of every kind, made as users make them."""

import argparse
import json
import random
import shutil
from pathlib import Path
from typing import Any

TEMPLATE = """{%- if tools -%}
{{ '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}
{%- endif -%}
{%- for m in messages -%}
{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""
DATE = "2026-01-01"
TOP_K = 4
MODEL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}


def save_tokenizer(folder: Path) -> None:
    """Bytes as tokens, with the template of ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate([*special, *alphabet])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=special[1],
        pad_token=special[2],
        additional_special_tokens=special[:1],
        chat_template=TEMPLATE,
    )
    tokenizer.save_pretrained(str(folder))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def rows_of_every_format() -> dict[str, list[dict[str, Any]]]:
    """Format -> rows, no two alike."""
    numbers = range(8)
    pairs = [(f"what is {n} plus {n}?", f"it is {2 * n}.") for n in numbers]
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    return {
        "messages": [
            {
                "messages": [user(q), assistant(a), user("sure?"), assistant("yes", weight=0.5)],
                **({"tools": [tool]} if n % 3 == 0 else {}),
                **({"weight": 2} if n % 3 == 1 else {}),
            }
            for n, (q, a) in enumerate(pairs)
        ],
        "prompt-completion": [
            {"prompt": q, "completion": a, "critical": [[0, 2]]}
            if n % 2
            else {"prompt": [user(q)], "completion": [assistant(a, critical=[[0, 3]])]}
            for n, (q, a) in enumerate(pairs)
        ],
        "sharegpt": [
            {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
            for q, a in pairs
        ],
        "alpaca": [
            {"instruction": q, "input": "so", "output": a, "history": [["hi", f"hello {a}"]]}
            for q, a in pairs
        ],
        "text": [{"text": f"{q} {a}"} for q, a in pairs],
        "preference": [
            {"prompt": q, "chosen": a, "rejected": "no"}
            if n % 2
            else {"chosen": [user(q), assistant(a)], "rejected": [user(q), assistant("no")]}
            for n, (q, a) in enumerate(pairs)
        ],
    }


def save_model(folder: Path) -> None:
    """A random model of two shards, with an index and a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    save_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=259, eos_token_id=1, pad_token_id=2, **MODEL)
    model = LlamaForCausalLM(config)
    model.bfloat16().save_pretrained(str(folder), max_shard_size="14KB")
    assert len(list(folder.glob("*.safetensors"))) > 1


def prepare_folder(rows: list[dict[str, Any]], tokenizer: Path, folder: Path) -> None:
    from megatron_tsft.data.encoding import Encoding
    from megatron_tsft.data.prepare import prepare

    source = folder.with_name(f"{folder.name}.jsonl")
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(source, tokenizer, folder, encoding=Encoding(date=DATE), progress=False)
    source.unlink()


def save_cache(folder: Path, data: Path) -> None:
    """A finished cache of random records, in three shards."""
    import numpy as np

    from megatron_tsft.data.prepared import PreparedData
    from megatron_tsft.data.teacher_rows import TeacherRows
    from megatron_tsft.teacher.format import CacheIdentity
    from megatron_tsft.teacher.plan import plan_cache
    from megatron_tsft.teacher.writer import CacheWriter

    prepared, draw = PreparedData.load(data), np.random.default_rng(0)
    card = prepared.card
    identity = CacheIdentity(
        "teacher", "0" * 16, card.tokenizer_fingerprint, 259, TOP_K, 1.0, "fp32", [card.fingerprint]
    )
    plan = plan_cache([prepared], TOP_K, 400)
    writer = CacheWriter(folder, identity, plan)
    writer.begin()

    def record(tokens: int) -> TeacherRows:
        ids = np.array([draw.permutation(259)[:TOP_K] for _ in range(tokens)], np.int32)
        logprobs = -np.sort(draw.random((tokens, TOP_K)) + 1.5, axis=1)
        return TeacherRows(
            ids.reshape(tokens, TOP_K),
            logprobs.astype(np.float16),
            label_logp=(-draw.random(tokens) - 1).astype(np.float16),
            tail_logmass=(-draw.random(tokens) - 1).astype(np.float32),
        )

    for shard in range(plan.shards):
        members = range(plan.starts[shard], plan.starts[shard + 1])
        writer.write_shard(shard, [record(int(plan.supervised[i])) for i in members])
    writer.finish()


def save_run(folder: Path, imported: Path) -> None:
    """A run's folder: a checkpoint of iteration 5 with its lists, the card, and what the data
    taught."""
    import torch

    from megatron_tsft.checkpoint.card import copy_card
    from megatron_tsft.checkpoint.folder import TRACKER
    from megatron_tsft.checkpoint.manifest import data_files, write_list
    from megatron_tsft.checkpoint.served import Served

    copy_card(imported, folder)
    checkpoint = folder / "iter_0000005"
    shutil.copytree(imported / "release", checkpoint)
    # where older versions of Megatron keep what is no tensor
    torch.save({"args": argparse.Namespace(seed=1, seq_length=64)}, checkpoint / "common.pt")
    write_list(checkpoint, data_files(checkpoint))
    Served({"<|im_end|>": 1}, TEMPLATE).save(folder)
    (folder / TRACKER).write_text("5")


def save_metrics(path: Path) -> None:
    """Twelve steps and three evaluations."""
    draw, rows = random.Random(0), []
    for step in range(1, 13):
        row = {"step": step, "loss": draw.random(), "tokens": draw.randrange(10**6), "lr": 1e-5}
        rows.append(row | {"grad_norm": None})
        if step % 4 == 0:
            rows.append({"step": step, "split": "heldout", "nll": draw.random()})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
