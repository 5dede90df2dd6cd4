"""A prepared conversation in the terminal: its supervised parts, weights and token borders."""

from typing import Any

from megatron_tsft.data.prepared import PreparedData, Sample
from megatron_tsft.data.token_text import Stretch, TokenTexts, mark_supervised, stretches
from megatron_tsft.errors import UserError

LEGEND = (
    "[[...]] is supervised, xN its weight where it is not 1, │ a token's border, ␣ a space, ↵ a"
    " line's end"
)
VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"})
ID_LENGTH = 32  # hex digits of a sample_id
# tokens at each end of a stretch that are written where not all are
ENDS = {True: 16, False: 4}  # by whether it is supervised


def shown(tokenizer: Any, sample: Sample, title: str, *, everything: bool = False) -> str:
    """A conversation for the terminal.

    Args:
        tokenizer: transformers'.
        sample: the conversation.
        title: what it is called.
        everything: every token's borders, also in the middle of long stretches.
    """
    ids, texts = sample.input_ids.tolist(), TokenTexts(tokenizer)

    def bordered(part: Stretch) -> str:
        pieces = [text.translate(VISIBLE) for text in texts.each(ids[part.start : part.stop])]
        ends = ENDS[part.weight is not None]
        if not everything and len(pieces) > 2 * ends + 1:
            left_out = f" ... {len(pieces) - 2 * ends} tokens ... "
            pieces = [*pieces[:ends], left_out, *pieces[-ends:]]
        text = "│".join(pieces)
        if part.weight is None:
            return text
        return f"[[{text}]]" + ("" if part.weight == 1 else f"x{part.weight:g}")

    return "\n".join(
        [
            f"--- {title}, {len(ids)} tokens, {int(sample.loss_mask.sum())} supervised,"
            f" {sample.sample_id}",
            mark_supervised(tokenizer, sample.input_ids, sample.loss_mask),
            "tokens: " + "│".join(bordered(part) for part in stretches(sample)),
        ]
    )


def chosen(data: PreparedData, which: str) -> list[int]:
    """The rows that --show names: the first N, or those whose sample_id begins so.

    Raises:
        UserError: it is neither a number nor the beginning of an id; no conversation has it.
    """
    if which.isdigit() and len(which) < ID_LENGTH:
        return list(range(min(int(which), len(data))))
    prefix = which.lower()
    if not 0 < len(prefix) <= ID_LENGTH or set(prefix) - set("0123456789abcdef"):
        raise UserError(f"--show {which}: give a number, or a conversation's sample_id")
    rows = [i for i, name in enumerate(data.sample_ids.to_pylist()) if name.startswith(prefix)]
    if not rows:
        raise UserError(f"--show {which}: {data.directory} has no conversation of that sample_id")
    return rows
