"""One whole training run and one whole evaluation: the order of the parts, and the files they leave behind."""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from router_training import composites
from router_training.artefact import build_artefact
from router_training.background import with_background
from router_training.checkpoint import Checkpoint, claimed, run_fingerprint
from router_training.checks import check_held_out, check_layers, check_lengths
from router_training.data import Chat, has_task, read_splits
from router_training.encoding import TokenSequence
from router_training.evaluation import evaluate_policy, gate_batch
from router_training.frozen import base_digest, check_frozen, frozen_digests
from router_training.gates import RouterParameters
from router_training.mixing import Mix, draw_mix, draw_question_mixes, encode_mix, question_facts
from router_training.phrased import ask_anew
from router_training.progress import Progress
from router_training.prompt_fit import guide_of, recipe, train_prompt_gate
from router_training.roster import BASE_TASK, Roster, check_artefact, load_roster
from router_training.settings import TrainingConfig, check_choices, prior_shares
from router_training.step_log import StepLog
from router_training.suite import Suite, SuiteOptions
from router_training.trainer import SoftAdapters, StepMetrics, Trainer
from router_training.warm_start import warm_start
from server.config import ServerConfig
from server.routing.prompt_gate import PromptGate
from server.routing.router import load_artefact, save_artefact

EVALUATION_NAME = "evaluation.json"

NUMBER_LIST = re.compile(r"\[\n[\s\d.,eE+-]+\]")
"""In indented JSON. It cannot match inside a string, where a line break is escaped."""

OWN_LOSS_CHATS = 24
"""Chats per task that relative weighting measures the own adapter on; a scale needs no better."""

StartOfRun = tuple[RouterParameters, dict[int, float] | None]
"""The router before the first step, and the task losses that relative weighting divides by."""
Start = Callable[[Roster, Sequence[TokenSequence], TrainingConfig], StartOfRun]

BACKGROUND_CHATS = 160
"""Chats of the mix whose router inputs give the background statistics; a mean over some 6,000 tokens is steady."""


def train(
    config: ServerConfig, data: Sequence[Path], out: Path, settings: TrainingConfig, *, validation_rows: int
) -> None:
    """Train a router and write artefact, metrics and evaluation into `out`; continue there if a run was cut.

    Every problem of the data is raised before training starts, those that need no tokenizer before the model is loaded.
    """
    names = [spec.name for spec in config.adapters if spec.routed]
    check_choices(settings, names)
    splits = read_splits(data, [*names, *([BASE_TASK] if settings.null_expert else [])])
    mix, questions = draw_mix(splits["train"], settings), draw_question_mixes(splits["train"], settings)
    roster = load_with_progress(config)
    loaded = roster.loaded
    check_layers(settings, roster.routed.num_layers)
    check_lengths(splits["train"], roster.label_of_task, loaded, settings)
    sequences = encode_mix(mix, roster.label_of_task, loaded.tokenizer, loaded.eos_token_ids, settings)
    validation = first_rows(splits["validation"], validation_rows)
    check_held_out(roster, validation)
    record = run_record(roster, mix, questions, sequences, settings)
    before = frozen_digests(roster)
    with claimed(out):
        checkpoint = Checkpoint(out, fingerprint(record, settings, questions))
        checkpoint.load()  # Refused before the prompt gate takes its minutes.
        prompt_gate = train_prompt_gate(loaded, roster.label_of_task, questions, settings)
        router = train_router(roster, sequences, settings, out, checkpoint, prompt_gate=prompt_gate)
        write_results(roster, router, prompt_gate, sequences, validation, settings, record, out, before)
        checkpoint.delete()


def write_results(
    roster: Roster,
    router: RouterParameters,
    prompt_gate: PromptGate | None,
    sequences: Sequence[TokenSequence],
    validation: Mapping[str, Sequence[Chat]],
    settings: TrainingConfig,
    record: Mapping[str, Any],
    out: Path,
    before: Mapping[str, str],
) -> None:
    """Artefact with background statistics, and its evaluation, if what was frozen `before` still is."""
    rows = router.detached()
    plain = build_artefact(rows, roster, settings, prompt_gate=prompt_gate, training=record)
    artefact = with_background(plain, roster, sequences[:BACKGROUND_CHATS], roster.routed_plans(plain))
    check_frozen(roster, before)
    # Saved before the evaluation too: a run that is cut there has lost nothing.
    save_artefact(artefact, out)
    evaluation = Suite(roster, artefact, SuiteOptions()).run(validation)
    # Gate shares are for the study: thousands of numbers that no server needs to load.
    record = {**record, "validation": {key: value for key, value in evaluation.items() if key != "gates"}}
    save_artefact(replace(artefact, training=record), out)
    write_json(evaluation, out / EVALUATION_NAME)


def evaluate_folder(
    config: ServerConfig, data: Sequence[Path], router: Path, options: SuiteOptions, *, validation_rows: int
) -> dict[str, Any]:
    """Evaluate a saved artefact. Raises RouterArtefactError if it belongs to another base model or other adapters, and
    ConfigError for phrasings that read none of the chats.

    Off-domain chats are taken from the task folder `base` where there is one. Baselines need the training chats too.
    """
    artefact = load_artefact(router)
    names = [spec.name for spec in config.adapters if spec.routed]
    tasks = [*([BASE_TASK] if has_task(data, BASE_TASK) else []), *names]
    splits = read_splits(data, tasks, ("train", "validation") if options.baselines else ("validation",))
    chats = first_rows(splits["validation"], validation_rows)
    if options.phrasings is not None:
        ask_anew(chats, options.phrasings)  # What is wrong with them is said before the model is loaded.
    roster = load_with_progress(config)
    check_artefact(artefact, roster)
    check_held_out(roster, chats)
    return Suite(roster, artefact, options).run(chats, splits.get("train", {}))


def first_rows(chats: Mapping[str, Sequence[Chat]], count: int) -> dict[str, Sequence[Chat]]:
    """The first `count` chats of every task; 0 means all."""
    return {task: rows[:count] if count else rows for task, rows in chats.items()}


def load_with_progress(config: ServerConfig, *, least: int = 2) -> Roster:
    """`load_roster` with a progress display."""
    total = sum(spec.routed for spec in config.adapters)
    with Progress("adapters", total=total, unit="adapter") as progress:
        return load_roster(config, least=least, on_adapter=lambda name: progress.advance(1, name))


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Indented UTF-8 JSON with a final newline; a list of numbers stays on one line. Replaces the file as a whole."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    text = NUMBER_LIST.sub(lambda found: f"[{' '.join(found[0][1:-1].split())}]", text)
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def start_router(roster: Roster, sequences: Sequence[TokenSequence], settings: TrainingConfig) -> StartOfRun:
    """The warm start, and the task losses if the settings divide by them."""
    rounds = 0 if settings.warm_start == "none" else settings.warm_start_rounds
    with Progress("warm start", total=num_warm_start(sequences, settings) * rounds, unit="chat") as progress:
        router = warm_start(roster, sequences, settings, on_batch=progress.advance)
    return router, own_losses(roster, sequences) if settings.lm_weighting == "relative" else None


def train_router(
    roster: Roster,
    sequences: Sequence[TokenSequence],
    settings: TrainingConfig,
    out: Path,
    checkpoint: Checkpoint,
    *,
    prompt_gate: PromptGate | None = None,
    start: Start = start_router,
) -> RouterParameters:
    """Both stages, or what is left of them after the checkpoint; metrics and checkpoints go to `out`."""
    state = checkpoint.load()
    torch.manual_seed(settings.seed)
    trainer, task_losses = prepare_trainer(roster, sequences, settings, state, prompt_gate=prompt_gate, start=start)

    def save() -> None:
        checkpoint.save({"trainer": trainer.state_dict(), "task_losses": task_losses})

    save()
    with StepLog(out, trainer.next_step) as log:
        run_trainer(trainer, settings, log.add, save)
    return trainer.router


def prepare_trainer(
    roster: Roster,
    sequences: Sequence[TokenSequence],
    settings: TrainingConfig,
    state: Mapping[str, Any] | None,
    *,
    prompt_gate: PromptGate | None = None,
    soft: SoftAdapters | None = None,
    start: Start = start_router,
) -> tuple[Trainer, dict[int, float] | None]:
    """A trainer after the warm start, or where `state` was taken, and the task losses that it divides by.

    `state` has the keys `trainer` and `task_losses`.
    """
    if state is None:
        router, task_losses = start(roster, sequences, settings)
    else:
        rows = state["trainer"]["rows"]
        router = RouterParameters(rows, settings.granularity, null_expert=settings.null_expert)
        task_losses = state["task_losses"]
    # Chats that the warm start has not seen come first.
    num_cached = num_warm_start(sequences, settings)
    unseen_first = [*sequences[num_cached:], *sequences[:num_cached]]
    prior = prior_shares(settings, roster.names)
    own = roster.own_adapter_plans()
    trainer = Trainer(
        roster.routed,
        router,
        unseen_first,
        settings,
        prior=prior,
        task_losses=task_losses,
        teacher=lambda batch: gate_batch(roster.routed, batch, own),
        guide=guide_of(prompt_gate, roster, sequences, top_k=settings.top_k),
        soft=soft,
    )
    if state is not None:
        trainer.load_state_dict(state["trainer"])
        print(f"continuing after step {trainer.next_step} of {settings.steps}", file=sys.stderr)
    return trainer, task_losses


def num_warm_start(sequences: Sequence[TokenSequence], settings: TrainingConfig) -> int:
    """Sequences, from the first, that the warm start sees."""
    return 0 if settings.warm_start == "none" else min(settings.warm_start_samples, len(sequences))


def run_trainer(
    trainer: Trainer, settings: TrainingConfig, log: Callable[[StepMetrics], None], save: Callable[[], None]
) -> None:
    """All steps that are left, with progress, every step logged and every so many saved."""
    with Progress("training", total=settings.steps - trainer.next_step, unit="step") as progress:

        def on_step(metrics: StepMetrics) -> None:
            log(metrics)
            progress.advance(1, f"{metrics.mode}, LM loss {metrics.lm_loss:.3f}")
            if trainer.next_step % settings.checkpoint_every == 0 or trainer.next_step == settings.steps:
                save()

        trainer.run(on_step)


def own_losses(roster: Roster, sequences: Sequence[TokenSequence]) -> dict[int, float]:
    """Nats per answer token that each task's own adapter reaches, by label, on some single chats of the mix."""
    chosen: list[TokenSequence] = []
    for label in range(len(roster.tasks)):
        own = [sequence for sequence in sequences if sequence.label == label and not sequence.label_changes]
        chosen += own[:OWN_LOSS_CHATS]
    results = evaluate_policy(roster.routed, chosen, roster.tasks, roster.own_adapter_plans())
    return {label: results[task]["nll"] for label, task in enumerate(roster.tasks) if task in results}


def run_record(
    roster: Roster, mix: Mix, questions: Sequence[Mix], sequences: Sequence[TokenSequence], settings: TrainingConfig
) -> dict[str, Any]:
    """Everything that decides the outcome; no clock and no path, so that equal runs leave equal bytes."""
    return {
        "settings": settings.record(),
        "data_sha256": mix.digest,
        "data_chats": {task: count for task in roster.tasks if (count := mix.count(task))},
        "composites": sum(bool(sequence.label_changes) for sequence in sequences),
        **question_facts(questions),
        "base_sha256": base_digest(roster),
        "dtype": str(roster.loaded.model.dtype).removeprefix("torch."),
        "background": {"chats": min(BACKGROUND_CHATS, len(sequences)), "policy": "routed"},
        "adapter_digests": {adapter.name: adapter.digest for adapter in roster.adapters},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def fingerprint(record: Mapping[str, Any], settings: TrainingConfig, questions: Sequence[Mix]) -> str:
    """Of a run's checkpoints: its `record`, and how this version makes composites and prompt gates of the same data,
    since a run that another version began would end as neither's."""
    form = [composites.FORM] if settings.composite_fraction else []
    return run_fingerprint({**record, "form": form, "recipe": [recipe(len(mix)) for mix in questions]})
