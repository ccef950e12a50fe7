"""What is done of a study: one state file per run, and digests that say whether a result is still the plan's."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from router_training import composites, prompt_fit
from router_training.data import Chat, data_digest, has_task, read_splits
from router_training.mixing import Mix, draw_mix, draw_question_mixes
from router_training.phrased import ask_anew, phrasings_digest
from router_training.roster import BASE_TASK
from router_training.run import first_rows, write_json
from router_training.settings import TrainingConfig, check_choices
from router_training.study_plan import StudyRun
from router_training.suite import SuiteOptions
from server.config import AdapterSpec, ServerConfig
from server.errors import ConfigError
from server.routing.prompt_gate import READS, TIMES_CHANCE

STATE_NAME = "study.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

Stage = Literal["not run", "outdated", "failed", "unfinished", "trained", "finished"]


@dataclass(frozen=True)
class RunState:
    """Content of a run's state file."""

    settings: Mapping[str, Any]
    training: str
    """Digest of training data, base model and adapters."""
    trained: bool = False
    evaluation: str | None = None
    """Digest of what the record covers; None until there is a record."""
    error: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Machine, versions and seconds."""

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(asdict(self), folder / STATE_NAME)

    @staticmethod
    def read(folder: Path) -> "RunState | None":
        """None where nothing has been done. Raises ConfigError for a file that is no state."""
        path = folder / STATE_NAME
        if not path.exists():
            return None
        try:
            return RunState(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path} is no state of a run ({error}); delete its folder to begin again") from error


class StudyInputs:
    """Config and chats of a study, read once, and the digests of what a run makes of them. Loads no model.

    Digests are computed once per run: drawing the mixes of a whole plan takes seconds.
    """

    def __init__(self, config: ServerConfig, data: Sequence[Path], runs: Sequence[StudyRun]) -> None:
        """Raises TrainingDataError with every problem of the data, ConfigError for a prior of unknown adapters and for
        phrasings that read none of the chats."""
        self.config = config
        self.names = [spec.name for spec in config.adapters if spec.routed]
        for run in runs:
            check_choices(run.settings, self.names)
        needs_base = any(run.settings.null_expert for run in runs)
        self.has_base = needs_base or has_task(data, BASE_TASK)
        tasks = [*self.names, *([BASE_TASK] if self.has_base else [])]
        splits = read_splits(data, tasks)
        self.train: Mapping[str, Sequence[Chat]] = splits["train"]
        self._validation = splits["validation"]
        self._digests: dict[tuple[str, str], str] = {}
        """By part and title of a run, which is unique in a plan."""
        for run in runs:
            if run.phrasings is not None:
                ask_anew(self.validation(run), run.phrasings)
                ask_anew(self.comparison(run), run.phrasings)

    def mix(self, run: StudyRun) -> Mix:
        """The training mix, as `lora-mixer-train train` draws it."""
        return draw_mix(self.chats(run), run.settings)

    def questions(self, run: StudyRun) -> tuple[Mix, ...]:
        """What its prompt gate is fitted on, if it has one."""
        return draw_question_mixes(self.chats(run), run.settings)

    def chats(self, run: StudyRun) -> dict[str, Sequence[Chat]]:
        """Training chats by choice."""
        tasks = [*self.names, *([BASE_TASK] if run.settings.null_expert else [])]
        return {task: self.train[task] for task in tasks}

    def validation(self, run: StudyRun) -> dict[str, Sequence[Chat]]:
        """Chats that a run is measured on, in the order of `lora-mixer-train evaluate`."""
        return self._first(run.evaluation.rows)

    def comparison(self, run: StudyRun) -> dict[str, Sequence[Chat]]:
        """Chats that it is compared with the baselines on."""
        return self._first(run.comparison_rows)

    def _first(self, count: int) -> dict[str, Sequence[Chat]]:
        tasks = [*([BASE_TASK] if self.has_base else []), *self.names]
        return first_rows({task: self._validation[task] for task in tasks}, count)

    def counts(self) -> dict[str, dict[str, int]]:
        """Chats per task and split."""
        splits = {"train": self.train, "validation": self._validation}
        return {task: {split: len(chats[task]) for split, chats in splits.items()} for task in self.train}

    def training_digest(self, run: StudyRun) -> str:
        """Changes with whatever changes the trained router, beside settings, versions of libraries and threads."""

        def parts() -> list[Any]:
            questions = self.questions(run)
            made = [self.mix(run).digest, [mix.digest for mix in questions] or None, self._frozen]
            made += [composites.FORM] if run.settings.composite_fraction else []
            return [*made, prompt_fit.recipe(len(questions[0]))] if questions else made

        return self._once(("training", run.title), parts)

    def evaluation_digest(self, run: StudyRun) -> str:
        """Changes with whatever changes the record beside the trained router."""
        return self._once(("evaluation", run.title), lambda: self._evaluated(run))

    def _evaluated(self, run: StudyRun) -> list[Any]:
        parts = [*_covered(run.suite_options(), self.validation(run)), None]
        if run.has_comparison:
            options = run.comparison_options()
            parts += [*_covered(options, self.comparison(run)), self._train_digest if options.baselines else None]
        if run.settings.prompt_gate:
            parts += [READS, TIMES_CHANCE]
        return parts

    def _once(self, key: tuple[str, str], content: Callable[[], Any]) -> str:
        if key not in self._digests:
            self._digests[key] = _digest(content())
        return self._digests[key]

    @cached_property
    def _train_digest(self) -> str:
        return data_digest([chat for rows in self.train.values() for chat in rows])

    @cached_property
    def _frozen(self) -> list[Any]:
        """Base model and adapters. Files by content, so that an adapter that was trained on is seen."""
        base = self.config.base_model
        folders = [(spec.name, _folder(self.config, spec)) for spec in self.config.adapters if spec.routed]
        files = [[name, file, _file_digest(folder / file)] for name, folder in folders for file in ADAPTER_FILES]
        return [[base.name, base.source, base.revision, base.dtype], files]


def is_of(state: RunState, run: StudyRun, inputs: StudyInputs) -> bool:
    """Whether what is there was made by this run as it is planned now."""
    return same_settings(state.settings, run.settings) and state.training == inputs.training_digest(run)


def same_settings(recorded: Mapping[str, Any], settings: TrainingConfig) -> bool:
    """Whether a record of settings, made by an earlier version perhaps, says what `settings` says.

    A setting that came later was at its default, which keeps what was before.
    """
    defaults, wanted = TrainingConfig().record(), settings.record()
    return recorded.keys() <= wanted.keys() and {**defaults, **recorded} == wanted


def stage_of(state: RunState | None, run: StudyRun, inputs: StudyInputs) -> Stage:
    """How far a run is. `outdated`: what is there belongs to other settings, data or adapters."""
    if state is None:
        return "not run"
    if not is_of(state, run, inputs):
        return "outdated"
    if state.error is not None:
        return "failed"
    if not state.trained:
        return "unfinished"
    return "finished" if state.evaluation == inputs.evaluation_digest(run) else "trained"


def _covered(options: SuiteOptions, chats: Mapping[str, Sequence[Chat]]) -> list[Any]:
    facts = asdict(replace(options, phrasings=None))
    del facts["cache"], facts["phrasings"]
    if options.composites:
        facts["form"] = composites.FORM
    if options.phrasings is not None:
        facts["phrasings"] = phrasings_digest(options.phrasings)
    return [facts, data_digest([chat for rows in chats.values() for chat in rows])]


def _folder(config: ServerConfig, spec: AdapterSpec) -> Path:
    return config.root / spec.source / (spec.subfolder or "")


def _file_digest(path: Path) -> str | None:
    """None for a file that is missing: loading the adapters says what that means."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
