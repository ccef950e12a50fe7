"""A study's plan: a YAML file that lists runs, checked whole before anything starts. Trains and measures nothing.

defaults: {settings: {steps: 50}, seeds: [0], evaluation: {rows: 20}}
runs:
  - {name: short, section: ablation}
  - {name: no-entropy, section: ablation, settings: {lambda_: 0}}
"""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from router_training.phrasings import Phrasing, read_phrasings
from router_training.settings import TrainingConfig
from router_training.suite import SuiteOptions
from server.config import UniqueKeyLoader
from server.errors import ConfigError

Section = Literal["main", "ablation", "curve"]
WhichSeeds = Literal["none", "first seed", "every seed"]

_STRICT = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class EvaluationPlan(BaseModel):
    """How much of a run is measured."""

    model_config = _STRICT

    rows: Annotated[int, Field(ge=0)] = 0
    """First validation chats of every task; 0 means all."""
    composites: Annotated[int, Field(ge=0)] = 0
    """Chats that join two tasks; 0 leaves the set out."""
    phrasings: Path | None = None
    """File of phrasings that the run is not trained on, relative to the plan: the chats asked in those are a set of
    their own, for the baselines too. None leaves the set out."""
    baselines: WhichSeeds = "none"
    """Every baseline beside base, own adapter, uniform mix and router; most do not depend on the seed. They are
    compared on a set of their own, on which the router of every seed is measured too."""
    comparison_rows: Annotated[int, Field(ge=0)] | None = None
    """Validation chats of every task in that set; None: as `rows`. There are some thirty policies."""
    comparison_composites: Annotated[int, Field(ge=0)] | None = None
    """Composite chats in that set; None: as `composites`."""
    calibration_chats: Annotated[int, Field(ge=1)] = 16
    """Training chats per task that the baselines with something to fit see."""
    generate: Annotated[int, Field(ge=0)] = 0
    """Chats per task that get an answer generated and scored by the task's metric; 0 leaves task metrics out. First
    seed only: it is by far the longest part."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 200
    """Tokens of a generated answer."""
    gates: WhichSeeds = "none"
    """Gate shares by layer, by position and along composite chats."""


class Defaults(BaseModel):
    """What every run has unless it says otherwise."""

    model_config = _STRICT

    settings: dict[str, Any] = Field(default_factory=dict)
    """Fields of `TrainingConfig`, except `seed`."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    evaluation: dict[str, Any] = Field(default_factory=dict)
    """Fields of `EvaluationPlan`."""


class RunPlan(BaseModel):
    """One run of the list."""

    model_config = _STRICT

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    """Folder of its results, and its name in the report."""
    section: Section
    """Part of the report it belongs to. The first run of a section is what its others are compared with."""
    note: str = ""
    """For the report; what differs in settings is said there anyway."""
    settings: dict[str, Any] = Field(default_factory=dict)
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] | None = None
    """None: the defaults'."""
    evaluation: dict[str, Any] = Field(default_factory=dict)


class PlanFile(BaseModel):
    """The whole file."""

    model_config = _STRICT

    defaults: Defaults = Field(default_factory=Defaults)
    runs: Annotated[tuple[RunPlan, ...], Field(min_length=1)]


@dataclass(frozen=True)
class StudyRun:
    """One run under one seed, every default filled in."""

    name: str
    section: Section
    note: str
    settings: TrainingConfig
    evaluation: EvaluationPlan
    is_first_seed: bool
    phrasings: Mapping[str, Phrasing] | None = None
    """What the evaluation's file of phrasings said when the plan was read."""

    @property
    def seed(self) -> int:
        return self.settings.seed

    @property
    def title(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def has_comparison(self) -> bool:
        return self.evaluation.baselines != "none"

    @property
    def comparison_rows(self) -> int:
        """Validation chats of every task that the baselines are measured on; 0 means all."""
        plan = self.evaluation
        return plan.rows if plan.comparison_rows is None else plan.comparison_rows

    def comparison_options(self, cache: Path | None = None) -> SuiteOptions:
        """What the comparison with the baselines covers for this seed."""
        plan = self.evaluation
        composites = plan.composites if plan.comparison_composites is None else plan.comparison_composites
        return SuiteOptions(
            baselines=self._wants(plan.baselines),
            calibration_chats=plan.calibration_chats,
            composites=composites,
            phrasings=self.phrasings,
            cache=cache,
            gates=False,
        )

    def suite_options(self, cache: Path | None = None) -> SuiteOptions:
        """What the evaluation of this seed covers beside the comparison with the baselines."""
        plan = self.evaluation
        return SuiteOptions(
            composites=plan.composites,
            phrasings=self.phrasings,
            generated_rows=plan.generate if self.is_first_seed else 0,
            max_new_tokens=plan.max_new_tokens,
            cache=cache,
            gates=self._wants(plan.gates),
        )

    def _wants(self, which: WhichSeeds) -> bool:
        return which == "every seed" or (which == "first seed" and self.is_first_seed)


def read_plan(path: Path) -> list[StudyRun]:
    """Every (run, seed): the first seed of every run in the file's order, then the second seeds, and so on, so that a
    study that is cut has something of everything.

    Raises ConfigError with every problem of the file, an unknown key with its nearest known one.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"cannot read the plan {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    try:
        plan = PlanFile.model_validate(content)
    except ValidationError as error:
        raise ConfigError(_listed(path, [_explain(problem, _known_in_file) for problem in error.errors()])) from error
    return _expanded(plan, path)


def choose(runs: Sequence[StudyRun], only: Sequence[str]) -> list[StudyRun]:
    """The runs with these names, all if none are given. Raises ConfigError for a name that the plan does not have."""
    names = list(dict.fromkeys(run.name for run in runs))
    if unknown := [name for name in only if name not in names]:
        hints = [f"no run {name!r} in the plan{_hint(name, names)}" for name in unknown]
        raise ConfigError("; ".join(hints))
    return [run for run in runs if not only or run.name in only]


def _expanded(plan: PlanFile, path: Path) -> list[StudyRun]:
    problems: list[str] = []
    names = [run.name for run in plan.runs]
    problems += [f"two runs are called {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
    by_run = [_seeds_of(run, plan.defaults, path.parent, problems) for run in plan.runs]
    if problems:
        raise ConfigError(_listed(path, list(dict.fromkeys(problems))))
    most = max(map(len, by_run))
    return [seeds[number] for number in range(most) for seeds in by_run if number < len(seeds)]


def _seeds_of(run: RunPlan, defaults: Defaults, folder: Path, problems: list[str]) -> list[StudyRun]:
    seeds = run.seeds or defaults.seeds
    if len(set(seeds)) < len(seeds):
        problems.append(f"run {run.name!r}: a seed is listed twice")
    try:
        evaluation = EvaluationPlan.model_validate({**defaults.evaluation, **run.evaluation})
        merged = {**defaults.settings, **run.settings}
        if "seed" in merged:
            problems.append(f"run {run.name!r}: give seeds as `seeds: [0, 1]` beside `settings`, not in them")
        settings = TrainingConfig.model_validate({**merged, "seed": seeds[0]})
    except ValidationError as error:
        fields = EvaluationPlan if error.title == EvaluationPlan.__name__ else TrainingConfig
        known = sorted(fields.model_fields)
        problems += [f"run {run.name!r}: {_explain(problem, lambda _: known)}" for problem in error.errors()]
        return []
    phrasings = None if evaluation.phrasings is None else _phrasings_of(run, folder / evaluation.phrasings, problems)
    return [
        StudyRun(
            name=run.name,
            section=run.section,
            note=run.note,
            settings=settings.model_copy(update={"seed": seed}),
            evaluation=evaluation,
            is_first_seed=number == 0,
            phrasings=phrasings,
        )
        for number, seed in enumerate(seeds)
    ]


def _phrasings_of(run: RunPlan, path: Path, problems: list[str]) -> Mapping[str, Phrasing] | None:
    try:
        return read_phrasings(path)
    except ConfigError as error:
        problems.append(f"run {run.name!r}: {error.message}")
        return None


def _explain(problem: Mapping[str, Any], known: Any) -> str:
    place = ".".join(map(str, problem["loc"]))
    if problem["type"] != "extra_forbidden":
        return f"{place}: {problem['msg']}" if place else str(problem["msg"])
    return f"unknown key {place!r}{_hint(str(problem['loc'][-1]), known(problem['loc']))}"


def _known_in_file(place: tuple[Any, ...]) -> Collection[str]:
    """Keys where an unknown one was found: of the file, of its defaults or of a run."""
    if len(place) == 1:
        return sorted(PlanFile.model_fields)
    return sorted((Defaults if place[0] == "defaults" else RunPlan).model_fields)


def _hint(name: str, known: Collection[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; there are {', '.join(known)}"


def _listed(path: Path, problems: Sequence[str]) -> str:
    return f"the plan {path} has problems:\n  " + "\n  ".join(problems)
