"""A study's results as one small JSON: all that the report is made of, runs that are missing among it.

Writers take turns. A measurement in the file outlives the folder it was made in for as long as it is of the plan.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from router_training.run import EVALUATION_NAME, write_json
from router_training.settings import TrainingConfig
from router_training.step_log import METRICS_NAME
from router_training.study import Study
from router_training.study_entries import FORMAT_VERSION, OUTDATED, Entries
from router_training.study_plan import StudyRun
from router_training.study_state import RunState, Stage, StudyInputs

CURVE_POINTS = 50
"""Points kept of the curves over training; each is a mean over the steps it stands for."""
CURVES = ("lm_loss", "balance", "entropy")
DIGITS = 5
"""Decimals of nats kept. They are means over some thousand tokens."""
POLICY_MEASURES = ("nll", "own_share", "own_top1")
FROM_THE_RECORD = ("chats", "calibration", "metrics", "gates")
SILENT_WAIT_S = 2.0
"""Another writer is done in less, unless it has to draw a plan's mixes first."""


def collect(study: Study, inputs: StudyInputs, entries: Entries) -> dict[str, Any]:
    """The record of all runs of the study, finished or not. What `entries` have measured as it is planned now stays as
    it is, machine included; for all else the study's folder has the word. A measurement of the same settings but of
    other data, adapters or evaluation stays, marked as outdated, until there is a new one."""
    base = inputs.config.base_model
    return {
        "format_version": FORMAT_VERSION,
        "defaults": TrainingConfig().record(),
        "base_model": {"name": base.name, "source": base.source, "dtype": base.dtype},
        "adapters": inputs.names,
        "data": inputs.counts(),
        "runs": [_entry(study, inputs, run, entries) for run in study.runs],
    }


def write_record(study: Study, inputs: StudyInputs, path: Path) -> None:
    """`collect` over what a file holds, which is replaced as a whole. Raises ConfigError for a file that is no record;
    it is left as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _turn(path):
        write_json(collect(study, inputs, Entries.read(path)), path)


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Hold the lock of a record, so that nobody writes between reading and writing; the system drops it when its
    process dies."""
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=SILENT_WAIT_S)
    except Timeout:
        print(f"waiting for another process that writes {path}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _entry(study: Study, inputs: StudyInputs, run: StudyRun, entries: Entries) -> dict[str, Any]:
    planned = {"name": run.name, "section": run.section, "note": run.note, "seed": run.seed}
    # Anew, because they are those that differ from the defaults, which another version may have had others of.
    settings = changed_settings(run.settings)
    if (measured := entries.measured(run, inputs)) is not None:
        return {**planned, "stage": "finished", "settings": settings, **measured}
    stage = study.stage(run)
    if stage != "finished" and (before := entries.measured_before(run)) is not None:
        return {**planned, "stage": OUTDATED, "settings": settings, **before}
    return {**planned, "stage": stage, "settings": settings, **_in_folder(study.folder(run), stage)}


def _in_folder(folder: Path, stage: Stage) -> dict[str, Any]:
    """What is done of a run; nothing where it is outdated."""
    state = RunState.read(folder)
    record: dict[str, Any] = {}
    if state is None or stage == "outdated":
        return record
    if state.error is not None:
        record["error"] = state.error
    if stage == "finished":
        record["digests"] = {"training": state.training, "evaluation": state.evaluation}
    if state.trained:
        record |= {"facts": dict(state.facts), "training": _curves(folder / METRICS_NAME)}
    if stage == "finished":
        record["evaluation"] = thinned(json.loads((folder / EVALUATION_NAME).read_text(encoding="utf-8")))
    return record


def changed_settings(settings: TrainingConfig) -> dict[str, Any]:
    """Settings that are not the default's, the seed left out."""
    defaults = TrainingConfig().record()
    return {key: value for key, value in settings.record().items() if key != "seed" and value != defaults[key]}


def thinned(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation record less what follows from the rest, in few digits."""
    record = {key: evaluation[key] for key in FROM_THE_RECORD if key in evaluation}
    record["policies"] = _measures(evaluation["policies"])
    for name in ("phrased", "composite"):
        if name in evaluation:
            found = evaluation[name]
            record[name] = {"chats": found["chats"], "policies": _measures(found["policies"])}
    if "comparison" in evaluation:
        record["comparison"] = thinned(evaluation["comparison"])
    return record


def _measures(policies: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """policy -> task -> [nll, own_share, own_top1]."""
    return {
        policy: {task: [round(found[name], DIGITS) for name in POLICY_MEASURES] for task, found in tasks.items()}
        for policy, tasks in policies.items()
    }


def _curves(path: Path) -> dict[str, Any]:
    """Metrics over the steps, thinned, and the seconds that all steps took. Empty where there are no metrics."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not lines:
        return {"steps": 0, "steps_s": 0.0}
    size = -(-len(lines) // CURVE_POINTS)
    parts = [lines[start : start + size] for start in range(0, len(lines), size)]
    record: dict[str, Any] = {
        "steps": len(lines),
        "steps_s": round(sum(line["seconds"] for line in lines), 1),
        "tokens": sum(line["tokens"] for line in lines),
        "step": [part[0]["step"] for part in parts],
    }
    for name in CURVES:
        record[name] = [round(_mean([line[name] for line in part]), DIGITS) for part in parts]
    return record


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
