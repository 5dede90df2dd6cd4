"""Tokenise conversations into the folder that training reads: chat template, supervised tokens,
weights.

A line of a JSONL file, or a row of another one, is an object with
  messages            [{"role": ..., "content": ...}, ...], of which the assistant's turns are
                      supervised,
  or prompt and       two strings (raw text, without a template) or two lists of messages, of which
  completion          the completion is supervised,
  or text             raw text, all of it supervised,
or a row of Alpaca (instruction, input, output), ShareGPT (conversations of from and value) or, with
--format preference, of pairs (chosen, rejected),
and, where you like,
  tools               a list of JSON schemas for the chat template,
  chat_template_kwargs  an object of further variables for it,
  weight              a number that weighs the row's tokens; in a message, that turn's,
  critical            [[start, end], ...], spans of a string completion, in characters and without
                      the end; spans of an assistant message stand in that message,
  loss, train         in a message: false keeps its turn as context that is not learnt.
Rows that cannot be used are left out; they are counted and named at the end.
"""

import argparse
import os
from typing import Any

from megatron_tsft.data.chat import mark_supervised
from megatron_tsft.data.formats import FORMATS, parse_columns
from megatron_tsft.data.prepare import MAX_REFUSED, TOO_LONG, Encoding, prepare
from megatron_tsft.data.prepared import DataCard, PreparedData
from megatron_tsft.data.rows import parsed
from megatron_tsft.data.turns import Refusal
from megatron_tsft.data.written import HISTORY_THINKING, SUPERVISE
from megatron_tsft.entry import run_command
from megatron_tsft.errors import UserError

EXAMPLE = """examples:
  tools/prepare_data.py --input train.jsonl --tokenizer SmolLM2-135M-Instruct --output data/train \\
      --max-tokens 4096
  tools/prepare_data.py --input train.jsonl --tokenizer SmolLM2-135M-Instruct --output data/train \\
      --workers 8 --show 3
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see EXAMPLE."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="PATH",
        help="JSONL, JSON, Parquet or Arrow files (also .gz and .zst), folders of them, folders of"
        " saved data sets",
    )
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="the Hugging Face folder of the tokenizer"
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="the prepared folder, which is made"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="",
        help="of the rows (default: told from the first ones); preference learns the chosen side",
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="OURS=THEIRS",
        help="what the input calls our columns, as messages=dialog",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="the most tokens that a conversation may have (default: any number)",
    )
    parser.add_argument(
        "--too-long",
        choices=TOO_LONG,
        default="truncate",
        help="what happens to longer conversations (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="how many processes tokenise (default: %(default)s)",
    )
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="a Jinja file in place of the tokenizer's own chat template",
    )
    parser.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        default="{}",
        help="further variables of the template, as '{\"enable_thinking\": false}'; a row's win",
    )
    parser.add_argument(
        "--history-thinking",
        choices=HISTORY_THINKING,
        default="template",
        help="conversations whose template drops the thoughts of earlier turns: as the template"
        " writes them, a row for each turn with its thought, or refused (default: %(default)s)",
    )
    parser.add_argument(
        "--supervise",
        choices=SUPERVISE,
        default="all",
        help="all assistant turns, the last one, or every token (default: %(default)s)",
    )
    parser.add_argument(
        "--date",
        default="",
        metavar="YYYY-MM-DD",
        help="the day that chat templates write (default: today; the card keeps it)",
    )
    parser.add_argument(
        "--max-refused",
        type=float,
        default=MAX_REFUSED,
        metavar="SHARE",
        help="the largest share of rows that may be refused (default: %(default)s)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a folder that was prepared before"
    )
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first row that cannot be used"
    )
    parser.add_argument(
        "--show",
        type=int,
        default=0,
        metavar="N",
        help="print the first N conversations with their [[supervised]] parts marked",
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    return parser.parse_args(argv)


def variables_of(text: str) -> dict[str, Any]:
    """--chat-template-kwargs. Raises UserError: not a JSON object."""
    try:
        return parsed(text, "--chat-template-kwargs", dict)
    except Refusal as refusal:
        raise UserError(f"{refusal.reason}: {text}") from refusal


def report(output: str, card: DataCard) -> None:
    """Print what was written and what was left out; the same stands in the folder's card."""
    share = 100 * card.supervised_tokens / card.tokens
    print(
        f"wrote {output}: {card.conversations} conversations, {card.tokens} tokens,"
        f" {card.supervised_tokens} supervised ({share:.1f}%), longest {card.longest}"
    )
    weights = ", with token weights" if card.weighted else ""
    print(f"format: {card.made_with['format']}")
    print(f"truncated: {card.truncated}, duplicates (kept): {card.duplicates}{weights}")
    print(f"refused: {sum(card.refused.values())}")
    for reason, count in card.refused.items():
        lines = card.refused_lines[reason]
        more = ", ..." if count > len(lines) else ""
        print(f"  {count}: {reason} (lines {', '.join(map(str, lines))}{more})")


def show(output: str, tokenizer_dir: str, count: int) -> None:
    """Print the first conversations with their supervised parts marked."""
    from megatron_tsft.checkpoint.tokenizer import load_tokenizer

    tokenizer, data = load_tokenizer(tokenizer_dir), PreparedData.load(output)
    for index in range(min(count, len(data))):
        sample = data.row(index)
        print(f"--- conversation {index}, {len(sample.input_ids)} tokens, {sample.sample_id}")
        print(mark_supervised(tokenizer, sample.input_ids, sample.loss_mask))


def main(argv: list[str] | None = None) -> int:
    """Prepare; the exit status is 0, or 2 for a user's error."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported; workers inherit it
    args = parse(argv)

    def run() -> int:
        card = prepare(
            args.input,
            args.tokenizer,
            args.output,
            max_tokens=args.max_tokens,
            too_long=args.too_long,
            workers=args.workers,
            overwrite=args.overwrite,
            strict=args.strict,
            max_refused=args.max_refused,
            encoding=Encoding(
                args.chat_template,
                variables_of(args.chat_template_kwargs),
                args.date,
                args.history_thinking,
                args.supervise,
                args.format,
                parse_columns(args.columns),
            ),
            progress=not args.no_progress,
        )
        report(args.output, card)
        show(args.output, args.tokenizer, args.show)
        return 0

    return run_command(run, name="prepare", left="; nothing is left half-written")
