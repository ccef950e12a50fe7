"""Metrics files of runs that were cut."""

import json
from pathlib import Path

from router_training.event_log import FILE_NAME
from router_training.step_log import EVENTS_FOLDER, METRICS_NAME, StepLog
from router_training.trainer import StepMetrics


def metrics(step: int, loss: float = 1.0) -> StepMetrics:
    return StepMetrics(step, "dense", loss, loss, 1.0, 0.5, 0.1, 1e-3, 0.2, 64, 0.5)


def write(folder: Path, first: int, steps: range, loss: float) -> None:
    with StepLog(folder, first) as log:
        for step in steps:
            log.add(metrics(step, loss))


def test_a_resumed_run_overwrites_the_steps_that_it_repeats(tmp_path: Path) -> None:
    write(tmp_path, 0, range(5), loss=1.0)
    with (tmp_path / METRICS_NAME).open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "mo')  # cut in the middle of a line
    write(tmp_path, 3, range(3, 6), loss=2.0)
    lines = [json.loads(line) for line in (tmp_path / METRICS_NAME).read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(6))
    assert [line["loss"] for line in lines] == [1.0] * 3 + [2.0] * 3
    resumed = (tmp_path / EVENTS_FOLDER / FILE_NAME).read_bytes()
    whole = tmp_path / "whole"
    whole.mkdir()
    write(whole, 0, range(6), loss=1.0)
    assert len(resumed) == len((whole / EVENTS_FOLDER / FILE_NAME).read_bytes())


def test_a_new_run_keeps_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    write(tmp_path, 0, range(4), loss=1.0)
    write(tmp_path, 0, range(1), loss=3.0)
    assert len((tmp_path / METRICS_NAME).read_text(encoding="utf-8").splitlines()) == 1
