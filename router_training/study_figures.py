"""Figures of the study's report, as SVG whose bytes depend on the record alone. Needs matplotlib (extra `bench`)."""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from router_training.settings import BASE_NAME
from router_training.study_results import Results, over_seeds, ratios, single
from router_training.study_tables import curve_points
from server.errors import ConfigError

STYLE: Any = {
    "svg.hashsalt": "lora-mixer",
    "svg.fonttype": "path",
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 9.0,
    "figure.constrained_layout.use": True,
}
"""A fixed salt and no date: equal figures give equal files."""

RSL_SETTINGS = {"alpha", "lambda_", "sign"}
"""Ablations that change these alone are drawn beside their reference: what the loss does to the gates."""

IDENTIFIER = re.compile(r"<dc:identifier>([0-9a-f]{64})</dc:identifier>")

Draw = Callable[[Any, Results, str], Any]


def figures(results: Results, main: str | None) -> dict[str, Draw]:
    """File name -> how to draw it, for every figure that the record has something for. `main` is the studied run."""
    drawn: dict[str, Draw] = {}
    if main is not None and results.first_with(main, "gates") is not None:
        drawn |= {"study-layers.svg": _layers, "study-composite.svg": _composite, "study-opening.svg": _opening}
    if any("step" in run.get("training", {}) for run in results.runs):
        drawn["study-training.svg"] = _training
    if any(results.finished(name) for name in results.names("curve")):
        drawn["study-data-size.svg"] = _data_size
    if any(results.finished(name) for name in [*results.names("ablation"), *results.names("main")]):
        drawn["study-cost.svg"] = _cost
    return drawn


def draw(results: Results, main: str | None, folder: Path) -> None:
    """Write every figure; those that there is nothing for any more are removed.

    Raises ConfigError where matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ConfigError("figures need matplotlib; install the extra: pip install 'lora-mixer[bench]'") from error
    mpl.use("svg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    wanted = figures(results, main)
    for path in folder.glob("study-*.svg"):
        if path.name not in wanted:
            path.unlink()
    for name, function in wanted.items():
        with plt.rc_context(STYLE):
            figure = function(plt, results, main or "")
            metadata = {"Date": None, "Identifier": digest(results)}
            figure.savefig(folder / name, format="svg", metadata=metadata)
            plt.close(figure)


def digest(results: Results) -> str:
    """sha256 of the record; every figure carries it, so that an outdated one is seen."""
    return hashlib.sha256(json.dumps(results.record, sort_keys=True).encode()).hexdigest()


def outdated(results: Results, main: str | None, folder: Path) -> list[Path]:
    """Figures in the folder that are missing, too many, or drawn from another record."""
    wanted = {folder / name for name in figures(results, main)}
    there = set(folder.glob("study-*.svg"))
    old = {path for path in wanted & there if drawn_from(path) != digest(results)}
    return sorted((wanted ^ there) | old)


def drawn_from(path: Path) -> str | None:
    """Digest of the record that a figure was drawn from; None for a file that says nothing."""
    found = IDENTIFIER.search(path.read_text(encoding="utf-8"))
    return found[1] if found else None


def _layers(plt: Any, results: Results, main: str) -> Any:
    """Layer × adapter heat map per task."""
    gates = results.first_with(main, "gates")
    columns = 3
    rows = -(-len(gates["layers"]) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(9, 2.6 * rows), squeeze=False, sharex=True, sharey=True)
    flat = [axis for line in axes for axis in line]
    image = None
    for axis, (task, shares) in zip(flat, gates["layers"].items(), strict=False):
        image = axis.imshow(shares, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
        axis.set_title(f"chats of {task}" if task != BASE_NAME else "off-domain chats")
        axis.set_xticks(range(len(gates["choices"])), gates["choices"], rotation=60)
        axis.grid(visible=False)
    for axis in flat[len(gates["layers"]) :]:
        axis.set_visible(False)
    for line in axes:
        line[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="mean gate weight at answer positions", shrink=0.6)
    return figure


def _composite(plt: Any, results: Results, main: str) -> Any:
    """Gate share over token position along one chat of each kind; the strip on top says whose each token is."""
    gates = results.first_with(main, "gates")
    kinds = gates["along"]
    figure, axes = plt.subplots(len(kinds), 1, figsize=(9, 2.8 * len(kinds)), squeeze=False)
    colors = {name: plt.get_cmap("tab10")(index) for index, name in enumerate(gates["choices"])}
    for (axis,), (kind, along) in zip(axes, kinds.items(), strict=True):
        positions = range(len(along["share"]))
        shares = list(zip(*along["share"], strict=True))
        names = gates["choices"]
        axis.stackplot(positions, shares, labels=names, colors=[colors[name] for name in names], linewidth=0)
        for task, start, end in stretches(along["tasks"]):
            axis.broken_barh([(start, end - start)], (1.03, 0.06), color=colors[task])
        for is_answer, start, end in stretches(along["answer"]):
            if is_answer:
                axis.broken_barh([(start, end - start)], (1.12, 0.03), color="black")
        axis.set_title(f"two tasks in one {kind}")
        axis.set(xlim=(0, len(along["share"])), ylim=(0, 1.2), ylabel="gate share", xlabel="token position")
        axis.grid(visible=False)
    axes[0][0].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def stretches(values: Sequence[Any]) -> list[tuple[Any, int, int]]:
    """(value, start, end) of every stretch of equal values."""
    found, start = [], 0
    for value, group in itertools.groupby(values):
        end = start + len(list(group))
        found.append((value, start, end))
        start = end
    return found


def _opening(plt: Any, results: Results, main: str) -> Any:
    """Own adapter's share over the first positions of a chat, one line per task."""
    gates = results.first_with(main, "gates")
    figure, axis = plt.subplots(figsize=(7, 3.4))
    for task, shares in gates["opening"].items():
        axis.plot(range(len(shares)), shares, label=task, color="black" if task == BASE_NAME else None)
    axis.set(xlabel="token position", ylabel="own adapter's gate share", ylim=(0, 1.02), xlim=(0, None))
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _training(plt: Any, results: Results, main: str) -> Any:
    """Balance and entropy over the steps: the studied run's seeds, and what the entropy term does."""
    ablations = results.names("ablation")
    of_loss = [name for name in ablations if results.changed(name, ablations[0]).keys() <= RSL_SETTINGS]
    groups = {"the router": [main], "the terms of RSL": of_loss}
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.2), sharey="row", sharex="col")
    for column, (text, names) in enumerate(groups.items()):
        for name in names:
            for run in results.seeds(name):
                training = run.get("training", {})
                if "step" not in training:
                    continue
                label = name if column else f"seed {run['seed']}"
                for axis, measure in zip(axes[:, column], ("balance", "entropy"), strict=True):
                    axis.plot(training["step"], training[measure], label=label)
        axes[0, column].set_title(text)
        axes[1, column].set_xlabel("step")
        if axes[0, column].lines:
            axes[0, column].legend()
    axes[0, 0].set_ylabel("balance (1: even)")
    axes[1, 0].set_ylabel("entropy of the gates / log E")
    return figure


def _data_size(plt: Any, results: Results, _: str) -> Any:
    """Ratio to the oracle over data size."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharex=True)
    points = curve_points(results)
    texts = {"of_means": "ratio of means", "mean_of": "mean of ratios"}
    for axis, (part, text) in zip(axes, texts.items(), strict=True):
        for has_entropy, label in ((True, "with entropy term"), (False, "without")):
            values = {
                samples: over_seeds(results.evaluations(names[has_entropy]), "routed", single("routed", part))
                for samples, names in points.items()
                if has_entropy in names
            }
            found = {samples: value for samples, value in values.items() if value is not None}
            means = [value.mean for value in found.values()]
            axis.errorbar(list(found), means, [v.deviation for v in found.values()], marker="o", label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(points), [str(samples) for samples in points])
        axis.set(xlabel="training chats", ylabel=f"{text} to the oracle")
    axes[0].legend()
    return figure


def _cost(plt: Any, results: Results, main: str) -> Any:
    """Quality over seconds of training, and over k."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    for section, marker in (("ablation", "o"), ("main", "s")):
        for name in results.names(section):
            for run in results.finished(name):
                seconds = _seconds(run)
                if seconds is None:
                    continue
                value = ratios(run["evaluation"]["policies"], "routed").of_means
                left.plot(seconds, value, marker, color="tab:blue" if section == "ablation" else "tab:orange")
                left.annotate(name, (seconds, value), xytext=(3, 3), textcoords="offset points", fontsize=7)
    left.set(xlabel="seconds of training (warm start and steps)", ylabel="ratio of means to the oracle")
    _by_k(right, results, main)
    right.set(xlabel="adapters per token (k)", ylabel="ratio of means to the oracle")
    if right.lines:
        right.legend()
    return figure


def _by_k(axis: Any, results: Results, main: str) -> None:
    """The studied router served at other k, and short runs trained at them."""
    served, trained = dict[int, float](), dict[int, float]()
    evaluations = results.comparisons(main) if main else []
    for policy in {policy for found in evaluations for policy in found["policies"] if policy.startswith("routed")}:
        value = over_seeds(evaluations, policy, single(policy, "of_means"))
        assert value is not None
        served[int(policy.removeprefix("routed_k")) if "_k" in policy else results.settings(main)["top_k"]] = value.mean
    ablations = results.names("ablation")
    for name in ablations:
        value = over_seeds(results.evaluations(name), "routed", single("routed", "of_means"))
        if results.changed(name, ablations[0]).keys() <= {"top_k"} and value is not None:
            trained[results.settings(name)["top_k"]] = value.mean
    curves: Mapping[str, Mapping[int, float]] = {f"{main}, served at k": served, "short runs, trained at k": trained}
    for label, points in curves.items():
        if points:
            axis.plot(sorted(points), [points[k] for k in sorted(points)], marker="o", label=label)


def _seconds(run: Mapping[str, Any]) -> float | None:
    """Of warm start and steps; None where one of them was not timed."""
    parts: Sequence[float | None] = [run["facts"].get("start_s"), run["training"].get("steps_s")]
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None
