"""What a study's record says about runs: the file read and checked, and which measurements in it are still the plan's.

Writes nothing; `study_record` makes the entries.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from router_training.study_plan import StudyRun
from router_training.study_state import StudyInputs, same_settings
from server.errors import ConfigError

FORMAT_VERSION = 1
OUTDATED = "outdated"
"""Stage of an entry whose measurement is of data, adapters or an evaluation that the plan no longer has."""
MEASURED = ("digests", "facts", "training", "evaluation")
"""Keys of an entry that come from training and measuring a run; the others say what the plan wants."""

_STRICT = ConfigDict(frozen=True, strict=True)


class _Entry(BaseModel):
    model_config = _STRICT

    name: str
    section: str
    note: str
    seed: int
    stage: str
    settings: dict[str, Any]
    digests: dict[str, str] | None = None
    """Absent in records of earlier versions."""
    facts: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None


class _Record(BaseModel):
    model_config = _STRICT

    format_version: Literal[1]  # FORMAT_VERSION
    defaults: dict[str, Any]
    base_model: dict[str, Any]
    adapters: list[str]
    data: dict[str, Any]
    runs: list[_Entry]


class Entries:
    """The runs of a record by name and seed."""

    def __init__(self, record: Mapping[str, Any] | None) -> None:
        """None: there is no record yet."""
        self._defaults: Mapping[str, Any] = record["defaults"] if record else {}
        self._runs = {(entry["name"], entry["seed"]): entry for entry in (record["runs"] if record else [])}

    @staticmethod
    def read(path: Path | None) -> "Entries":
        """No entries where there is no file. Raises ConfigError for a file that is no record."""
        return Entries(read_record(path) if path is not None and path.exists() else None)

    def has_measured(self, run: StudyRun) -> bool:
        """Whether there is a measurement of this name and seed, whatever it was made of."""
        return "evaluation" in self._runs.get((run.name, run.seed), {})

    def measured(self, run: StudyRun, inputs: StudyInputs) -> dict[str, Any] | None:
        """What an entry holds under `MEASURED`, if it was made by this run as it is planned now; else None.

        Without digests nobody can say what it was made of.
        """
        before = self.measured_before(run)
        return before if before is not None and before["digests"] == digests(run, inputs) else None

    def measured_before(self, run: StudyRun) -> dict[str, Any] | None:
        """As `measured`, of the same settings but perhaps of other data, adapters or evaluation."""
        entry = self._runs.get((run.name, run.seed), {})
        if not all(key in entry for key in MEASURED):
            return None
        settings = {**self._defaults, **entry["settings"], "seed": run.seed}
        return {key: entry[key] for key in MEASURED} if same_settings(settings, run.settings) else None


def digests(run: StudyRun, inputs: StudyInputs) -> dict[str, str]:
    """What a measurement made now is made of, beside the settings."""
    return {"training": inputs.training_digest(run), "evaluation": inputs.evaluation_digest(run)}


def read_record(path: Path) -> dict[str, Any]:
    """The content of a file that `study --json` wrote. Raises ConfigError with the reason for anything else."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        checked = _Record.model_validate(record)
    except OSError as error:
        raise ConfigError(f"cannot read the study's record {path}: {error.strerror}") from error
    except ValidationError as error:
        raise _no_record(path, "; ".join(map(_explain, error.errors()))) from error
    except ValueError as error:
        raise _no_record(path, f"no JSON: {error}") from error
    runs = [f"{run.name}, seed {run.seed}" for run in checked.runs]
    if twice := sorted({run for run in runs if runs.count(run) > 1}):
        raise _no_record(path, f"runs that are listed twice: {'; '.join(twice)}")
    return record


def _no_record(path: Path, reason: str) -> ConfigError:
    hint = "`lora-mixer-train study --json` writes one; move this file away, or name another"
    return ConfigError(f"{path} is not a study's record ({reason}); {hint}")


def _explain(problem: Mapping[str, Any]) -> str:
    place = ".".join(map(str, problem["loc"]))
    return f"{place}: {problem['msg']}" if place else str(problem["msg"])
