"""The driver of a study: trains and evaluates every run of a plan in one process, one base model for all of them.

Several processes may share the output folder: each run is locked by the one that works on it. Nothing that is finished
is done again, whether the folder or a record of results holds it; a run that was killed goes on from its checkpoint.
"""

import dataclasses
import json
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from router_training.artefact import build_artefact
from router_training.cells import CellCache
from router_training.checkpoint import CHECKPOINT_NAME, Checkpoint
from router_training.checks import check_held_out, check_layers, check_lengths
from router_training.data import Chat
from router_training.frozen import check_frozen, frozen_digests
from router_training.mixing import encode_mix
from router_training.prompt_fit import train_prompt_gate
from router_training.roster import Roster
from router_training.run import (
    EVALUATION_NAME,
    fingerprint,
    load_with_progress,
    run_record,
    train_router,
    write_json,
)
from router_training.settings import TrainingConfig
from router_training.step_log import METRICS_NAME
from router_training.study_entries import Entries
from router_training.study_plan import StudyRun
from router_training.study_start import KeptStart
from router_training.study_state import RunState, Stage, StudyInputs, is_of, same_settings, stage_of
from router_training.suite import Suite, SuiteOptions
from server.errors import ConfigError, RouterArtefactError
from server.machine import machine_facts, version_facts
from server.routing.router import load_artefact, save_artefact

ARTEFACT_FILES = ("router.json", "router.safetensors")

NOT_IN_A_STUDY = ("background", "validation")
"""Parts of a training record that say nothing about the rows: statistics for hot registration, and the evaluation."""


class Study:
    """Runs of a plan, their inputs, and the folder `out` that holds what is done of them."""

    def __init__(
        self,
        inputs: StudyInputs,
        runs: Sequence[StudyRun],
        out: Path,
        *,
        cache: Path | None = None,
        reuse: Sequence[Path] = (),
        record: Path | None = None,
    ) -> None:
        """`cache` holds finished measurements, by default below `out`. A run whose training record equals that of an
        artefact folder in `reuse` takes its rows from there. A run that the file `record` has measured as it is planned
        now is finished, whatever `out` holds."""
        self.runs = list(runs)
        self._inputs = inputs
        self._out = out
        self._cache = cache or out / "cells"
        self._reuse = list(reuse)
        self._record = record
        self._roster: Roster | None = None

    def folder(self, run: StudyRun) -> Path:
        return self._out / "runs" / run.name / f"seed{run.seed}"

    def stage(self, run: StudyRun) -> Stage:
        """How far a run is in the folder."""
        return stage_of(RunState.read(self.folder(run)), run, self._inputs)

    def described(self, run: StudyRun) -> str:
        """The stage for people; where the record knows more than the folder, what it knows."""
        stage, entries = self.stage(run), Entries.read(self._record)
        if stage == "finished":
            return stage
        if entries.measured(run, self._inputs) is not None:
            return "finished (in the record)"
        return "outdated (in the record)" if stage == "not run" and entries.has_measured(run) else stage

    def run(self, after_each: Callable[[], None] = lambda: None) -> list[StudyRun]:
        """Do what is missing, in order; the runs that failed. One that fails is reported and the others go on."""
        failed = []
        for run in self.runs:
            try:
                with FileLock(self._lock_path(run), timeout=0):
                    done = self._is_finished(run) or self._attempt(run)
            except Timeout:
                _say(run, "another process works on it")
                continue
            if not done:
                failed.append(run)
            after_each()
        return failed

    def _is_finished(self, run: StudyRun) -> bool:
        """Here or in the record, which is read anew: other processes add to it."""
        if self.stage(run) == "finished":
            return True
        entries = Entries.read(self._record)
        if entries.measured(run, self._inputs) is not None:
            return True
        if entries.has_measured(run):
            _say(run, "the record's entry is of other settings, data, adapters or evaluation, or does not say of which")
        return False

    def _attempt(self, run: StudyRun) -> bool:
        """Whether the run is finished now. Any error ends this run alone; it is kept in its state."""
        started = time.monotonic()
        try:
            self._prepare_folder(run)
            self._train(run)
            self._evaluate(run)
        except Exception as error:
            # The frozen weights may be what went wrong: the next run gets fresh ones.
            self._roster = None
            traceback.print_exc()
            _say(run, f"failed: {error}")
            state = RunState.read(self.folder(run)) or self._new_state(run)
            dataclasses.replace(state, error=f"{type(error).__name__}: {error}").write(self.folder(run))
            return False
        _say(run, f"finished after {time.monotonic() - started:.0f} s")
        return True

    def _prepare_folder(self, run: StudyRun) -> None:
        """An empty folder where what is there is outdated, else what is left of the run."""
        folder = self.folder(run)
        state = RunState.read(folder)
        if state is None or not is_of(state, run, self._inputs):
            if state is not None:
                _say(run, "settings, data or adapters have changed; starting again")
            shutil.rmtree(folder, ignore_errors=True)
            state = self._new_state(run)
        dataclasses.replace(state, error=None).write(folder)

    def _train(self, run: StudyRun) -> None:
        state, folder = self._state(run), self.folder(run)
        if state.trained:
            return
        _say(run, "training")
        roster, mix, settings = self._loaded(), self._inputs.mix(run), run.settings
        check_layers(settings, roster.routed.num_layers)
        loaded = roster.loaded
        check_lengths(self._inputs.chats(run), roster.label_of_task, loaded, settings)
        sequences = encode_mix(mix, roster.label_of_task, loaded.tokenizer, loaded.eos_token_ids, settings)
        questions = self._inputs.questions(run)
        record = without(run_record(roster, mix, questions, sequences, settings), NOT_IN_A_STUDY)
        facts: dict[str, Any] = {"machine": machine_facts(), "versions": version_facts(), "threads": record["threads"]}
        checkpoint = self._checkpoint(run, record)
        if (source := self._same_rows(record, settings)) is not None:
            _say(run, f"taken from {source}")
            for name in (*ARTEFACT_FILES, METRICS_NAME):
                if (source / name).exists():
                    shutil.copyfile(source / name, folder / name)
        else:
            before = frozen_digests(roster)
            start = KeptStart(CellCache(self._cache))
            prompt_gate = train_prompt_gate(loaded, roster.label_of_task, questions, settings)
            router = train_router(roster, sequences, settings, folder, checkpoint, prompt_gate=prompt_gate, start=start)
            check_frozen(roster, before)
            if not start.seconds:  # A run that went on from a checkpoint did not start here.
                start(roster, sequences, settings)
            facts["start_s"] = start.seconds
            artefact = build_artefact(router.detached(), roster, settings, prompt_gate=prompt_gate, training=record)
            save_artefact(artefact, folder)
        dataclasses.replace(state, trained=True, facts=facts).write(folder)
        checkpoint.delete()

    def _checkpoint(self, run: StudyRun, record: Mapping[str, Any]) -> Checkpoint:
        """The run's own; one that cannot be gone on from (another thread count, another torch) is dropped."""
        checkpoint = Checkpoint(self.folder(run), fingerprint(record, run.settings, self._inputs.questions(run)))
        try:
            checkpoint.load()
        except ConfigError as error:
            _say(run, f"starting again: {error.message}")
            checkpoint.delete()
        return checkpoint

    def _evaluate(self, run: StudyRun) -> None:
        state, folder = self._state(run), self.folder(run)
        digest = self._inputs.evaluation_digest(run)
        (folder / CHECKPOINT_NAME).unlink(missing_ok=True)
        if state.evaluation == digest:
            return
        _say(run, "evaluating")
        record = self._measure(run, run.suite_options(self._cache), self._inputs.validation(run))
        if run.has_comparison:
            options = run.comparison_options(self._cache)
            record["comparison"] = self._measure(run, options, self._inputs.comparison(run))
        write_json(record, folder / EVALUATION_NAME)
        dataclasses.replace(state, evaluation=digest).write(folder)

    def _measure(self, run: StudyRun, options: SuiteOptions, chats: Mapping[str, Sequence[Chat]]) -> dict[str, Any]:
        roster = self._loaded()
        check_held_out(roster, chats)
        return Suite(roster, load_artefact(self.folder(run)), options).run(chats, self._inputs.train)

    def _same_rows(self, record: Mapping[str, Any], settings: TrainingConfig) -> Path | None:
        """A folder of `reuse` whose artefact was trained from exactly this."""
        # As JSON, which has no tuples and no integer keys.
        wanted = json.loads(json.dumps(without(record, ["settings"])))
        for folder in self._reuse:
            try:
                training = load_artefact(folder).training
            except RouterArtefactError as error:
                raise ConfigError(f"--reuse {folder}: {error.message}") from error
            # Artefacts of earlier trainers do not tell the dtype, which the digest of this run's inputs covers.
            others = {"dtype": record["dtype"], **without(training, [*NOT_IN_A_STUDY, "settings"])}
            if others == wanted and same_settings(training.get("settings", {}), settings):
                return folder
        return None

    def _new_state(self, run: StudyRun) -> RunState:
        return RunState(run.settings.record(), self._inputs.training_digest(run))

    def _state(self, run: StudyRun) -> RunState:
        state = RunState.read(self.folder(run))
        assert state is not None, "the folder has been prepared"
        return state

    def _loaded(self) -> Roster:
        """Base model and adapters, loaded when the first run needs them."""
        if self._roster is None:
            self._roster = load_with_progress(self._inputs.config)
        return self._roster

    def _lock_path(self, run: StudyRun) -> Path:
        folder = self._out / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{run.name}-seed{run.seed}.lock"


def without(record: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A record less some of its keys."""
    return {key: value for key, value in record.items() if key not in keys}


def _say(run: StudyRun, text: str) -> None:
    print(f"[{run.title}] {text}", file=sys.stderr, flush=True)
