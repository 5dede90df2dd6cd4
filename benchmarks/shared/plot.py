"""The picture: time of each implementation as bars, grouped by objective, with the floor as a
line."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OUTLIER = 5  # times the panel's median
COLOURS = {"ours": "#1f6f8b", "inplace": "#7fb7c9", "peer": "#c9a66b"}


def colour(name: str) -> str:
    if not name.startswith("ours"):
        return COLOURS["peer"]
    return COLOURS["inplace"] if name.endswith("inplace") else COLOURS["ours"]


def draw_section(axes: Any, section: Mapping[str, Any]) -> None:
    """One panel: a group of bars for each objective, fastest on top."""
    rows = [row for row in section["rows"] if row["status"] == "measured"]
    times = [row["median_ms"] for row in rows]
    longest = min(
        max(times), OUTLIER * statistics.median(times)
    )  # longer bars are cut, or they would flatten the rest
    y, labels, places = 0.0, [], []
    for key, floor in section["floor_ms"].items():
        group = sorted(
            (row for row in rows if row["objective"] == key), key=lambda row: row["median_ms"]
        )
        if not group:
            continue
        axes.text(0, y, key, fontsize=9, fontweight="bold", va="center")
        top = y = y + 1
        for row in group:
            time, shown = row["median_ms"], min(row["median_ms"], longest)
            axes.barh(y, shown, height=0.8, color=colour(row["implementation"]))
            text = f"{time:,.0f}" if time >= 100 else f"{time:.3g}"
            axes.text(
                shown + longest / 100,
                y,
                f"{text} (cut)" if time > shown else text,
                va="center",
                fontsize=8,
            )
            places.append(y)
            labels.append(row["implementation"])
            y += 1
        if floor is not None:
            axes.plot([floor, floor], [top - 0.5, y - 0.5], color="#b03030", linewidth=1.8)
        y += 0.4
    axes.set_yticks(places, labels, fontsize=8)
    axes.set_ylim(y, -0.8)
    axes.set_xlim(0, longest * 1.12)
    axes.set_xlabel("forward and backward, ms (median)", fontsize=9)
    axes.set_title(section["name"], fontsize=10, loc="left")
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture of all sections with rows; a panel each, two beside each other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    sections = [
        s for s in result["sections"] if any(row["status"] == "measured" for row in s["rows"])
    ]
    columns = min(2, max(1, len(sections)))
    lines = [sections[i : i + columns] for i in range(0, len(sections), columns)]
    bars = [max(len(s["rows"]) + 1.4 * len(s["floor_ms"]) for s in line) for line in lines] or [1]
    size = (7 * columns, 1.2 + sum(1.1 + 0.2 * n for n in bars))
    figure, grid = pyplot.subplots(
        len(bars),
        columns,
        figsize=size,
        squeeze=False,
        layout="constrained",
        height_ratios=[1.1 + 0.2 * n for n in bars],
    )
    for axes in grid.flat:
        axes.set_visible(False)
    for line, row in zip(lines, grid, strict=False):
        for section, axes in zip(line, row, strict=False):
            axes.set_visible(True)
            draw_section(axes, section)
    handles: list[Any] = [
        Patch(color=COLOURS["ours"], label="this package"),
        Patch(color=COLOURS["inplace"], label="this package, over the logits"),
        Patch(color=COLOURS["peer"], label="others, or with a matrix of logits"),
        Line2D(
            [], [], color="#b03030", linewidth=1.8, label="floor: copy kernel over the same bytes"
        ),
    ]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=4 if columns == 2 else 2,
        fontsize=9,
        frameon=False,
    )
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    figure.savefig(temporary, dpi=140)
    pyplot.close(figure)
    temporary.replace(path)
