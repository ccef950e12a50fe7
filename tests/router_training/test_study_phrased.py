"""Unseen phrasings in a study: measured where a plan names a file, and again when the file says something else."""

import json
from pathlib import Path

import pytest

from router_training.study_plan import read_plan
from router_training.study_state import StudyInputs
from server.config import load_config
from tests.router_training.study_project import run, stages, write_plan


def test_unseen_phrasings_are_measured_where_the_plan_names_a_file(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phrasings = project / "phrasings.yaml"
    phrasings.write_text("letters: {read: ['(?P<text>.*)'], write: ['Spell {text}']}", encoding="utf-8")
    evaluation = {"phrasings": phrasings.name, "baselines": "first seed", "comparison_rows": 1, "calibration_chats": 1}
    write_plan(project, {"name": "with", "evaluation": evaluation}, {"name": "without"}, steps=0)
    flags = ["--json", str(project / "study.json")]
    assert run(project, *flags) == 0
    entries = json.loads((project / "study.json").read_text(encoding="utf-8"))["runs"]
    found, other = (entry["evaluation"] for entry in entries)
    assert "phrased" not in other
    assert found["phrased"]["chats"] == {"letters": 2}
    assert found["phrased"]["policies"].keys() == {"base", "own_adapter", "uniform", "routed"}
    assert found["comparison"]["phrased"]["chats"] == {"letters": 1}
    assert found["comparison"]["phrased"]["policies"].keys() == found["comparison"]["policies"].keys()
    phrasings.write_text("# Whose.\n" + phrasings.read_text(encoding="utf-8"), encoding="utf-8")
    assert stages(project, capsys) == {"with, seed 0": "finished", "without, seed 0": "finished"}
    phrasings.write_text("letters: {read: ['(?P<text>.*)'], write: ['{text}?']}", encoding="utf-8")
    assert stages(project, capsys) == {"with, seed 0": "trained", "without, seed 0": "finished"}


def test_phrasings_of_a_task_that_there_is_not_are_refused_before_anything_runs(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = "leters: {read: ['(?P<text>.*)'], write: ['{text}?']}"
    (project / "phrasings.yaml").write_text(content, encoding="utf-8")
    write_plan(project, {"name": "only", "evaluation": {"phrasings": "phrasings.yaml"}})
    assert run(project) == 1
    assert "there are phrasings of leters, but no validation chats" in capsys.readouterr().err
    assert not (project / "out").exists()


def test_an_evaluation_without_phrasings_has_the_digest_it_had_before_there_were_any(project: Path) -> None:
    """Measurements of earlier versions count for as long as it stays."""
    write_plan(project, {"name": "only"})
    runs = read_plan(project / "study.yaml")
    inputs = StudyInputs(load_config(project / "adapters.yaml"), [project / "data"], runs)
    expected = "5fad1bdc509fdb91bd53368e2bc8fdcd5d72ff5251afb29bea1d7acbc45005f5"
    assert inputs.evaluation_digest(runs[0]) == expected


def test_what_a_prompt_gate_reads_belongs_to_the_evaluation_of_runs_that_have_one(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plan(project, {"name": "with", "settings": {"prompt_gate": True}}, {"name": "without"})
    runs = read_plan(project / "study.yaml")

    def digests() -> list[str]:
        inputs = StudyInputs(load_config(project / "adapters.yaml"), [project / "data"], runs)
        return [inputs.evaluation_digest(planned) for planned in runs]

    before = digests()
    monkeypatch.setattr("router_training.study_state.READS", "something else")
    assert [now == then for now, then in zip(digests(), before, strict=True)] == [False, True]
