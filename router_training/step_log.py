"""Metrics of every step, as JSON lines and as TensorBoard events, cut back to the checkpoint when a run resumes."""

import json
from dataclasses import asdict
from pathlib import Path

from router_training.event_log import EventLog
from router_training.trainer import StepMetrics

METRICS_NAME = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"


class StepLog:
    """`with StepLog(folder, next_step) as log: log.add(metrics)`; lines from `next_step` on are written again."""

    def __init__(self, folder: Path, next_step: int) -> None:
        path = folder / METRICS_NAME
        kept = _lines_before(path, next_step)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)
        self._metrics = path.open("a", encoding="utf-8")
        self._events = EventLog(folder / EVENTS_FOLDER)
        self._seconds = 0.0
        for line in kept:
            self._add_event(StepMetrics(**json.loads(line)))

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()
        self._events.__exit__()

    def add(self, metrics: StepMetrics) -> None:
        """One step that is done."""
        self._metrics.write(json.dumps(asdict(metrics)) + "\n")
        self._metrics.flush()
        self._add_event(metrics)

    def _add_event(self, metrics: StepMetrics) -> None:
        self._seconds += metrics.seconds
        scalars = {f"train/{name}": value for name, value in asdict(metrics).items() if isinstance(value, float)}
        self._events.add(metrics.step, self._seconds, scalars)


def _lines_before(path: Path, next_step: int) -> list[str]:
    """Whole lines of steps before `next_step`; a kill may have cut the last line of the file."""
    if next_step == 0 or not path.exists():
        return []
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if json.loads(line)["step"] < next_step]
