"""The study's driver on a tiny project: what is done, skipped, resumed, done again, and survived."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from router_training.__main__ import main
from router_training.checkpoint import CHECKPOINT_NAME, Checkpoint
from router_training.settings import TrainingConfig
from router_training.study_plan import EvaluationPlan, StudyRun
from router_training.study_record import CURVE_POINTS
from router_training.study_state import StudyInputs, same_settings
from server.config import load_config
from tests.router_training.conftest import chat_line
from tests.router_training.study_project import SETTINGS, command, run, stages, write_plan


@pytest.fixture
def study(project: Path) -> Path:
    """The tiny project with a plan of two runs, the first with two seeds."""
    write_plan(project, {"name": "first", "seeds": [0, 1]}, {"name": "second", "settings": {"lambda_": 0}})
    return project


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_every_run_and_seed_is_trained_and_evaluated_once(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(stages(study, capsys).values()) == {"not run"}
    assert not (study / "out").exists()
    assert run(study) == 0
    finished = {"first, seed 0": "finished", "second, seed 0": "finished", "first, seed 1": "finished"}
    assert stages(study, capsys) == finished
    before = times(study / "out")
    assert run(study) == 0
    assert times(study / "out") == before


def test_a_run_of_a_study_has_the_bytes_that_train_gives(study: Path) -> None:
    """Whatever ran before it in the same process."""
    flags = ["--samples", "16", "--max-length", "64", "--warm-start-samples", "8", "--batch-size", "4"]
    flags += ["--lm-weighting", "relative", "--steps", "2", "--lambda", "0", "--validation-rows", "2"]
    inputs = ["--config", str(study / "adapters.yaml"), "--data", str(study / "data")]
    assert main(["train", *inputs, "--out", str(study / "alone"), *flags]) == 0
    assert run(study) == 0
    from server.routing.router import load_artefact

    alone, of_study = load_artefact(study / "alone"), load_artefact(study / "out/runs/second/seed0")
    assert of_study.row_digests() == alone.row_digests()
    record = {key: value for key, value in alone.training.items() if key not in ("background", "validation")}
    assert of_study.training == record
    evaluation = json.loads((study / "out/runs/second/seed0/evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["policies"] == alone.training["validation"]["policies"]


def test_a_changed_setting_reruns_what_it_concerns_and_nothing_else(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(study) == 0
    second = times(study / "out/runs/second")
    write_plan(study, {"name": "first", "settings": {"alpha": 0.5}}, {"name": "second", "settings": {"lambda_": 0}})
    assert stages(study, capsys) == {"first, seed 0": "outdated", "second, seed 0": "finished"}
    assert run(study) == 0
    assert times(study / "out/runs/second") == second
    training = json.loads((study / "out/runs/first/seed0/router.json").read_text(encoding="utf-8"))["training"]
    assert training["settings"]["alpha"] == 0.5


def test_chats_that_only_a_prompt_gate_sees_concern_runs_that_have_one(study: Path) -> None:
    path = study / "data/letters/train.jsonl"
    config = load_config(study / "adapters.yaml")
    plain, gated = (
        StudyRun(name, "ablation", "", TrainingConfig(samples=2, prompt_gate=name == "gated"), EvaluationPlan(), True)
        for name in ("plain", "gated")
    )
    before = StudyInputs(config, [study / "data"], [])
    drawn = {chat.origin for chat in before.mix(plain).chats}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    unseen = next(index for index in range(len(lines)) if f"{path}:{index + 1}" not in drawn)
    lines[unseen] = chat_line("digits", 99)
    path.write_text("".join(lines), encoding="utf-8")
    after = StudyInputs(config, [study / "data"], [])
    assert after.training_digest(plain) == before.training_digest(plain)
    assert after.training_digest(gated) != before.training_digest(gated)
    assert before.training_digest(gated) != before.training_digest(plain)


@pytest.mark.parametrize(
    ("constant", "outdated"),
    [("composites.FORM", [("composites", "both"), ("measured",)]), ("prompt_fit.RECIPE", [("gated",), ()])],
)
def test_a_new_way_to_make_what_a_run_uses_outdates_that_run(
    study: Path, monkeypatch: pytest.MonkeyPatch, constant: str, outdated: list[tuple[str, ...]]
) -> None:
    config, samples = load_config(study / "adapters.yaml"), 8
    runs = {
        "plain": (TrainingConfig(samples=samples), EvaluationPlan()),
        "gated": (TrainingConfig(samples=samples, prompt_gate=True), EvaluationPlan()),
        "composites": (TrainingConfig(samples=samples, composite_fraction=0.5), EvaluationPlan()),
        "both": (TrainingConfig(samples=samples, composite_fraction=0.5), EvaluationPlan()),
        "measured": (TrainingConfig(samples=samples), EvaluationPlan(composites=4)),
    }
    planned = {name: StudyRun(name, "ablation", "", *parts, True) for name, parts in runs.items()}

    def digests() -> list[dict[str, str]]:
        inputs = StudyInputs(config, [study / "data"], [])
        return [
            {name: digest_of(run) for name, run in planned.items()}
            for digest_of in (inputs.training_digest, inputs.evaluation_digest)
        ]

    before = digests()
    monkeypatch.setattr(f"router_training.{constant}", "another")
    for old, new, names in zip(before, digests(), outdated, strict=True):
        assert {name for name in old if old[name] != new[name]} == set(names)


def test_changed_data_or_adapters_rerun_everything(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_plan(study, {"name": "only"}, steps=0)
    assert run(study) == 0
    path = study / "data/letters/train.jsonl"
    content = path.read_text(encoding="utf-8")
    path.write_text(content.replace("abc", "abd").replace("aaa", "bba"), encoding="utf-8")
    assert stages(study, capsys) == {"only, seed 0": "outdated"}
    path.write_text(content, encoding="utf-8")
    assert stages(study, capsys) == {"only, seed 0": "finished"}
    weights = study / "digits/adapter_model.safetensors"
    weights.write_bytes((study / "letters/adapter_model.safetensors").read_bytes())
    assert stages(study, capsys) == {"only, seed 0": "outdated"}


def test_another_evaluation_keeps_the_rows(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_plan(study, {"name": "only"})
    assert run(study) == 0
    artefact = study / "out/runs/only/seed0/router.safetensors"
    before = artefact.stat().st_mtime_ns
    write_plan(study, {"name": "only", "evaluation": {"rows": 3, "composites": 2}})
    assert stages(study, capsys) == {"only, seed 0": "trained"}
    assert run(study) == 0
    assert artefact.stat().st_mtime_ns == before
    record = json.loads((study / "out/runs/only/seed0/evaluation.json").read_text(encoding="utf-8"))
    assert record["chats"] == {"letters": 3, "digits": 3}
    assert record["composite"]["chats"] == 2


def test_a_killed_study_goes_on_and_ends_in_the_same_bytes(project: Path) -> None:
    write_plan(project, {"name": "only"}, steps=40, checkpoint_every=3)
    folder = project / "out/runs/only/seed0"
    process = subprocess.Popen(
        [sys.executable, "-m", "router_training", *command(project)],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 8) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (folder / CHECKPOINT_NAME).exists()
    assert not (folder / "router.json").exists()
    again = [sys.executable, "-m", "router_training", *command(project)]
    done = subprocess.run(
        again,
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "continuing after step" in done.stderr
    assert not (folder / CHECKPOINT_NAME).exists()
    resumed = (folder / "router.safetensors").read_bytes()
    shutil.rmtree(project / "out")
    subprocess.run(
        again,
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=True,
    )
    assert (folder / "router.safetensors").read_bytes() == resumed


def test_a_checkpoint_of_another_machine_is_started_again_from(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_plan(project, {"name": "only"})
    assert run(project) == 0
    folder = project / "out/runs/only/seed0"
    rows = (folder / "router.safetensors").read_bytes()
    state = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    (folder / "study.json").write_text(json.dumps({**state, "trained": False, "evaluation": None}), encoding="utf-8")
    Checkpoint(folder, "of another torch").save({})
    capsys.readouterr()
    assert run(project) == 0
    assert "starting again: " in capsys.readouterr().err
    assert (folder / "router.safetensors").read_bytes() == rows


def test_a_damaged_state_is_named(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = study / "out/runs/second/seed0"
    folder.mkdir(parents=True)
    (folder / "study.json").write_text('{"training": ', encoding="utf-8")
    assert run(study, "--list") == 1
    assert "second/seed0/study.json is no state of a run" in capsys.readouterr().err


def test_a_setting_that_came_later_counts_as_its_default() -> None:
    settings = TrainingConfig(alpha=0.5)
    recorded = settings.record()
    del recorded["distil"]
    assert same_settings(recorded, settings)
    assert not same_settings(recorded, TrainingConfig(alpha=0.5, distil=0.1))
    assert not same_settings({**recorded, "alpha": 0.4}, settings)
    assert not same_settings({**recorded, "no_longer": 1}, settings)


def test_a_failing_run_is_reported_and_the_others_go_on(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A chat that is too long for one run's limit is found with the tokenizer, long after the plan was read."""
    write_plan(study, {"name": "broken", "settings": {"max_length": 8}}, {"name": "whole"})
    assert run(study, "--json", str(study / "study.json")) == 1
    assert "[broken, seed 0] failed: " in capsys.readouterr().err
    assert stages(study, capsys) == {"broken, seed 0": "failed", "whole, seed 0": "finished"}
    broken, whole = json.loads((study / "study.json").read_text(encoding="utf-8"))["runs"]
    assert "the longest allowed is 8" in broken["error"]
    assert "evaluation" not in broken
    assert "evaluation" in whole


def test_only_does_the_named_runs_and_the_record_lists_all(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(study, "--only", "second", "--json", str(study / "study.json")) == 0
    record = json.loads((study / "study.json").read_text(encoding="utf-8"))
    assert [(found["name"], found["seed"], found["stage"]) for found in record["runs"]] == [
        ("first", 0, "not run"),
        ("second", 0, "finished"),
        ("first", 1, "not run"),
    ]
    assert run(study, "--only", "secnod") == 1
    assert "did you mean 'second'?" in capsys.readouterr().err


def test_a_run_that_another_process_works_on_is_left_to_it(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (study / "out/locks").mkdir(parents=True)
    with FileLock(study / "out/locks/second-seed0.lock"):
        assert run(study) == 0
    assert "[second, seed 0] another process works on it" in capsys.readouterr().err
    assert stages(study, capsys)["second, seed 0"] == "not run"


def test_runs_that_start_alike_share_their_warm_start(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(study, "--only", "first") == 0
    capsys.readouterr()
    assert run(study, "--only", "second") == 0
    assert "warm start" not in capsys.readouterr().err


def test_rows_are_reused_only_from_a_run_of_the_same_record(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_plan(study, {"name": "only"})
    assert run(study) == 0
    shutil.move(study / "out/runs/only/seed0", study / "earlier")
    shutil.rmtree(study / "out")
    reuse = ["--reuse", str(study / "earlier")]
    assert run(study, *reuse) == 0
    assert "[only, seed 0] taken from" in capsys.readouterr().err
    rows = study / "out/runs/only/seed0/router.safetensors"
    assert rows.read_bytes() == (study / "earlier/router.safetensors").read_bytes()
    write_plan(study, {"name": "only", "settings": {"alpha": 0.5}})
    assert run(study, *reuse) == 0
    assert "taken from" not in capsys.readouterr().err
    assert rows.read_bytes() != (study / "earlier/router.safetensors").read_bytes()
    write_plan(study, {"name": "only", "settings": {"alpha": 0.6}})
    assert run(study, "--reuse", str(study / "nowhere")) == 1
    assert "no router artefact" in capsys.readouterr().err


def test_the_record_has_what_the_report_needs_in_few_numbers(study: Path) -> None:
    shutil.copytree(study / "data/letters", study / "data/base")
    evaluation = {"composites": 2, "gates": "first seed", "generate": 1, "max_new_tokens": 3}
    evaluation |= {"baselines": "first seed", "comparison_rows": 1}
    write_plan(study, {"name": "only", "evaluation": {**evaluation, "calibration_chats": 1}}, steps=60)
    assert run(study, "--json", str(study / "study.json")) == 0
    record = json.loads((study / "study.json").read_text(encoding="utf-8"))
    assert record["data"]["letters"] == {"train": 12, "validation": 4}
    (only,) = record["runs"]
    assert only["settings"] == {**SETTINGS, "batch_size": 4, "steps": 60}
    assert only["training"]["steps"] == 60
    assert len(only["training"]["entropy"]) == len(only["training"]["step"]) == 30 <= CURVE_POINTS
    assert only["facts"]["start_s"] > 0
    assert only["facts"]["machine"]["cores"] > 0
    whole = json.loads((study / "out/runs/only/seed0/evaluation.json").read_text(encoding="utf-8"))
    assert only["evaluation"]["policies"].keys() == {"base", "own_adapter", "uniform", "routed"}
    compared = only["evaluation"]["comparison"]
    assert {"arrow", "lda", "phatgoose", "only_digits", "per_request"} < compared["policies"].keys()
    assert compared["chats"] == {"base": 1, "letters": 1, "digits": 1}
    assert compared["calibration"]["chats_per_task"] == 1
    assert compared["composite"]["policies"].keys() == compared["policies"].keys()
    nll, own_share, _ = only["evaluation"]["policies"]["routed"]["digits"]
    assert nll == pytest.approx(whole["policies"]["routed"]["digits"]["nll"], abs=1e-5)
    assert own_share == pytest.approx(whole["policies"]["routed"]["digits"]["own_share"], abs=1e-5)
    assert only["evaluation"]["composite"]["chats"] == 2
    assert only["evaluation"]["gates"] == whole["gates"]
    assert only["evaluation"]["metrics"] == whole["metrics"]
