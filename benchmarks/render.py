"""Puts tables and plots of the result files into benchmarks/README.md, between its markers.

python -m benchmarks.render            # after a measurement
python -m benchmarks.render --check    # exit status 1 if README and results disagree
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.peers.environments import ROOT
from benchmarks.results_file import read_json
from benchmarks.tables import Result, compare_tables, scaling_tables, serving_tables

README = ROOT / "benchmarks" / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "benchmarks" / "figures"

TABLES: Mapping[str, Callable[[Result], str]] = {
    "compare": compare_tables,
    "scaling": scaling_tables,
    "serving": serving_tables,
}
"""Name of a result file, and of its markers `<!-- NAME:begin -->` and `<!-- NAME:end -->` -> its tables."""

PICTURES: Mapping[str, Sequence[tuple[str, str]]] = {
    "compare": [("compare.svg", "Decode speed of every peer by batch size")],
    "scaling": [("scaling.svg", "Tokens per second over each curve"), ("step.svg", "Parts of a step")],
    "serving": [],
}
"""Name of a result -> its plots below benchmarks/figures, with their descriptions."""

NOT_YET = "Not measured yet."


def rendered(readme: str, results: Mapping[str, Result]) -> str:
    """`readme` with every marked part made anew. Raises ValueError if a marker is missing."""
    for name, tables in TABLES.items():
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        if not pattern.search(readme):
            raise ValueError(f"the markers <!-- {name}:begin --> and <!-- {name}:end --> are missing")
        text = NOT_YET
        if name in results:
            pictures = [f"![{description}](figures/{file})" for file, description in PICTURES[name]]
            text = "\n\n".join([tables(results[name]), *pictures])
        readme = pattern.sub(lambda match, text=text: f"{match[1]}\n{text}\n\n{match[2]}", readme)  # type: ignore[misc]
    return readme


def present_results(folder: Path) -> dict[str, Result]:
    """Those results that have been measured."""
    return {name: read_json(folder / f"{name}.json") for name in TABLES if (folder / f"{name}.json").exists()}


def draw(results: Mapping[str, Result], folder: Path) -> None:
    """Every plot of the results that are there."""
    from benchmarks.plots import compare_plot, scaling_plot, step_plot

    if "compare" in results:
        compare_plot(results["compare"], folder / "compare.svg")
    if "scaling" in results:
        scaling_plot(results["scaling"], folder / "scaling.svg")
        step_plot(results["scaling"], folder / "step.svg")


def main(argv: Sequence[str] | None = None) -> int:
    """Write README and plots, or with --check say whether the README is up to date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.render", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if it would")
    arguments = parser.parse_args(argv)
    before = README.read_text(encoding="utf-8")
    results = present_results(RESULTS)
    after = rendered(before, results)
    if arguments.check:
        if after != before:
            print("render: benchmarks/README.md is not what the results say; run `make bench-report`", file=sys.stderr)
        return int(after != before)
    README.write_text(after, encoding="utf-8")
    draw(results, FIGURES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
