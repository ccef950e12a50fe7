"""The study's document and figures, from full and partial records: computed numbers, equal bytes, nothing left out."""

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from router_training.__main__ import main
from router_training.settings import TrainingConfig
from router_training.study_document import FIGURE_TEXTS, NOT_YET, document, studied_run
from router_training.study_figures import digest, draw, drawn_from, figures, stretches
from router_training.study_flags import DOCUMENT, RECORD
from router_training.study_plan import read_plan
from router_training.study_results import Results, over_seeds, ratios, read_results, single, spread
from router_training.study_tables import difference, short_tasks, unmeasured, verdicts
from server.errors import ConfigError

ROOT = Path(__file__).parents[2]
TASKS = ("base", "maths", "code")


def policies(routed: float, *, baselines: bool = False, tasks: tuple[str, ...] = TASKS) -> dict[str, Any]:
    """The oracle needs 1 nat on maths and 0.5 on code, the router `routed` times that."""
    own = {"base": 2.0, "maths": 1.0, "code": 0.5}
    factors = {"base": 4.0, "own_adapter": 1.0, "uniform": 3.0, "routed": routed}
    if baselines:
        factors |= {"arrow": 1.5, "only_maths": 2.0, "only_code": 2.5, "per_request": 1.2, "routed_k1": 1.1}
    nll = {policy: {task: factor * own[task] for task in tasks} for policy, factor in factors.items()}
    if "base" in tasks:
        nll["base"]["base"] = nll["own_adapter"]["base"] = 2.0
        nll["routed"]["base"] = 2.0 * (1 + (routed - 1) / 2)
    return {policy: {task: [value, 0.8, 0.9] for task, value in found.items()} for policy, found in nll.items()}


def evaluation(routed: float, *, whole: bool = False) -> dict[str, Any]:
    composite = {"chats": 6, "policies": policies(2 * routed, baselines=whole, tasks=TASKS[1:])}
    chats = dict.fromkeys(TASKS, 20)
    record = {"chats": chats, "policies": policies(routed, baselines=whole), "composite": composite}
    if whole:
        along = {"tasks": ["maths", "maths", "code"], "answer": [0, 1, 1], "share": [[0.2, 0.5, 0.3]] * 3}
        record["calibration"] = {"chats_per_task": 16}
        record["gates"] = {
            "choices": list(TASKS),
            "layers": {task: [[0.1, 0.6, 0.3]] * 4 for task in TASKS},
            "opening": {task: [0.25, 0.5, 0.75] for task in TASKS},
            "along": {"conversation": along, "answer": along},
        }
        found = {task: {"metric": "accuracy", "value": 0.625, "chats": 8} for task in TASKS[1:]}
        record["metrics"] = {"base": found, "routed": found}
    return record


def finished(name: str, section: str, routed: float, seed: int = 0, *, whole: bool = False, **settings: Any) -> Any:
    curve = {name: [0.5, 0.25] for name in ("lm_loss", "balance", "entropy", "adapter_id")}
    machine = {"cpu_model": "Some CPU", "cores": 2, "memory_gib": 8.0, "system": "Linux"}
    return {
        "name": name,
        "section": section,
        "note": f"about {name}",
        "seed": seed,
        "stage": "finished",
        "settings": settings,
        "facts": {"machine": machine, "versions": {"torch": "2.9"}, "threads": 1, "start_s": 30.0},
        "training": {"steps": 40, "steps_s": 170.0, "tokens": 9, "step": [0, 20], **curve},
        "evaluation": evaluation(routed, whole=whole),
    }


@pytest.fixture
def record() -> dict[str, Any]:
    """A study with everything: three seeds, an ablation, a curve of two sizes."""
    runs = [finished("winner", "main", 1.0, whole=True)]
    runs += [finished("short", "ablation", 1.2), finished("no-entropy", "ablation", 1.3, lambda_=0.0)]
    for samples in (125, 4000):
        runs.append(finished(f"curve-{samples}", "curve", 1.5, samples=samples, steps=16))
        runs.append(finished(f"curve-{samples}-0", "curve", 1.6, samples=samples, steps=16, lambda_=0.0))
    runs += [finished("winner", "main", 1.01, 1), finished("winner", "main", 1.02, 2)]
    return {
        "format_version": 1,
        "defaults": TrainingConfig().record(),
        "base_model": {"name": "tiny/llama", "source": "x", "dtype": "bfloat16"},
        "adapters": list(TASKS[1:]),
        "data": {task: {"train": 1000 if task == "maths" else 3000, "validation": 60} for task in TASKS},
        "runs": runs,
    }


def unfinished(record: dict[str, Any], *names: str) -> dict[str, Any]:
    """The record with these runs not run, all of them without names."""
    changed = copy.deepcopy(record)
    for run in changed["runs"]:
        if not names or run["name"] in names:
            for key in ("facts", "training", "evaluation"):
                del run[key]
            run["stage"] = "not run"
    return changed


def parts(text: str) -> dict[str, str]:
    """Heading -> text of the part."""
    pieces = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def row(text: str, first: str) -> list[str]:
    """Cells of the table row that begins with `first`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_ratios_follow_their_definitions() -> None:
    found = {"own_adapter": {"a": [1.0], "b": [0.5], "base": [9.0]}, "x": {"a": [2.0], "b": [0.5], "base": [1.0]}}
    assert ratios(found, "x").mean_nll == 1.25
    assert ratios(found, "x").of_means == pytest.approx(2.5 / 1.5)
    assert ratios(found, "x").mean_of == 1.5
    assert str(spread([1.0, 2.0, 3.0])) == "2.000 ± 1.000"
    assert str(spread([1.5])) == "1.500"


def test_a_policy_that_no_seed_changes_has_no_spread(record: dict[str, Any]) -> None:
    evaluations = Results(record).evaluations("winner")
    assert str(over_seeds(evaluations, "routed", single("routed", "of_means"))) == "1.010 ± 0.010"
    assert str(over_seeds(evaluations, "uniform", single("uniform", "of_means"))) == "3.000"
    assert over_seeds(evaluations, "phatgoose", single("phatgoose", "of_means")) is None


def test_every_policy_is_listed_best_first_with_its_ratios(record: dict[str, Any]) -> None:
    text = parts(document(Results(record), "figures"))["Every policy"]
    assert row(text, "**the router**")[2:] == [
        "1.010 ± 0.010",
        "1.010 ± 0.010",
        "2.020 ± 0.020",
        "2.020 ± 0.020",
        "1.005 ± 0.005",
    ]
    assert row(text, "Arrow")[2:] == ["1.500", "1.500", "1.500", "1.500", "1.500"]
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][2:]
    assert names[:4] == [
        "own adapter (oracle)",
        "**the router**",
        "router served at k = 1",
        "router, one adapter per request",
    ]
    assert "Not measured yet: SpectR, SEQR norm" in text
    assert "router served at k = 3" in text
    assert "16 training chats per task" in text


def test_aims_are_met_or_missed_by_the_numbers(record: dict[str, Any]) -> None:
    evaluations = Results(record).evaluations("winner")
    text = verdicts(evaluations, evaluations)
    assert row(text, "single tasks: mean NLL over the oracle's")[1:] == ["≤ 1.02", "1.010 ± 0.010", "met"]
    assert row(text, "composite chats: mean NLL over the per-segment oracle's")[3] == "**missed**"
    assert row(text, "off-domain chats: NLL over the base model's")[1:] == ["≤ 1.01", "1.005 ± 0.005", "met"]
    assert row(text, "single tasks: below every baseline")[2:] == ["6 of 6", "met"]
    # On composites the router's factor is 2.02, and one adapter's is 2.
    assert row(text, "composite chats: below every single adapter")[2:] == ["not maths alone", "**missed**"]


def test_baselines_are_compared_on_their_own_set_of_chats(record: dict[str, Any]) -> None:
    for run in record["runs"]:
        if run["name"] == "winner":
            run["evaluation"]["comparison"] = {
                **evaluation(1.6, whole=run["seed"] == 0),
                "chats": dict.fromkeys(TASKS, 5),
            }
    found = parts(document(Results(record), "figures"))
    assert "40 single-task chats of 2 tasks" in found["By task"]
    assert "10 single-task chats of 2 tasks" in found["Every policy"]
    assert row(found["Every policy"], "**the router**")[2] == "1.600 ± 0.000"
    aims = found["Aims"]
    assert row(aims, "single tasks: mean NLL over the oracle's")[2] == "1.010 ± 0.010"
    assert row(aims, "single tasks: below every baseline")[2:] == [
        "not router, one adapter per request, Arrow",
        "**missed**",
    ]
    assert "is 'router, one adapter per request', 1.200 times" in aims


def test_unseen_phrasings_have_an_aim_a_column_and_ratios_by_task(record: dict[str, Any]) -> None:
    for run in record["runs"]:
        if run["name"] == "winner":
            factor = 1.02 + 0.02 * run["seed"]
            found = policies(factor, baselines=True, tasks=("maths",))
            run["evaluation"]["phrased"] = {"chats": {"maths": 17}, "policies": found}
    text = parts(document(Results(record), "figures"))
    aim = row(text["Aims"], "single tasks in unseen phrasings: mean NLL over the oracle's")
    assert aim[1:] == ["≤ 1.02", "1.040 ± 0.020", "**missed**"]
    assert "40 single-task chats of 2 tasks, 17 of them also in unseen phrasings" in text["Every policy"]
    assert row(text["Every policy"], "policy")[4] == "unseen phrasings: ratio of means"
    assert row(text["Every policy"], "**the router**")[3:6] == ["1.010 ± 0.010", "1.040 ± 0.020", "2.020 ± 0.020"]
    assert row(text["Every policy"], "Arrow")[4] == "1.500"
    assert row(text["By task"], "task")[6:8] == ["router / oracle", "in unseen phrasings"]
    assert row(text["By task"], "maths")[6:8] == ["1.010 ± 0.010", "1.040 ± 0.020"]
    # Nothing in the file for this one.
    assert row(text["By task"], "code")[6:8] == ["1.010 ± 0.010", "–"]


def test_a_document_without_unseen_phrasings_does_not_speak_of_them(record: dict[str, Any]) -> None:
    assert "unseen" not in document(Results(record), "figures")
    assert "unseen" not in document(Results(unfinished(record)), "figures")


def test_tasks_metrics_and_ablations_have_their_numbers(record: dict[str, Any]) -> None:
    found = parts(document(Results(record), "figures"))
    assert row(found["By task"], "code")[1:7] == ["20", "2.000", "1.500", "0.500", "0.505 ± 0.005", "1.010 ± 0.010"]
    assert row(found["Task metrics of generated answers"], "maths") == ["maths", "accuracy", "8", "0.625", "0.625"]
    ablations = found["Ablations"]
    assert row(ablations, "no-entropy")[:5] == ["no-entropy", "`lambda_` 0", "1.300", "1.300", "2.600"]
    assert row(ablations, "short")[1] == "(the reference)"
    assert "worst first: `no-entropy` +0.100." in ablations
    assert "varies by 0.010 over 3 seeds" in ablations
    uses = found["One router, other uses: k, and per request instead of per token"]
    assert row(uses, "router, one adapter per request")[1] == "1.200"
    curve = found["Data size, with and without the entropy term"]
    assert row(curve, "125") == ["125", "16", "125", "1.500", "1.600", "1.500", "1.600"]
    assert row(curve, "4000")[2] == "128"
    assert "which repeats some: maths." in curve
    assert row(found["Cost against quality"], "short, seed 0")[1:] == ["30", "170", "2", "1.200"]
    assert found["Not measured yet"].strip() == "Nothing: every run of the plan is measured."


def test_settings_table_shows_what_differs_from_the_defaults(record: dict[str, Any]) -> None:
    text = parts(document(Results(record), "figures"))["What was run"]
    assert "9 of 9 runs" in text
    assert row(text, "`samples`")[1:] == ["2000", "2000", "125"]
    assert "Some CPU, 2 cores" in text
    assert difference(Results(record), "no-entropy", "short") == "`lambda_` 0"
    assert short_tasks(Results(record), 4000) == ["maths"]


def test_a_record_without_results_names_every_part_and_every_run(record: dict[str, Any], tmp_path: Path) -> None:
    results = Results(unfinished(record))
    found = parts(document(results, "figures"))
    empty = [heading for heading, text in found.items() if text.strip() == NOT_YET]
    assert len(empty) == len(found) - 2
    assert "0 of 9 runs" in found["What was run"]
    assert found["Not measured yet"].count("not run") == 9
    assert found.keys() == parts(document(Results(record), "figures")).keys()
    draw(results, studied_run(results), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_partial_record_shows_what_there_is(record: dict[str, Any], tmp_path: Path) -> None:
    partial = unfinished(record, "winner", "curve-125-0", "no-entropy")
    partial["runs"][2]["error"] = "ConfigError: no\nmore"
    results = Results(partial)
    assert studied_run(results) is None
    found = parts(document(results, "figures"))
    assert row(found["Ablations"], "no-entropy")[2] == "not run"
    assert row(found["Data size, with and without the entropy term"], "125")[3:5] == ["1.500", "not run"]
    assert row(found["Not measured yet"], "no-entropy") == ["no-entropy", "0", "not run", "ConfigError: no"]
    draw(results, None, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"study-training.svg", "study-data-size.svg", "study-cost.svg"}


def test_the_reference_of_the_ablations_may_be_missing(record: dict[str, Any]) -> None:
    found = parts(document(Results(unfinished(record, "short")), "figures"))
    assert "`short`, which the others are compared with, is not measured yet." in found["Ablations"]


def test_a_study_without_baselines_says_which_are_missing(record: dict[str, Any]) -> None:
    evaluations = [evaluation(1.01)]
    absent = unmeasured(evaluations, ["maths", "code"])
    assert {"arrow", "lorahub", "only_maths", "routed_k3", "per_request"} <= set(absent)
    assert "routed" not in absent
    record["runs"] = [finished("winner", "main", 1.01)]
    text = verdicts(evaluations, evaluations)
    assert row(text, "composite chats: below every single adapter")[2:] == ["–", "–"]
    assert row(text, "single tasks: below every baseline")[2:] == ["2 of 2", "met"]


def test_figures_have_equal_bytes_for_equal_records(record: dict[str, Any], tmp_path: Path) -> None:
    results = Results(record)
    for name in ("a", "b"):
        draw(results, "winner", tmp_path / name)
    drawn = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert drawn == sorted(FIGURE_TEXTS) == sorted(figures(results, "winner"))
    for name in drawn:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert drawn_from(tmp_path / "a" / name) == digest(results)
    text = document(results, "figures")
    assert all(f"](figures/{name})" in text for name in drawn)


def test_what_was_measured_before_is_shown_marked_where_there_is_nothing_newer(record: dict[str, Any]) -> None:
    assert "Measured before" not in parts(document(Results(record), "figures"))
    for run in record["runs"]:
        if run["name"] == "no-entropy" or (run["name"] == "winner" and run["seed"]):
            run["stage"] = "outdated"
    text = parts(document(Results(record), "figures"))
    assert "6 of 9 runs (a run under one seed each) of the plan are measured, 3 more (†)" in text["What was run"]
    assert row(text["Every policy"], "**the router**")[2] == "1.000", "the seed that is of the plan alone"
    assert "†" not in text["Aims"]
    assert row(text["Ablations"], "no-entropy †")[2] == "1.300"
    assert row(text["Ablations"], "short")[2] == "1.200"
    assert "† Measured before data or evaluation changed" in text["Ablations"]
    assert "Ratio of means less that of `short`" not in text["Ablations"], "they do not compare"
    assert "no-entropy (seed 0), winner (seed 1), winner (seed 2)." in text["Measured before"]
    for run in record["runs"]:
        run["stage"] = "outdated"
    text = parts(document(Results(record), "figures"))
    assert row(text["Every policy"], "**the router**")[2] == "1.010 ± 0.010"
    assert "Of `winner †`: measured before" in text["Aims"]
    assert "Ratio of means less that of `short`" in text["Ablations"]


def test_stretches_cover_the_values_in_order() -> None:
    assert stretches(["a", "a", "b"]) == [("a", 0, 2), ("b", 2, 3)]
    assert stretches([]) == []


def test_the_command_writes_document_and_figures_and_checks_them(
    record: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "study.json"
    source.write_text(json.dumps(record), encoding="utf-8")
    flags = ["--json", str(source), "--document", str(tmp_path / "docs/x.md"), "--figures", str(tmp_path / "docs/f")]
    assert main(["study-report", *flags, "--check"]) == 1
    assert main(["study-report", *flags]) == 0
    assert "](f/study-layers.svg)" in (tmp_path / "docs/x.md").read_text(encoding="utf-8")
    assert main(["study-report", *flags, "--check"]) == 0
    capsys.readouterr()
    record["runs"][0]["evaluation"]["policies"]["routed"]["maths"][0] += 0.5
    source.write_text(json.dumps(record), encoding="utf-8")
    assert main(["study-report", *flags, "--check"]) == 1
    printed = capsys.readouterr().err
    assert "x.md is not what" in printed
    assert "study-layers.svg is not what" in printed
    source.write_text(json.dumps(unfinished(record)), encoding="utf-8")
    assert main(["study-report", *flags]) == 0
    assert list((tmp_path / "docs/f").iterdir()) == []


def test_a_file_that_is_no_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"format_version": 0, "runs": []}', encoding="utf-8")
    with pytest.raises(ConfigError, match="is not a study's record"):
        read_results(tmp_path / "x.json")
    with pytest.raises(ConfigError, match="cannot read the study's record"):
        read_results(tmp_path / "y.json")


def test_figures_without_matplotlib_name_the_extra(
    record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="install the extra"):
        draw(Results(record), "winner", tmp_path)


def test_the_repositorys_document_and_figures_are_what_its_record_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when one of the three is edited alone: `make routing-study-report` makes them agree."""
    monkeypatch.chdir(ROOT)
    assert main(["study-report", "--check"]) == 0


def test_the_repositorys_record_is_small_and_of_its_plan() -> None:
    assert (ROOT / RECORD).stat().st_size < 300_000
    results = read_results(ROOT / RECORD)
    runs = read_plan(ROOT / "examples/demo/study.yaml")
    assert [(run["name"], run["seed"]) for run in results.runs] == [(run.name, run.seed) for run in runs]
    for run in runs:
        recorded, planned = results.settings(run.name), run.settings.record()
        assert recorded == {key: planned[key] for key in recorded}, run.name
    assert (ROOT / DOCUMENT).exists()
