"""A page of HTML that stands alone: one style, light and dark, no script and nothing from the
network."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_tsft.atomic import write_text

# Colours are those of Okabe and Ito, which the colour-blind tell apart; what a colour says is also
# said by a line or a word.
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --quiet: #5b6570;
  --line: #d5dae0; --learnt: #0072b2; --learnt-paper: #d9ecf8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --paper: #14171a; --quiet: #9aa4ae;
  --line: #343b42; --learnt: #56b4e9; --learnt-paper: #10344a; } }
body { margin: 0 auto; padding: 1rem; max-width: 70rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }
section { overflow-x: auto; } .quiet { color: var(--quiet); } svg { max-width: 100%; height: auto; }
figure { display: inline-block; margin: 0 1.5rem 1rem 0; max-width: 100%; }
rect { fill: var(--learnt); } text { fill: var(--ink); font: 12px system-ui, sans-serif; }
line { stroke: var(--line); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.6 ui-monospace, monospace; }
"""


def write_page(path: Path, title: str, body: Sequence[str], style: str = "") -> None:
    """Write a page, whole or not at all.

    Args:
        path: of the page.
        title: plain text.
        body: HTML.
        style: CSS that only this page needs.
    """
    write_text(
        path,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}{style}</style></head>\n<body><h1>{text(title)}</h1>\n"
        + "\n".join(body)
        + "\n</body></html>\n",
    )


def text(value: object) -> str:
    """What a page shows as it is."""
    return html.escape(str(value))


def table(rows: Mapping[str, object], caption: str) -> str:
    """Names and values."""
    cells = "".join(
        f'<tr><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>'
        for name, value in rows.items()
    )
    return f"<section><table><caption>{text(caption)}</caption>{cells}</table></section>"


def histogram(counts: Sequence[int], edges: Sequence[float], title: str) -> str:
    """A histogram as SVG.

    Args:
        counts: [bins].
        edges: [bins + 1] where the bins end.
        title: what is counted.
    """
    labels = [f"{edge:g}" for edge in edges]
    width, height, bar = 420, 160, 400 / len(counts)
    tallest = max(1, *counts)
    bars = "".join(
        f'<rect x="{10 + i * bar:.1f}" y="{20 + 120 * (1 - count / tallest):.1f}"'
        f' width="{max(bar - 1, 1):.1f}" height="{120 * count / tallest:.1f}">'
        f"<title>{labels[i]} to {labels[i + 1]}: {count}</title></rect>"
        for i, count in enumerate(counts)
    )
    step = max(1, len(labels) // 6)
    ticks = "".join(
        f'<text x="{10 + i * bar:.1f}" y="155" text-anchor="middle">{labels[i]}</text>'
        for i in range(0, len(labels), step)
    )
    counted = "; ".join(
        f"{labels[i]} to {labels[i + 1]}: {count}" for i, count in enumerate(counts) if count
    )
    return (
        f"<figure><figcaption>{text(title)}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img"'
        f' aria-label="{text(title)}: {text(counted)}">'
        f'<line x1="10" x2="410" y1="140" y2="140"/>{bars}{ticks}'
        f'<text x="10" y="14">at most {tallest}</text></svg></figure>'
    )
