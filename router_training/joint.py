"""One whole joint run (LoRA-Mixer's first regime): adapters hard by domain, then adapters and router softly together.

Knows the order of the parts and the files they leave behind: one PEFT folder per adapter, a router artefact over them,
and an adapters.yaml that serves both.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from router_training.checkpoint import CHECKPOINT_NAME, Checkpoint, claimed
from router_training.checks import check_held_out, check_layers, check_lengths
from router_training.data import Chat, read_splits, task_folders
from router_training.encoding import TokenSequence, encode_chats
from router_training.evaluation import evaluate_policy
from router_training.frozen import check_frozen, frozen_digests
from router_training.hard_stage import HardTrainer
from router_training.joint_settings import JointConfig
from router_training.mixing import draw_mix, draw_question_mixes, encode_mix
from router_training.peft_export import export_adapter
from router_training.progress import Progress
from router_training.prompt_fit import train_prompt_gate
from router_training.roster import BASE_TASK, Roster, attach_adapters, load_routed_base
from router_training.run import (
    fingerprint,
    first_rows,
    load_with_progress,
    prepare_trainer,
    run_record,
    run_trainer,
    write_results,
)
from router_training.settings import check_choices
from router_training.step_log import StepLog
from router_training.trainable import Preservation, TrainableAdapters, fresh_adapters, loaded_adapters
from router_training.trainer import SoftAdapters, StepMetrics, Trainer
from server.adapters.peft_config import CONFIG_NAME as PEFT_CONFIG_NAME
from server.adapters.sources import local_folder
from server.adapters.weights import AdapterLimits, load_adapter
from server.atomic_file import write_atomically
from server.config import ServerConfig, load_config, parse_config
from server.errors import ConfigError
from server.model.loader import LoadedModel
from server.routing.attach import RoutedModel
from server.routing.prompt_gate import PromptGate

ADAPTERS_FOLDER = "adapters"
CONFIG_NAME = "adapters.yaml"
ADAPTER_LIMITS = {"max_adapter_rank", "max_adapter_bytes"}
"""Settings that decide whether a server takes an adapter."""
WRITTEN_BY = "# Written by lora-mixer-train joint, which overwrites it; copy it to change it."
"""First line of the config; a file without it is somebody's own."""


@dataclass(frozen=True, eq=False)
class JointRun:
    """The parts of one run that stay the same from its first step to its last."""

    config: ServerConfig
    settings: JointConfig
    loaded: LoadedModel
    routed: RoutedModel
    adapters: TrainableAdapters
    sequences: Sequence[TokenSequence]
    validation: Mapping[str, Sequence[Chat]]
    prompt_gate: PromptGate | None
    out: Path

    def exported(self, folder: Path) -> Roster:
        """Write the adapters as they are now into `folder`, and read them back as the server will."""
        limits = AdapterLimits(self.config.server.max_adapter_rank, self.config.server.max_adapter_bytes)
        name, projections = self.loaded.name, self.routed.projections
        read = []
        for adapter in self.adapters.adapters:
            source = f"{ADAPTERS_FOLDER}/{adapter.name}"
            export_adapter(adapter, folder / source, base_model=name, projections=projections)
            read.append(
                load_adapter(
                    folder / source,
                    adapter.name,
                    projections=projections,
                    base_model_name=name,
                    limits=limits,
                    source=source,
                )
            )
        return attach_adapters(self.loaded, self.routed, read)

    def attached(self) -> Roster:
        """The adapters as they are now, in the bank; no file stays."""
        with TemporaryDirectory() as folder:
            return self.exported(Path(folder))


def train_joint(
    config: ServerConfig, data: Sequence[Path], out: Path, settings: JointConfig, *, validation_rows: int
) -> None:
    """Train adapters and router and write everything into `out`; continue there if a run was cut.

    Every problem of settings and data is raised before training starts.
    """
    tasks = _tasks(config, data, settings)
    served = _served_config(config, tasks, out)
    check_choices(settings, tasks)
    constrained = settings.constrained_among(tasks)
    splits = read_splits(data, [*tasks, *([BASE_TASK] if settings.null_expert else [])])
    mix, questions = draw_mix(splits["train"], settings), draw_question_mixes(splits["train"], settings)
    loaded, routed, adapters = _starting_point(config, tasks, settings)
    check_layers(settings, routed.num_layers)
    labels = {name: label for label, name in enumerate([BASE_TASK, *tasks])}
    check_lengths(splits["train"], labels, loaded, settings)
    sequences = encode_mix(mix, labels, loaded.tokenizer, loaded.eos_token_ids, settings)
    validation = first_rows(splits["validation"], validation_rows)
    run = JointRun(config, settings, loaded, routed, adapters, sequences, validation, None, out)
    start = run.attached()
    check_held_out(start, validation)
    hard = HardTrainer(routed, adapters, sequences, settings)
    record = run_record(start, mix, questions, sequences, settings)
    with claimed(out):
        before = frozen_digests(Roster(loaded, routed, ()))
        checkpoint = Checkpoint(out, fingerprint(record, settings, questions))
        checkpoint.load()  # Refused before the prompt gate takes its minutes.
        run = replace(run, prompt_gate=train_prompt_gate(loaded, labels, questions, settings))
        torch.manual_seed(settings.seed)
        trainer, joint = _both_stages(run, hard, checkpoint, constrained)
        check_frozen(Roster(loaded, routed, ()), before)
        roster = run.exported(out)
        digests = {adapter.name: adapter.digest for adapter in roster.adapters}
        record |= {"adapter_digests": digests, "start_digests": record["adapter_digests"], "joint": joint}
        text = yaml.safe_dump(served, sort_keys=False, allow_unicode=True)
        write_atomically(out / CONFIG_NAME, f"{WRITTEN_BY}\n{text}")
        write_results(roster, trainer.router, run.prompt_gate, sequences, validation, settings, record, out, before)
        checkpoint.delete()


def _both_stages(
    run: JointRun, hard: HardTrainer, checkpoint: Checkpoint, constrained: Collection[str]
) -> tuple[Trainer, dict[str, Any]]:
    """Everything that is left to train; the trainer at its end, and what is worth knowing about the adapters."""
    state = checkpoint.load() or {}
    soft_state = state.get("soft")
    if "hard" in state:
        hard.load_state_dict(state["hard"])
    done = hard.num_steps + soft_state["trainer"]["next_step"] if soft_state else hard.next_step
    with StepLog(run.out, done) as log:
        if soft_state is None:
            _hard_stage(run, hard, checkpoint, log)
            start, after_hard = run.adapters.state(), _own_nll(run.attached(), run.validation)
        else:
            start, after_hard = state["start"], state["after_hard"]
            run.adapters.load_state(start)
        preservation = Preservation(start, constrained, run.settings.beta)
        soft = SoftAdapters(run.adapters, run.settings.adapter_learning_rate, preservation)
        # The bank keeps the adapters as after the hard stage: what warm start, teacher and own losses go by.
        trainer, task_losses = prepare_trainer(
            run.attached(), run.sequences, run.settings, soft_state, prompt_gate=run.prompt_gate, soft=soft
        )

        def save() -> None:
            soft_part = {"trainer": trainer.state_dict(), "task_losses": task_losses}
            checkpoint.save({"soft": soft_part, "start": start, "after_hard": after_hard})

        def add(metrics: StepMetrics) -> None:
            log.add(replace(metrics, step=hard.num_steps + metrics.step))

        save()
        run_trainer(trainer, run.settings, add, save)
    return trainer, {"own_adapter_after_hard": after_hard, "squared_distance": run.adapters.distances(start)}


def _hard_stage(run: JointRun, hard: HardTrainer, checkpoint: Checkpoint, log: StepLog) -> None:
    with Progress("hard stage", total=hard.num_steps - hard.next_step, unit="step") as progress:

        def on_step(metrics: StepMetrics) -> None:
            log.add(metrics)
            progress.advance(1, f"{metrics.mode}, LM loss {metrics.lm_loss:.3f}")
            if hard.next_step % run.settings.checkpoint_every == 0 or hard.next_step == hard.num_steps:
                checkpoint.save({"hard": hard.state_dict()})

        hard.run(on_step)


def _own_nll(roster: Roster, validation: Mapping[str, Sequence[Chat]]) -> dict[str, float]:
    """Nats per answer token of each task's validation chats under its own adapter."""
    chats = [chat for rows in validation.values() for chat in rows]
    loaded = roster.loaded
    sequences = encode_chats(chats, roster.label_of_task, loaded.tokenizer, loaded.eos_token_ids)
    with Progress("validation", total=len(sequences), unit="chat") as progress:
        plans = roster.own_adapter_plans()
        results = evaluate_policy(roster.routed, sequences, roster.tasks, plans, on_batch=progress.advance)
    return {task: measures["nll"] for task, measures in results.items()}


def _tasks(config: ServerConfig, data: Sequence[Path], settings: JointConfig) -> list[str]:
    """Names of the adapters to train, in slot order. Raises ConfigError unless there are two, each once."""
    routed = [spec.name for spec in config.adapters if spec.routed]
    if settings.start == "existing":
        if unknown := sorted(set(settings.tasks) - set(routed)):
            raise ConfigError(
                f"tasks names {', '.join(map(repr, unknown))}; the config's routed adapters are {', '.join(routed)}"
            )
        tasks = [name for name in routed if name in settings.tasks or not settings.tasks]
    else:
        tasks = list(settings.tasks) or [name for name in task_folders(data) if name != BASE_TASK]
    if len(tasks) < 2:
        raise ConfigError(f"joint training needs at least two tasks, not {tasks}; name them with --tasks")
    return tasks


def _served_config(config: ServerConfig, tasks: Sequence[str], out: Path) -> dict[str, Any]:
    """The adapters.yaml of the results. Raises ConfigError for names that cannot be served, and where `out` holds an
    adapter that the run begins with, or adapters or an adapters.yaml that no joint run has written."""
    base = config.base_model.model_dump(mode="json")
    if (source := config.root / Path(base["source"]).expanduser()).exists():
        base["source"] = str(source.resolve())
    content = {
        "base_model": base,
        "router": ".",
        "adapters": [{"name": name, "source": f"{ADAPTERS_FOLDER}/{name}"} for name in tasks],
    }
    # What the results were read back under. Other settings of `server` are this machine's, not the adapters'.
    if limits := config.server.model_dump(include=ADAPTER_LIMITS, exclude_defaults=True):
        content["server"] = limits
    parse_config(content, root=out.resolve(), origin="tasks")
    begun = {local_folder(spec, config.root) for spec in config.adapters}
    if overwritten := [name for name in tasks if (out / ADAPTERS_FOLDER / name).resolve() in begun]:
        raise ConfigError(f"{out} holds adapters of the config: {', '.join(overwritten)}; take another --out")
    present = out / CONFIG_NAME
    if present.exists() and not present.read_bytes().startswith(WRITTEN_BY.encode()):
        raise ConfigError(f"{present} is not of a joint run and would be overwritten; take another --out")
    listed = {spec.name for spec in load_config(present).adapters} if present.exists() else set()
    there = [name for name in tasks if (out / ADAPTERS_FOLDER / name / PEFT_CONFIG_NAME).exists()]
    # An unfinished run has written some without a list; a checkpoint of another run is refused where it is read.
    if (foreign := [name for name in there if name not in listed]) and not (out / CHECKPOINT_NAME).exists():
        message = f"{out / ADAPTERS_FOLDER} holds adapters that no joint run has written: {', '.join(foreign)}"
        raise ConfigError(f"{message}; take another --out")
    return content


def _starting_point(
    config: ServerConfig, tasks: Sequence[str], settings: JointConfig
) -> tuple[LoadedModel, RoutedModel, TrainableAdapters]:
    if settings.start == "existing":
        chosen = tuple(spec for spec in config.adapters if spec.name in tasks)
        roster = load_with_progress(config.model_copy(update={"adapters": chosen}))
        return roster.loaded, roster.routed, loaded_adapters(roster.adapters)
    loaded, routed = load_routed_base(config, len(tasks))
    adapters = fresh_adapters(
        tasks,
        routed.projections.values(),
        targets=settings.targets,
        rank=settings.rank,
        scaling=settings.lora_alpha / settings.rank,
        seed=settings.seed,
    )
    return loaded, routed, adapters
