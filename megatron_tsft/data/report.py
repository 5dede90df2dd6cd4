"""What a prepared folder holds, as a page: counts, histograms, and a sample of its conversations
with every token's border, and what is learnt of it."""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_tsft import pages
from megatron_tsft.data.prepared import DataCard, PreparedData, Sample
from megatron_tsft.data.token_text import Stretch, TokenTexts, stretches

SAMPLE = 50  # conversations of a page, evenly from the whole folder
TOKENS = 4000  # of a conversation that are written
STYLE = """
.tokens i { font-style: normal; border-right: 1px solid var(--line); }
.tokens b { font-weight: inherit; background: var(--learnt-paper);
  border-bottom: 2px solid var(--learnt); }
.tokens b.negative { border-bottom-style: dotted; } .tokens b.none { background: none;
  border-bottom-style: dashed; } .tokens small { color: var(--quiet); }
"""


def write_report(path: Path, data: PreparedData, tokenizer: Any) -> None:
    """Write the page of a prepared folder."""
    lengths, shares = data.lengths, data.supervised() / data.lengths
    picked = np.unique(np.linspace(0, len(data) - 1, min(SAMPLE, len(data))).round().astype(int))
    texts = TokenTexts(tokenizer)
    body = [
        pages.table(_facts(data.card), "What was prepared"),
        "<h2>Lengths and what is supervised</h2>",
        _lengths(lengths),
        _histogram(
            100 * shares,
            np.arange(0, 101, 5),
            "Supervised share of each conversation, in percent",
        ),
        f"<h2>{len(picked)} of {len(data)} conversations</h2>",
        '<p class="quiet">Underlined on colour: supervised. A small ×N: its weight where it is not'
        " 1; dashed without colour: weight 0; dotted: below 0. Thin lines: token borders. ↵: a"
        " line's end.</p>",
        *(_conversation(data.row(i), i, texts) for i in picked.tolist()),
    ]
    pages.write_page(path, f"Prepared data: {data.directory.name}", body, STYLE)


def _facts(card: DataCard) -> dict[str, object]:
    share = 100 * card.supervised_tokens / card.tokens
    facts: dict[str, object] = {
        "conversations": card.conversations,
        "tokens": card.tokens,
        "supervised": f"{card.supervised_tokens} ({share:.1f}%)",
        "longest": card.longest,
        "truncated": card.truncated,
        "duplicates (kept)": card.duplicates,
        "weights": "of tokens" if card.weighted else "none",
        "date told to templates": card.date,
        "conversations end with": ", ".join(
            f"{token} ({count})" for token, (_, count) in card.turn_ends.items()
        ),
        "options": ", ".join(f"{key}: {value}" for key, value in card.made_with.items()),
        "refused": sum(card.refused.values()),
    }
    for reason, count in card.refused.items():
        first = ", ".join(map(str, card.refused_lines[reason]))
        facts[f"refused: {reason}"] = f"{count} (first in {first})"
    return facts


def _lengths(lengths: np.ndarray) -> str:
    """Bins double, because lengths spread over orders of magnitude; two to each doubling."""
    low, high = np.floor(np.log2(lengths.min())), np.ceil(np.log2(lengths.max() + 1))
    edges = np.unique(np.round(2 ** np.arange(low, max(high, low + 1) + 0.25, 0.5)).astype(int))
    return _histogram(lengths, edges, "Tokens of each conversation")


def _histogram(values: np.ndarray, edges: np.ndarray, title: str) -> str:
    """Of values [n], with those outside of the edges [bins + 1] in the outer bins."""
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return pages.histogram(counts.tolist(), edges.tolist(), title)


def _conversation(sample: Sample, row: int, texts: TokenTexts) -> str:
    ids = sample.input_ids[:TOKENS].tolist()
    pieces = texts.each(ids)

    def part(stretch: Stretch) -> str:
        tokens = "".join(
            f"<i>{pages.text(piece).replace(chr(10), '↵' + chr(10))}</i>"
            for piece in pieces[stretch.start : stretch.stop]
        )
        weight = stretch.weight
        if weight is None:
            return tokens
        kind = "none" if weight == 0 else "negative" if weight < 0 else ""
        said = "" if weight == 1 else f"<small>×{weight:g}</small>"
        return f'<b class="{kind}" title="supervised, weight {weight:g}">{tokens}</b>{said}'

    length, learnt = len(sample.input_ids), int(sample.loss_mask.sum())
    more = length - len(ids)
    return (
        f"<h3>Conversation {row}</h3>"
        f'<p class="quiet">{length} tokens, {learnt} supervised,'
        f" {sample.sample_id}</p>"
        f'<pre class="tokens">{"".join(part(stretch) for stretch in stretches(sample))}</pre>'
        + (f'<p class="quiet">... and {more} tokens more</p>' if more else "")
    )
