"""Measured rows as tables, for the terminal and the same in Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

HEAD = ("objective", "implementation", "ms", "min")
# what a time is divided by depends on what the section starts from
RATIOS = {
    "logits": {"x floor": "floor", "x F.ce": "cross_entropy", "x plain": "same_loss"},
    "head": {"x mm+F.ce": "cross_entropy", "x mm+ours": "same_loss"},
}
MEMORY = ("peak MiB", "/logits", "no grads", "/logits", "diff")
COUNTED = "B/logit"  # only where something was counted


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def cells(row: Mapping[str, Any], ratios: Iterable[str], counted: bool) -> list[str]:
    """One row of a section, as text."""
    logits = row["logits_bytes"]
    memory = []
    for size in (row["peak_bytes"], row["extra_bytes"]):
        memory += (
            [number(size / 2**20, 1), number(size / logits, 3)] if size is not None else ["-", "-"]
        )
    line = [
        row["objective"],
        row["implementation"],
        number(row["median_ms"]),
        number(row["min_ms"]),
    ]
    line += [*(number(row["ratios"][name]) for name in ratios), *memory]
    return (
        line + [f"{row['difference']:.1e}"] + ([number(row["bytes_per_logit"])] if counted else [])
    )


def section_table(section: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, by objective, then by time."""
    order = list(section["floor_ms"])
    rows = [row for row in section["rows"] if row["status"] == "measured"]
    rows.sort(key=lambda row: (order.index(row["objective"]), row["median_ms"]))
    counted = any(row["bytes_per_logit"] is not None for row in rows)
    ratios = RATIOS[section["part"]]
    header = [*HEAD, *ratios, *MEMORY, *([COUNTED] if counted else [])]
    return header, [cells(row, ratios.values(), counted) for row in rows]


def not_run(section: Mapping[str, Any]) -> list[str]:
    """What has no numbers in this section: implementations with the same reason in one line."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for row in section["rows"]:
        if row["status"] != "measured":
            names = reasons.setdefault(row["reason"], {})
            names.setdefault(row["implementation"], []).append(row["objective"])
    lines = []
    for reason, names in reasons.items():
        # why one is absent does not depend on the objective; a failure may
        failed = reason.startswith("failed")
        listed = (f"{name} ({', '.join(keys)})" if failed else name for name, keys in names.items())
        lines.append(f"{', '.join(listed)}: {reason}")
    return lines


def target_table(targets: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [t["section"], t["target"], number(t["measured"], 3), f"<= {t['to_reach']:g}", t["verdict"]]
        for t in targets
    ]
    return ["section", "target", "measured", "to reach", ""], rows


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: text to the left, numbers to the right; a blank line where the first column
    changes."""
    if not rows:
        return "nothing was measured"
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    left = [
        i < 2 or not name for i, name in enumerate(header)
    ]  # names come first; a verdict has no header
    lines, previous = [], None
    for row in (header, *rows):
        if previous not in (None, row[0], header[0]):
            lines.append("")
        previous = row[0]
        padded = (
            cell.ljust(w) if side else cell.rjust(w)
            for cell, w, side in zip(row, widths, left, strict=True)
        )
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "Nothing was measured."
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def section_notes(section: Mapping[str, Any]) -> list[str]:
    """The floor and what was not run."""
    copy = section["copy_ms"]
    if copy is None:
        notes = [f"no floor: {section['copy_reason']}"]
    else:
        speed = 2 * section["logits_bytes"] / copy / 1e6
        values: dict[float, list[str]] = {}
        for key, ms in section["floor_ms"].items():
            values.setdefault(ms, []).append(key)
        floors = "; ".join(f"{ms:.3g} ms for {', '.join(keys)}" for ms, keys in values.items())
        notes = [f"floor, a copy kernel at {speed:.1f} GB/s: {floors}"]
    half = [row for row in section["rows"] if row["status"] == "measured" and row["reason"]]
    notes += [f"{row['objective']} {row['implementation']}: {row['reason']}" for row in half]
    return notes + [f"not run: {line}" for line in not_run(section)]


EXPLANATION = """\
Forward and backward: median ms and fastest (min). x floor: by the time of a copy kernel over the
bytes that no implementation can avoid (5 x the logits' with a dense teacher, else 3 x). x F.ce: by
eager F.cross_entropy; x plain: by plain autograd of the same loss; x mm+...: by a matrix product
and then that. peak: memory beyond the inputs at its highest; no grads: without the gradients' own
buffers; /logits: by the logits' bytes. diff: largest difference of a
gradient to ours on 8 tokens."""


def environment_lines(result: Mapping[str, Any]) -> list[str]:
    """What ran where, and the command."""
    e = result["environment"]
    versions = ", ".join(f"{name} {value}" for name, value in e["versions"].items() if value)
    return [
        f"{result['date']}, {e['device_name']}, {e['threads']} thread(s); {versions}",
        result["command"],
    ]


def counted_line(counted: Mapping[str, Any]) -> str:
    """Bytes per logit of our kernels, which do not depend on shape or device."""
    if "reason" in counted:
        return f"bytes per logit of ours-triton: not counted ({counted['reason']})"
    values = ", ".join(f"{key} {number(value)}" for key, value in counted["bytes"].items())
    return f"bytes per logit of ours-triton, counted under Triton's interpreter: {values}"


def markdown(result: Mapping[str, Any]) -> str:
    """The whole run, to be pasted into documentation."""
    when, command = environment_lines(result)
    parts = [
        "# Loss benchmark",
        f"{when}\n\n    {command}",
        EXPLANATION,
        counted_line(result["counted"]),
    ]
    if result["interrupted"]:
        parts.append("Interrupted: what follows is what had been measured.")
    for section in result["sections"]:
        table = markdown_table(*section_table(section))
        parts += [
            f"## {section['name']}",
            table,
            "\n".join(f"- {note}" for note in section_notes(section)),
        ]
    if result["targets"]:
        parts += ["## Targets", markdown_table(*target_table(result["targets"]))]
    return "\n\n".join(parts) + "\n"
