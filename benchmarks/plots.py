"""Result files -> plots, as SVG whose bytes depend on the figures alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")

import matplotlib.pyplot as plt

Result = Mapping[str, Any]

STYLE: Any = {"svg.hashsalt": "lora-mixer", "svg.fonttype": "path", "figure.autolayout": True, "axes.grid": True}
"""A fixed salt and no date: equal figures give equal files."""


def compare_plot(result: Result, path: Path) -> None:
    """Decode speed of every peer and case by batch size, bars with the range of the rounds."""
    rows = [row for row in result["figures"] if not row["size"].startswith("prefill")]
    names = list(dict.fromkeys(f"{row['peer']}: {row['case']}" for row in rows))
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(sizes), figsize=(4 * len(sizes), 0.35 * len(names) + 1.2), sharey=True, squeeze=False
        )
        for axis, size in zip(axes[0], sizes, strict=True):
            for index, name in enumerate(names):
                for row in rows:
                    if row["size"] == size and f"{row['peer']}: {row['case']}" == name:
                        spread = [[row["median"] - row["min"]], [row["max"] - row["median"]]]
                        color = "tab:orange" if row["peer"] == "ours" else "tab:gray"
                        axis.barh(index, row["median"], xerr=spread, color=color)
            axis.set_title(f"batch {size}")
            axis.set_xlabel("decoded tokens per second")
            axis.set_yticks(range(len(names)), names)
        axes[0][0].invert_yaxis()
        _save(figure, path)


def scaling_plot(result: Result, path: Path) -> None:
    """One panel per curve."""
    curves = {name: points for name, points in result["curves"].items() if len(points) > 1}
    with plt.rc_context(STYLE):
        columns = 3
        rows = -(-len(curves) // columns)
        figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False)
        flat = [axis for line in axes for axis in line]
        for axis, (name, points) in zip(flat, curves.items(), strict=False):
            _curve(axis, name, points)
        for axis in flat[len(curves) :]:
            axis.set_visible(False)
        _save(figure, path)


def step_plot(result: Result, path: Path) -> None:
    """Parts of a step, stacked, as shares of their sum; parts below zero are noise and drawn as nothing."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7, 3))
        labels = [f"{cost['concurrency']} ({cost['step_ms']:.1f} ms)" for cost in result["step_costs"]]
        left = [0.0] * len(labels)
        for name in dict.fromkeys(name for cost in result["step_costs"] for name in cost["parts_ms"]):
            widths = []
            for cost in result["step_costs"]:
                total = sum(max(0.0, value) for value in cost["parts_ms"].values()) or 1.0
                widths.append(100 * max(0.0, cost["parts_ms"].get(name, 0.0)) / total)
            axis.barh(labels, widths, left=left, label=name)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axis.set_xlabel("share of one step over HTTP, %")
        axis.set_ylabel("concurrency")
        axis.legend(ncols=4, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0))
        _save(figure, path)


def _curve(axis: Any, name: str, points: Sequence[Result]) -> None:
    for policy in dict.fromkeys(point["policy"] for point in points):
        mine = [point for point in points if point["policy"] == policy]
        axis.plot([point["x"] for point in mine], [point["tok_s"] for point in mine], marker="o", label=policy)
    ticks = sorted({point["x"] for point in points})
    if ticks[-1] >= 8 * ticks[0]:
        axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xlabel(name)
    axis.set_ylabel("tok/s")
    axis.set_ylim(bottom=0)
    axis.legend()


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)
