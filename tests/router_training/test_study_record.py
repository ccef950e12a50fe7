"""A study's record outlives its folder: which entries count, which are outdated, and who may write when."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.router_training.study_project import SETTINGS, run, stages, write_plan

ONLY = "only, seed 0"
IN_THE_RECORD = "finished (in the record)"
OUTDATED = "outdated (in the record)"


@pytest.fixture
def recorded(project: Path) -> Path:
    """The tiny project with one run, measured into `record.json`; its folder is lost."""
    write_plan(project, {"name": "only"}, steps=1)
    assert run(project, *into(project)) == 0
    shutil.rmtree(project / "out")
    return project


def into(project: Path) -> list[str]:
    return ["--json", str(project / "record.json")]


def read(project: Path) -> Any:
    return json.loads((project / "record.json").read_text(encoding="utf-8"))


def edit(project: Path, change: Callable[[Any], None]) -> None:
    record = read(project)
    change(record)
    (project / "record.json").write_text(json.dumps(record), encoding="utf-8")


def measured(project: Path) -> list[str]:
    return [entry["name"] for entry in read(project)["runs"] if "evaluation" in entry]


def test_a_run_that_only_the_record_has_is_finished(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (recorded / "record.json").read_bytes()
    assert stages(recorded, capsys) == {ONLY: "not run"}
    assert stages(recorded, capsys, *into(recorded)) == {ONLY: IN_THE_RECORD}
    assert run(recorded, *into(recorded)) == 0
    assert capsys.readouterr() == (f"{ONLY}: {IN_THE_RECORD}\n", "")
    assert not (recorded / "out/runs").exists()
    assert (recorded / "record.json").read_bytes() == before


def test_the_other_runs_of_a_plan_are_done_beside_it(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = read(recorded)["runs"][0]
    write_plan(recorded, {"name": "only"}, {"name": "more", "settings": {"lambda_": 0}}, steps=1)
    assert run(recorded, *into(recorded)) == 0
    assert stages(recorded, capsys, *into(recorded)) == {ONLY: IN_THE_RECORD, "more, seed 0": "finished"}
    assert [path.name for path in (recorded / "out/runs").iterdir()] == ["more"]
    assert measured(recorded) == ["only", "more"]
    assert read(recorded)["runs"][0] == kept


def test_an_entry_keeps_the_machine_it_was_made_on_and_takes_what_the_plan_says(project: Path) -> None:
    """Also where the folder holds the same run, made on this machine."""
    write_plan(project, {"name": "only"}, steps=1)
    assert run(project, *into(project)) == 0

    def elsewhere(record: Any) -> None:
        record["runs"][0]["facts"]["machine"]["cpu_model"] = "Another CPU"
        record["runs"][0]["evaluation"]["policies"]["routed"]["letters"][0] = 1.25

    edit(project, elsewhere)
    (before,) = read(project)["runs"]
    write_plan(project, {"name": "only", "section": "main", "note": "why"}, steps=1)
    assert run(project, *into(project)) == 0
    assert read(project)["runs"] == [{**before, "section": "main", "note": "why"}]


def test_a_run_whose_folder_is_behind_the_record_is_finished(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_plan(project, {"name": "only"}, steps=1)
    assert run(project, *into(project)) == 0
    path = project / "out/runs/only/seed0/study.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**state, "evaluation": None, "error": "out of memory"}), encoding="utf-8")
    before = path.read_bytes()
    assert stages(project, capsys) == {ONLY: "failed"}
    assert stages(project, capsys, *into(project)) == {ONLY: IN_THE_RECORD}
    assert run(project, *into(project)) == 0
    assert path.read_bytes() == before
    assert "error" not in read(project)["runs"][0]


def change_settings(project: Path) -> None:
    write_plan(project, {"name": "only", "settings": {"alpha": 0.5}}, steps=1)


def change_training_data(project: Path) -> None:
    path = project / "data/letters/train.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("abc", "abd").replace("aaa", "bba"), encoding="utf-8")


def change_validation_data(project: Path) -> None:
    path = project / "data/letters/validation.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("aaa", "bba"), encoding="utf-8")


def change_adapter(project: Path) -> None:
    content = (project / "letters/adapter_model.safetensors").read_bytes()
    (project / "digits/adapter_model.safetensors").write_bytes(content)


def change_evaluation(project: Path) -> None:
    write_plan(project, {"name": "only", "evaluation": {"rows": 3}}, steps=1)


def forget_digests(project: Path) -> None:
    """As versions before digests wrote it."""
    edit(project, lambda record: record["runs"][0].pop("digests"))


@pytest.mark.parametrize("change", [change_settings, forget_digests])
def test_an_entry_of_other_settings_or_of_who_knows_what_goes(
    recorded: Path, change: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    change(recorded)
    assert stages(recorded, capsys, *into(recorded)) == {ONLY: OUTDATED}
    (entry,) = read(recorded)["runs"]
    assert entry["stage"] == "not run"
    assert not {"digests", "facts", "training", "evaluation"} & entry.keys()


@pytest.mark.parametrize("change", [change_training_data, change_validation_data, change_adapter, change_evaluation])
def test_a_measurement_of_other_data_stays_until_there_is_a_new_one(
    recorded: Path, change: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    (before,) = read(recorded)["runs"]
    change(recorded)
    for _ in range(2):
        assert stages(recorded, capsys, *into(recorded)) == {ONLY: OUTDATED}
        assert read(recorded)["runs"] == [{**before, "stage": "outdated"}]
    fails = change is change_adapter  # its weights do not fit its config
    assert run(recorded, *into(recorded)) == fails
    (entry,) = read(recorded)["runs"]
    assert entry["stage"] == ("outdated" if fails else "finished")
    assert (entry["digests"] == before["digests"]) == fails


def test_an_outdated_run_is_done_again_and_says_why(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read(recorded)["runs"][0]
    change_evaluation(recorded)
    capsys.readouterr()
    assert run(recorded, *into(recorded)) == 0
    assert f"[{ONLY}] the record's entry is of other settings" in capsys.readouterr().err
    (entry,) = read(recorded)["runs"]
    assert entry["evaluation"]["chats"] == {"letters": 3, "digits": 3}
    assert entry["digests"]["training"] == before["digests"]["training"]
    assert entry["digests"]["evaluation"] != before["digests"]["evaluation"]
    assert stages(recorded, capsys, *into(recorded)) == {ONLY: "finished"}


def test_settings_are_read_with_the_defaults_that_the_record_names(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def made_under_another_default(record: Any) -> None:
        record["runs"][0]["settings"]["alpha"] = record["defaults"]["alpha"]
        record["defaults"]["alpha"] = 0.5

    edit(recorded, made_under_another_default)
    assert stages(recorded, capsys, *into(recorded)) == {ONLY: IN_THE_RECORD}
    record = read(recorded)
    assert record["defaults"]["alpha"] == 0.01
    assert record["runs"][0]["settings"] == {**SETTINGS, "batch_size": 4, "steps": 1}

    edit(recorded, lambda record: record["defaults"].update(alpha=0.5))
    assert stages(recorded, capsys, *into(recorded)) == {ONLY: OUTDATED}


def test_folders_that_share_a_record_add_to_it(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_plan(project, {"name": "first"}, {"name": "second"}, steps=0)
    for name in ("first", "second"):
        assert run(project, "--only", name, "--out", str(project / name), *into(project)) == 0
    assert measured(project) == ["first", "second"]
    found = stages(project, capsys, "--out", str(project / "second"), *into(project))
    assert found == {"first, seed 0": IN_THE_RECORD, "second, seed 0": "finished"}


def test_a_writer_waits_and_sees_what_the_one_before_wrote(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The other process is this test: it holds the lock, and writes the entry `only` while `more` waits."""
    path = recorded / "record.json"
    content = path.read_bytes()
    path.unlink()
    write_plan(recorded, {"name": "only"}, {"name": "more", "settings": {"lambda_": 0}}, steps=1)
    status: list[int] = []
    writer = threading.Thread(target=lambda: status.append(run(recorded, "--only", "more", *into(recorded))))
    waiting = threading.Event()
    with FileLock(f"{path}.lock"):
        writer.start()
        while not waiting.wait(0.05) and writer.is_alive():
            if "waiting for another process that writes" in capsys.readouterr().err:
                waiting.set()
        assert waiting.is_set()
        assert not path.exists()
        path.write_bytes(content)
    writer.join()
    assert status == [0]
    assert measured(recorded) == ["only", "more"]


GARBAGE = {
    "": "no JSON: Expecting value",
    '<<<<<<< HEAD\n{"format_version": 1}': "no JSON: Expecting value",
    "[]": "Input should be a valid dictionary",
    '{"format_version": 2}': "format_version: Input should be 1; defaults: Field required",
    '{"runs": {}}': "runs: Input should be a valid list",
    '{"runs": [{"name": "only", "seed": "0"}]}': "runs.0.seed: Input should be a valid integer",
}


@pytest.mark.parametrize("content", list(GARBAGE))
@pytest.mark.parametrize("flags", [[], ["--list"]])
def test_a_file_that_is_no_record_is_refused_before_anything_runs(
    project: Path, content: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_plan(project, {"name": "only"})
    path = project / "record.json"
    path.write_text(content, encoding="utf-8")
    assert run(project, *flags, *into(project)) == 1
    printed = capsys.readouterr().err
    assert f"{path} is not a study's record (" in printed
    assert GARBAGE[content] in printed
    assert path.read_text(encoding="utf-8") == content
    assert not (project / "out").exists()


def test_a_record_with_a_run_twice_or_bytes_of_something_else_is_refused(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(recorded, lambda record: record["runs"].append(record["runs"][0]))
    assert run(recorded, *into(recorded)) == 1
    assert "runs that are listed twice: only, seed 0" in capsys.readouterr().err
    (recorded / "record.json").write_bytes(b"\xff\xfe\x00")
    assert run(recorded, *into(recorded)) == 1
    assert "no JSON: 'utf-8' codec" in capsys.readouterr().err
    assert run(recorded, "--json", str(recorded)) == 1
    assert f"cannot read the study's record {recorded}: Is a directory" in capsys.readouterr().err
    assert not (recorded / "out").exists()
