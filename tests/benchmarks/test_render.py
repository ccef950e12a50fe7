"""Tables and plots say what the result files say, and the README in the repository is what its results make of it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare import add_lines, new_result, summarised
from benchmarks.peers.protocol import Workload
from benchmarks.plots import compare_plot, scaling_plot, step_plot
from benchmarks.render import FIGURES, NOT_YET, PICTURES, README, RESULTS, TABLES, main, present_results, rendered
from benchmarks.tables import compare_tables, scaling_tables, serving_tables

MACHINE = {"cpu_model": "Test CPU", "cores": 2, "memory_gib": 4.0, "system": "Linux"}
FACTS = {"machine": MACHINE, "versions": {"torch": "1.2.3"}, "command": "python -m benchmarks.x"}


def compare_result() -> dict[str, Any]:
    result = {**new_result(Workload(), rounds=2), **FACTS}
    rates = {"ours": {"base": 100.0, "routed": 90.0}, "vllm-base": {"base": 45.0}, "peft-arrow": {"arrow": 9.0}}
    for number in range(2):
        for peer, cases in rates.items():
            for case, rate in cases.items():
                facts = {"kind": "generation", "batch": 8, "prompt_tokens": 64, "new_tokens": 24}
                line = {**facts, "case": case, "decode_tok_s": rate * (1 + number), "other_cores": 0.03}
                add_lines(result, peer, number, [line])
    result["skipped"]["llama-cpp"] = "no cmake on PATH"
    result["errors"].append({"peer": "vllm-adapters", "round": 1, "message": "long text"})
    result["commands"]["ours"] = "python -m something"
    return summarised(result)


def scaling_result() -> dict[str, Any]:
    def point(x: int, policy: str, rate: float) -> dict[str, Any]:
        return {"x": x, "policy": policy, "concurrency": x, "tok_s": rate}

    curve = [point(x, policy, 10.0 * x) for x in (1, 32) for policy in ("base", "routed")]
    return {
        **FACTS,
        "new_tokens": 48,
        "duration_s": 600,
        "curves": {"concurrency": curve, "top_k": [point(1, "routed", 5.0), point(2, "routed", 4.0)]},
        "many_adapters": [{"concurrency": 8, "ratio": 0.75, "target": 0.8, "met": False}],
        "step_costs": [{"concurrency": 8, "step_ms": 20.0, "parts_ms": {"base": 15.0, "lora": 5.5, "router": -0.5}}],
    }


def serving_result() -> dict[str, Any]:
    gaps = {"median": 20.0, "max": 31.5}
    turn = {
        "policy": "routed",
        "prefix_tokens": 1024,
        "cold_ms": 800.0,
        "warm_ms": 60.0,
        "ratio": 0.075,
        "target": 0.15,
    }
    return {
        **FACTS,
        "http": {"clients": 32, "ratio": {"median": 0.93, "min": 0.92, "max": 0.94}, "target": 0.9},
        "second_turn": [turn],
        "registration": {"stall_ms": 260.5, "gap_without_ms": gaps, "recompiled_graphs": 0, "target_ms": 250},
        "start": {"first_s": 30.0, "warm_s": 8.0, "first_target_s": 60, "warm_target_s": 10},
        "memory": {
            "resident_bytes": 900 << 20,
            "peak_bytes": 950 << 20,
            "allowed_bytes": 1400 << 20,
            "runtime_bytes": 300 << 20,
            "met": True,
        },
    }


RESULTS_BY_NAME = {"compare": compare_result(), "scaling": scaling_result(), "serving": serving_result()}


def test_the_comparison_s_ratios_and_figures_are_those_of_its_rounds() -> None:
    text = compare_tables(compare_result())
    assert "| routed / vLLM base | 2.00 (2.00–2.00), ≥ 1.0 |" in text
    assert "| routed / PEFT Arrow | 10.00 (10.00–10.00), ≥ 5.0 |" in text
    assert "| ours | base | 24 | 150 (100–200) |" in text
    assert "Test CPU, 2 cores, 4.0 GiB" in text
    assert "at most 0.03" in text
    assert "Left out: llama-cpp, no cmake on PATH" in text
    assert "Failed: vllm-adapters in round 2" in text
    assert "ours: python -m something" in text


def test_a_missed_target_is_named_as_such() -> None:
    result = compare_result()
    result["ratios"][0] |= {"median": 0.5, "met": False}
    assert "0.50 (0.90–0.90), below 0.85" in compare_tables(result)
    assert (
        "| longest gap of a stream while adapters are registered | 260.5 ms (without: 31.5 ms) | ≤ 250 ms | **no** |"
        in (serving_tables(serving_result()))
    )
    assert "| 8 | 0.75 | 0.8 | **no** |" in scaling_tables(scaling_result())


def test_scaling_and_serving_tables_hold_every_figure() -> None:
    scaling = scaling_tables(scaling_result())
    assert "| 32 | 320 | 320 |" in scaling
    assert "| 8 | 20.0 | 15 | 5.5 | -0.5 |" in scaling
    serving = serving_tables(serving_result())
    assert (
        "| second turn, routed, prefix 1024: first token warm / cold | 0.075 (60.0 / 800.0 ms) | ≤ 0.15 | yes |"
        in serving
    )
    assert "| resident memory | 900 MiB (peak 950) | ≤ 1400 MiB | yes |" in serving
    assert "nothing loaded | 300 MiB |" in serving


def test_tables_have_as_many_cells_in_every_row() -> None:
    for name, tables in TABLES.items():
        blocks = re.findall(r"(?:^\|.*\|\n?)+", tables(RESULTS_BY_NAME[name]), flags=re.MULTILINE)
        assert blocks
        for block in blocks:
            assert len({line.count("|") for line in block.strip().splitlines()}) == 1, block


def test_only_what_stands_between_the_markers_changes() -> None:
    before = "".join(f"{name} text\n<!-- {name}:begin -->\nstale\n<!-- {name}:end -->\nafter\n" for name in TABLES)
    after = rendered(before, {"serving": serving_result()})
    assert after.count(NOT_YET) == 2
    assert "stale" not in after
    assert serving_tables(serving_result()) in after
    assert rendered(after, {"serving": serving_result()}) == after
    with pytest.raises(ValueError, match="<!-- compare:begin -->"):
        rendered("no markers", {})


def test_plots_depend_on_the_figures_alone(tmp_path: Path) -> None:
    for number, folder in enumerate((tmp_path / "a", tmp_path / "b")):
        compare_plot(compare_result(), folder / "compare.svg")
        scaling_plot(scaling_result(), folder / "scaling.svg")
        step_plot(scaling_result(), folder / "step.svg")
        assert len(list(folder.iterdir())) == 3, number
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        assert path.read_text().rstrip().endswith("</svg>")
    other = scaling_result()
    other["curves"]["top_k"][0]["tok_s"] = 1.0
    scaling_plot(other, tmp_path / "other.svg")
    assert (tmp_path / "other.svg").read_bytes() != (tmp_path / "a" / "scaling.svg").read_bytes()


def test_the_readme_is_what_the_results_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().err
    for name in present_results(RESULTS):
        for file, _ in PICTURES[name]:
            assert (FIGURES / file).exists(), f"run `make bench-report`: {file} is missing"
    assert README.exists()


def test_the_speed_table_of_the_readme_is_what_the_results_say() -> None:
    ratios = json.loads((RESULTS / "compare.json").read_text(encoding="utf-8"))["ratios"]
    median = {(ratio["name"], ratio["size"]): ratio["median"] for ratio in ratios}
    readme = (README.parents[1] / "README.md").read_text(encoding="utf-8")
    rows = {
        "our own bare base model": ("routed / our base", 2),
        "vLLM's bare base model": ("routed / vLLM base", 1),
        "vLLM with the eight adapters, one per request": ("routed / vLLM with eight adapters", 1),
        "PEFT's per-token routing (Arrow)": ("routed / PEFT Arrow", 1),
    }
    for label, (name, digits) in rows.items():
        cells = [f"{median[name, size]:.{digits}f}" for size in ("1", "8", "32")]
        assert f"| {label} | {' | '.join(cells)} |" in readme
