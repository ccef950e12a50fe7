"""One whole training run and one whole evaluation: the order of the parts, and the files they leave behind."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from router_training.artefact import background_statistics, build_artefact
from router_training.data import Chat, balanced_sample, data_digest, read_splits
from router_training.encoding import TokenSequence, encode_chats
from router_training.evaluation import compare_policies, evaluate_policy
from router_training.gates import RouterParameters
from router_training.progress import Progress
from router_training.roster import Roster, check_artefact, load_roster
from router_training.router_inputs import cache_inputs
from router_training.settings import TrainingConfig
from router_training.trainer import StepMetrics, Trainer
from router_training.warm_start import warm_start
from server.config import ServerConfig
from server.routing.policy import GatePlan
from server.routing.router import RouterArtefact, load_artefact, save_artefact

METRICS_NAME = "metrics.jsonl"
EVALUATION_NAME = "evaluation.json"

BACKGROUND_CHATS = 160
"""Chats of the mix whose router inputs give the background statistics; a mean over some 6,000 tokens is steady."""


def train(config: ServerConfig, data: Path, out: Path, settings: TrainingConfig, *, validation_rows: int) -> None:
    """Train a router and write artefact, metrics and evaluation into `out`.

    Every problem of the data is raised before the model is loaded.
    """
    started = time.perf_counter()
    names = [spec.name for spec in config.adapters if spec.routed]
    splits = read_splits(data, names)
    mix = balanced_sample(splits["train"], settings.samples, settings.seed)
    roster = load_with_progress(config)
    sequences = _encode(roster, mix, settings.max_length)
    validation = _encode(roster, first_rows(splits["validation"], validation_rows), None)
    torch.manual_seed(settings.seed)
    out.mkdir(parents=True, exist_ok=True)
    router = _train_router(roster, sequences, settings, out / METRICS_NAME)
    rows = router.detached()
    background = _background(roster, sequences, rows, settings)
    record: dict[str, Any] = {
        "settings": settings.record(),
        "data_sha256": data_digest(mix),
        "data_chats": {name: sum(chat.task == name for chat in mix) for name in names},
        "background": {"chats": min(BACKGROUND_CHATS, len(sequences)), "policy": "routed"},
        "torch": torch.__version__,
    }
    artefact = build_artefact(rows, roster, settings, background=background, training=record)
    # Saved before the evaluation too: a run that is cut there has lost nothing.
    save_artefact(artefact, out)
    evaluation = evaluate(roster, artefact, validation)
    record |= {"validation": evaluation, "seconds": round(time.perf_counter() - started)}
    save_artefact(build_artefact(rows, roster, settings, background=background, training=record), out)
    write_json(evaluation, out / EVALUATION_NAME)


def evaluate_folder(config: ServerConfig, data: Path, router: Path, *, validation_rows: int) -> dict[str, Any]:
    """Evaluate a saved artefact. Raises RouterArtefactError if it belongs to another base model or other adapters."""
    artefact = load_artefact(router)
    names = [spec.name for spec in config.adapters if spec.routed]
    chats = first_rows(read_splits(data, names, ("validation",))["validation"], validation_rows)
    roster = load_with_progress(config)
    check_artefact(artefact, roster)
    return evaluate(roster, artefact, _encode(roster, chats, None))


def evaluate(roster: Roster, artefact: RouterArtefact, sequences: Sequence[TokenSequence]) -> dict[str, Any]:
    """Answer likelihood per task of base, own adapter, uniform mix and `artefact`, as a JSON-able record."""
    plans: Mapping[str, list[GatePlan]] = {
        "base": roster.base_plans(),
        "own_adapter": roster.own_adapter_plans(),
        "uniform": roster.uniform_plans(),
        "routed": roster.routed_plans(artefact),
    }
    results = {}
    with Progress("evaluation", total=len(sequences) * len(plans), unit="chat") as progress:
        for policy, plan_of_label in plans.items():
            results[policy] = evaluate_policy(
                roster.routed, sequences, roster.names, plan_of_label, on_batch=progress.advance
            )
    chats = {name: sum(s.label == label for s in sequences) for label, name in enumerate(roster.names)}
    return {"chats": chats, **compare_policies(results)}


def first_rows(chats: Mapping[str, Sequence[Chat]], count: int) -> list[Chat]:
    """The first `count` chats of every task; 0 means all."""
    return [chat for rows in chats.values() for chat in (rows[:count] if count else rows)]


def load_with_progress(config: ServerConfig) -> Roster:
    """`load_roster` with a progress display."""
    total = sum(spec.routed for spec in config.adapters)
    with Progress("adapters", total=total, unit="adapter") as progress:
        return load_roster(config, on_adapter=lambda name: progress.advance(1, name))


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Indented UTF-8 JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _train_router(
    roster: Roster, sequences: Sequence[TokenSequence], settings: TrainingConfig, metrics_path: Path
) -> RouterParameters:
    num_cached = 0 if settings.warm_start == "none" else min(settings.warm_start_samples, len(sequences))
    total = num_cached * settings.warm_start_rounds
    with Progress("warm start", total=total, unit="chat") as progress:
        router = warm_start(roster, sequences, settings, on_batch=progress.advance)
    # Chats that the warm start has not seen come first.
    unseen_first = [*sequences[num_cached:], *sequences[:num_cached]]
    trainer = Trainer(roster.routed, router, unseen_first, settings)
    with (
        metrics_path.open("w", encoding="utf-8") as metrics_file,
        Progress("training", total=settings.steps, unit="step") as progress,
    ):

        def on_step(metrics: StepMetrics) -> None:
            metrics_file.write(json.dumps(asdict(metrics)) + "\n")
            metrics_file.flush()
            progress.advance(1, f"{metrics.mode}, LM loss {metrics.lm_loss:.3f}")

        trainer.run(on_step)
    return router


def _encode(roster: Roster, chats: Sequence[Chat], max_length: int | None) -> list[TokenSequence]:
    loaded = roster.loaded
    return encode_chats(chats, roster.label_of_task, loaded.tokenizer, loaded.eos_token_ids, max_length=max_length)


def _background(
    roster: Roster, sequences: Sequence[TokenSequence], rows: Mapping[str, Tensor], settings: TrainingConfig
) -> dict[str, Tensor]:
    cached = cache_inputs(
        roster.routed,
        sequences[:BACKGROUND_CHATS],
        roster.routed_plans(build_artefact(rows, roster, settings)),
        settings.granularity,
        max_prompt_tokens=settings.warm_start_prompt_tokens,
        max_answer_tokens=settings.warm_start_answer_tokens,
    )
    return background_statistics(cached)
