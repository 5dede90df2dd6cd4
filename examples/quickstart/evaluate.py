#!/usr/bin/env python3
"""Score a Hugging Face model on held-out conversations: nll a token, teacher-forced exact match,
one greedy answer.

Plain transformers, nothing of the training code: an independent look at what the run left.
"""

import argparse
import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tsft.atomic import write_text
from megatron_tsft.errors import UserError

EXAMPLE = """example:
  examples/quickstart/evaluate.py --model runs/quickstart/hf \\
      --data runs/quickstart/data/heldout.jsonl \\
      --output runs/quickstart/after.json
"""


@dataclass(frozen=True)
class Item:
    """One conversation as token ids: `ids[:prompt]` is read, `ids[prompt:]` (the answer and its
    end) is predicted."""

    question: str
    answer: str
    ids: list[int]
    prompt: int


@dataclass(frozen=True)
class Scores:
    """nll: nats a supervised token; exact: problems whose every answer token, end included, is the
    argmax."""

    problems: int
    tokens: int
    nll: float
    exact: int


def read(path: Path, tokenizer: Any) -> list[Item]:
    """The conversations of a JSONL file: one user message, one assistant message each.

    Raises:
        UserError: the file is missing or a line is something else.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: name a JSONL file of conversations")
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            messages = json.loads(line)["messages"]
            question, answer = (message["content"] for message in messages)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number}: not a row of one user and one assistant message ({error})"
            ) from error
        prompt = tokenizer.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True
        )
        text = prompt + answer + tokenizer.eos_token
        if not tokenizer.apply_chat_template(messages, tokenize=False).startswith(text):
            raise UserError(
                f"{path}:{number}: this chat template does not end an answer with"
                f" {tokenizer.eos_token}"
            )
        ids, start = (
            tokenizer(part, add_special_tokens=False).input_ids for part in (text, prompt)
        )
        if ids[: len(start)] != start:
            raise UserError(
                f"{path}:{number}: the prompt's tokens change when the answer follows; cannot"
                " score it"
            )
        items.append(Item(question, answer, ids, len(start)))
    if not items:
        raise UserError(f"{path} has no conversations")
    return items


@torch.inference_mode()
def score(model: Any, items: list[Item], batch_size: int) -> Scores:
    """Teacher-forced scores, longest conversations first so that a batch holds little padding."""
    total, tokens, exact = 0.0, 0, 0
    ordered = sorted(items, key=lambda item: -len(item.ids))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        width = len(batch[0].ids)
        ids = torch.zeros(
            len(batch), width, dtype=torch.long
        )  # [b, s], padded on the right: causal, so never seen
        answer = torch.zeros(len(batch), width, dtype=torch.bool)  # [b, s]
        for row, item in enumerate(batch):
            ids[row, : len(item.ids)] = torch.tensor(item.ids)
            answer[row, item.prompt : len(item.ids)] = True
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, :-1].float()  # [b, s-1, v]
        labels, wanted = ids[:, 1:], answer[:, 1:]  # [b, s-1]
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        total += nll[wanted].double().sum().item()
        tokens += int(wanted.sum())
        exact += int(((logits.argmax(-1) == labels) | ~wanted).all(1).sum())
        print(f"  scored {min(start + batch_size, len(items))} of {len(items)}", flush=True)
    return Scores(len(items), tokens, total / tokens, exact)


@torch.inference_mode()
def greedy(model: Any, tokenizer: Any, item: Item, max_new_tokens: int) -> str:
    """The model's own answer to one prompt."""
    ids = torch.tensor([item.ids[: item.prompt]])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(out[0, item.prompt :], skip_special_tokens=True).strip()


def evaluate(
    directory: Path, data: Path, batch_size: int, show: int, max_new_tokens: int
) -> dict[str, Any]:
    """Everything that goes into the JSON file.

    Raises:
        UserError: no model or tokenizer in `directory`, no row `show`, or bad data.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} is not a Hugging Face model folder: it has no config.json")
    tokenizer: Any = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    items = read(data, tokenizer)
    if not 0 <= show < len(items):
        raise UserError(f"--show {show}: {data} has rows 0 to {len(items) - 1}")
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(directory), dtype=torch.float32, local_files_only=True
    ).eval()
    scores = score(model, items, batch_size)
    shown = items[show]
    print("  generating one answer", flush=True)
    return {
        "model": str(directory),
        "data_sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
        **asdict(scores),
        "exact_match": scores.exact / scores.problems,
        "question": shown.question,
        "expected": shown.answer,
        "generated": greedy(model, tokenizer, shown, max_new_tokens),
    }


def main(argv: list[str] | None = None) -> int:
    """Parse, evaluate, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="Hugging Face folder"
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FILE", help="JSONL of user/assistant messages"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="JSON file to write"
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, help="conversations at a time (default: 8)"
    )
    parser.add_argument(
        "--show", type=int, default=0, metavar="ROW", help="the row to generate for (default: 0)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=96, help="of that answer (default: 96)"
    )
    args = parser.parse_args(argv)
    try:
        result = evaluate(args.model, args.data, args.batch_size, args.show, args.max_new_tokens)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.output, json.dumps(result, indent=2) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"wrote {args.output}: nll {result['nll']:.4f}, exact {result['exact']} of"
        f" {result['problems']}"
    )
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
