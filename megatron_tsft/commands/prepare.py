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
from pathlib import Path
from typing import Any

from megatron_tsft import trust
from megatron_tsft.data.encoding import TOO_LONG, Encoding
from megatron_tsft.data.formats import FORMATS, parse_columns
from megatron_tsft.data.prepare import MAX_REFUSED, heldout_folder, prepare
from megatron_tsft.data.prepared import DataCard, PreparedData
from megatron_tsft.data.report import write_report
from megatron_tsft.data.rows import parsed
from megatron_tsft.data.show import LEGEND, chosen, shown
from megatron_tsft.data.turns import Refusal
from megatron_tsft.data.written import HISTORY_THINKING, SUPERVISE
from megatron_tsft.entry import run_command
from megatron_tsft.errors import UserError

EXAMPLE = """examples:
  tools/prepare_data.py --input train.jsonl --tokenizer SmolLM2-135M-Instruct --output data/train \\
      --max-tokens 4096
  tools/prepare_data.py --input train.jsonl --tokenizer SmolLM2-135M-Instruct --output data/more \\
      --workers 8 --heldout 0.02 --show 3 --report more.html
  tools/prepare_data.py --prepared data/train --tokenizer SmolLM2-135M-Instruct --show 2
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see EXAMPLE."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _input_flags(parser.add_argument_group("input"))
    _encoding_flags(parser.add_argument_group("what becomes of a row"))
    _output_flags(parser.add_argument_group("output"))
    trust.add_flag(parser)
    return parser.parse_args(argv)


def _input_flags(group: Any) -> None:
    group.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="JSONL, JSON, Parquet or Arrow files (also .gz and .zst), folders of them, folders of"
        " saved data sets",
    )
    group.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="the Hugging Face folder of the tokenizer"
    )
    group.add_argument(
        "--format",
        choices=FORMATS,
        default="",
        help="of the rows (default: told from the first ones); preference learns the chosen side",
    )
    group.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="OURS=THEIRS",
        help="what the input calls our columns, as messages=dialog",
    )
    group.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="how many processes tokenise (default: %(default)s)",
    )


def _encoding_flags(group: Any) -> None:
    group.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="the most tokens that a conversation may have (default: any number)",
    )
    group.add_argument(
        "--too-long",
        choices=TOO_LONG,
        default="truncate",
        help="what happens to longer conversations (default: %(default)s)",
    )
    group.add_argument(
        "--chat-template",
        metavar="FILE",
        help="a Jinja file in place of the tokenizer's own chat template",
    )
    group.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        default="{}",
        help="further variables of the template, as '{\"enable_thinking\": false}'; a row's win",
    )
    group.add_argument(
        "--history-thinking",
        choices=HISTORY_THINKING,
        default="template",
        help="conversations whose template drops the thoughts of earlier turns: as the template"
        " writes them, a row for each turn with its thought, or refused (default: %(default)s)",
    )
    group.add_argument(
        "--supervise",
        choices=SUPERVISE,
        default="all",
        help="all assistant turns, the last one, or every token (default: %(default)s)",
    )
    group.add_argument(
        "--date",
        default="",
        metavar="YYYY-MM-DD",
        help="the day that chat templates write (default: today; the card keeps it)",
    )
    group.add_argument(
        "--max-refused",
        type=float,
        default=MAX_REFUSED,
        metavar="SHARE",
        help="the largest share of rows that may be refused (default: %(default)s)",
    )
    group.add_argument(
        "--strict", action="store_true", help="stop at the first row that cannot be used"
    )


def _output_flags(group: Any) -> None:
    group.add_argument("--output", metavar="DIR", help="the prepared folder, which is made")
    group.add_argument(
        "--prepared",
        metavar="DIR",
        help="look at a folder that was prepared before, with --show or --report",
    )
    group.add_argument(
        "--heldout",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="put that share of the conversations, as 0.02, into DIR-heldout instead; equal ones"
        " stay together",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="replace a folder that was prepared before"
    )
    group.add_argument(
        "--show",
        default="0",
        metavar="N|ID",
        help="print the first N conversations, or the one of that sample_id (its first digits do)"
        " with every token: supervised parts in [[...]], weights, token borders",
    )
    group.add_argument(
        "--report",
        metavar="FILE",
        help="write a page (HTML) with counts, histograms and a sample of the conversations",
    )
    group.add_argument("--no-progress", action="store_true", help="show no progress bar")


def variables_of(text: str) -> dict[str, Any]:
    """--chat-template-kwargs. Raises UserError: not a JSON object."""
    try:
        return parsed(text, "--chat-template-kwargs", dict)
    except Refusal as refusal:
        raise UserError(f"{refusal.reason}: {text}") from refusal


def template_of(path: str | None) -> str | None:
    """--chat-template. Raises UserError: the file cannot be read."""
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat-template {path} cannot be read: {error}") from error


def say_prepared(output: Path, card: DataCard) -> None:
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


def look(output: Path, args: argparse.Namespace) -> None:
    """--show and --report of a prepared folder.

    Raises:
        UserError: no conversation has the id, or the folder is of another tokenizer.
    """
    if args.show == "0" and not args.report:
        return
    from megatron_tsft.checkpoint.tokenizer import load_tokenizer, tokenizer_fingerprint

    data, tokenizer = PreparedData.load(output), load_tokenizer(args.tokenizer)
    if tokenizer_fingerprint(tokenizer) != data.card.tokenizer_fingerprint:
        raise UserError(f"{output} was prepared with another tokenizer than {args.tokenizer}")
    if args.report:
        write_report(Path(args.report), data, tokenizer)
        print(f"wrote {args.report}")
    rows = chosen(data, args.show)
    if rows:
        print(LEGEND)
    for row in rows:
        title = f"conversation {row}"
        print(shown(tokenizer, data.row(row), title, everything=not args.show.isdigit()))


def main(argv: list[str] | None = None) -> int:
    """Prepare; the exit status is 0, or 2 for a user's error."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported; workers inherit it
    args = parse(argv)

    def run() -> int:
        if args.report and not Path(args.report).absolute().parent.is_dir():
            raise UserError(f"--report {args.report}: its folder does not exist")
        if args.prepared:
            if args.input or args.output or (args.show == "0" and not args.report):
                raise UserError(
                    "--prepared is for --show and --report of a folder that is there: pass one of"
                    " them, and no --input or --output"
                )
        elif not (args.input and args.output):
            raise UserError(
                "name the rows (--input) and the folder that is made of them (--output), or look at"
                " one that is there (--prepared DIR --show N)"
            )
        else:
            prepare_and_say(Path(args.output), args)
        look(Path(args.prepared or args.output), args)
        return 0

    left = "; nothing is left half-written"
    return run_command(run, name="prepare", left=left, trust=args.trust)


def prepare_and_say(output: Path, args: argparse.Namespace) -> None:
    """Prepare, and print what was written."""
    card = prepare(
        args.input,
        args.tokenizer,
        output,
        max_tokens=args.max_tokens,
        too_long=args.too_long,
        workers=args.workers,
        overwrite=args.overwrite,
        strict=args.strict,
        max_refused=args.max_refused,
        heldout=args.heldout,
        encoding=Encoding(
            template_of(args.chat_template),
            variables_of(args.chat_template_kwargs),
            args.date,
            args.history_thinking,
            args.supervise,
            args.format,
            parse_columns(args.columns),
        ),
        progress=not args.no_progress,
    )
    say_prepared(output, card)
    if args.heldout:
        held = heldout_folder(output)
        card = DataCard.load(held)
        print(f"wrote {held}: {card.conversations} conversations held out, {card.tokens} tokens")
