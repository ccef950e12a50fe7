"""`lora-mixer-train train | evaluate | report`: flags to settings. The work is in `run` and `report`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from router_training.report import comparison_table, evaluation_table, evaluation_verdict
from router_training.settings import GateMode, TrainingConfig, WarmStart
from server.config import load_config
from server.errors import ConfigError, LoraMixerError
from server.routing.router import Granularity

DEFAULTS = TrainingConfig()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        status: int = options.action(options)
    except LoraMixerError as error:
        print(f"lora-mixer-train: {error.message}", file=sys.stderr)
        return 1
    return status


def build_parser() -> argparse.ArgumentParser:
    """All flags; each default is `TrainingConfig`'s own."""
    parser = argparse.ArgumentParser(
        prog="lora-mixer-train", description="Train and evaluate the router over frozen LoRA adapters (CPU)."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train a router and write its artefact folder")
    _add_inputs(train)
    train.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for artefact, metrics, evaluation"
    )
    _add_settings(train)
    train.set_defaults(action=_train)
    evaluate = commands.add_parser("evaluate", help="answer likelihood per task of base, own adapter, uniform, routed")
    _add_inputs(evaluate)
    evaluate.add_argument("--router", type=Path, metavar="DIR", help="artefact folder (default: the config's router)")
    evaluate.add_argument("--out", type=Path, metavar="FILE", help="also write the record as JSON")
    evaluate.add_argument("--baselines", action="store_true", help="every baseline too (default off)")
    evaluate.add_argument(
        "--calibration-chats",
        type=int,
        default=16,
        metavar="N",
        help="training chats per task that --baselines fits those with something to fit on (default 16)",
    )
    evaluate.add_argument(
        "--composites", type=int, default=0, metavar="N", help="chats that join two tasks (default 0: none)"
    )
    evaluate.add_argument(
        "--generate",
        type=int,
        default=0,
        metavar="N",
        help="chats per task with an answer generated and scored by the task's metric (default 0: none)",
    )
    evaluate.add_argument("--max-new-tokens", type=int, default=200, help="tokens of a generated answer (default 200)")
    evaluate.add_argument(
        "--cache", type=Path, metavar="DIR", help="keep finished measurements here and reuse them (default: none)"
    )
    evaluate.set_defaults(action=_evaluate)
    background = commands.add_parser(
        "background", help="add the statistics that gate rows without retraining need to a router artefact"
    )
    _add_sources(background)
    background.add_argument("--router", type=Path, metavar="DIR", help="artefact folder (default: the config's router)")
    background.set_defaults(action=_background)
    answer = commands.add_parser("answer", help="make off-domain chats: the base model's own answers to your questions")
    answer.add_argument(
        "--config", type=Path, default=Path("adapters.yaml"), metavar="FILE", help="base model (adapters.yaml)"
    )
    answer.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="text file with one question a line"
    )
    answer.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="chat-JSONL, e.g. DATA/base/train.jsonl"
    )
    answer.add_argument("--max-new-tokens", type=int, default=64, help="longest answer, tokens (default 64)")
    answer.set_defaults(action=_answer)
    report = commands.add_parser("report", help="render evaluation records as Markdown")
    report.add_argument("records", type=Path, nargs="+", metavar="FILE", help="JSON written by train or evaluate")
    report.set_defaults(action=_report)
    return parser


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    _add_sources(parser)
    parser.add_argument(
        "--validation-rows", type=int, default=0, metavar="N", help="validation chats per task (default 0: all)"
    )


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        default=Path("adapters.yaml"),
        metavar="FILE",
        help="base model and adapters (adapters.yaml)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        action="append",
        required=True,
        metavar="DIR",
        help="one folder per adapter name with {train,validation}.jsonl; repeatable, each adds tasks",
    )


def _add_settings(parser: argparse.ArgumentParser) -> None:
    def add(flag: str, field: str, kind: Any, text: str, choices: Sequence[Any] | None = None) -> None:
        default = getattr(DEFAULTS, field)
        shown = f"{default:.3g}" if isinstance(default, float) else str(default)
        parser.add_argument(
            flag, dest=field, type=kind, choices=choices, default=default, help=f"{text} (default {shown})"
        )

    add("--samples", "samples", int, "chats in the balanced training mix")
    add("--max-length", "max_length", int, "longest training sequence, tokens")
    add("--too-long", "too_long", str, "chats over --max-length: refuse by line, or cut", ("refuse", "cut"))
    add("--composite", "composite_fraction", float, "share of the mix that joins two tasks in one chat, 0 to 1")
    add("--rephrase", "rephrase_fraction", float, "share of the mix with the question framed anew, 0 to 1")
    add("--seed", "seed", int, "seed of the mix and its order")
    add("--granularity", "granularity", str, "one gate per layer or per projection", get_args(Granularity))
    add("--top-k", "top_k", int, "adapters kept per token")
    add("--temperature", "temperature", float, "divides gate logits")
    add("--gate-mode", "gate_mode", str, "how kept gates are scaled", get_args(GateMode))
    parser.add_argument(
        "--null-expert",
        action="store_true",
        help="let tokens choose the base model; needs a data folder `base` (default off)",
    )
    add("--routed-from-layer", "routed_from_layer", int, "first layer with a gate; the base model alone below it")
    add("--warm-start", "warm_start", str, "initial gate rows from cached inputs", get_args(WarmStart))
    add("--warm-start-samples", "warm_start_samples", int, "chats cached for the warm start, per round")
    add("--warm-start-rounds", "warm_start_rounds", int, "caching passes of the warm start")
    add("--steps", "steps", int, "end-to-end optimiser steps; 0 keeps the warm start")
    add("--batch-size", "batch_size", int, "chats per step")
    add("--lr", "learning_rate", float, "peak learning rate of AdamW")
    add("--straight-through", "straight_through_fraction", float, "last share of steps with top-k gates, 0 to 1")
    add("--alpha", "alpha", float, "weight of RSL's balance term")
    parser.add_argument(
        "--prior",
        action="append",
        default=[],
        metavar="NAME=SHARE",
        help="expected traffic of an adapter for the balance term; repeatable (default 1 each)",
    )
    add("--lambda", "lambda_", float, "weight of RSL's entropy term")
    add("--sign", "sign", int, "of the entropy term: 1 specialises, -1 is the paper's printed formula", (1, -1))
    add("--eta", "eta", float, "weight of the adapter-id cross-entropy; 0 is the paper's pure loss")
    add("--lm-weighting", "lm_weighting", str, "LM loss per chat, or over its own adapter's", ("nats", "relative"))
    add("--distil", "distil", float, "share of the LM loss that is the divergence from the own adapter, 0 to 1")
    add("--checkpoint-every", "checkpoint_every", int, "steps between checkpoints; repeat the command to resume")


def _train(options: argparse.Namespace) -> int:
    from router_training.run import EVALUATION_NAME, train

    settings = _settings(options)
    train(load_config(options.config), options.data, options.out, settings, validation_rows=options.validation_rows)
    print(_rendered(options.out / EVALUATION_NAME))
    print(f"The router artefact is in {options.out}.", file=sys.stderr)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from router_training.run import evaluate_folder, write_json
    from router_training.suite import SuiteOptions

    config = load_config(options.config)
    router = options.router or config.router_folder
    if router is None:
        raise ConfigError("the config names no router; pass --router DIR")
    if options.calibration_chats < 1:
        raise ConfigError("--calibration-chats must be at least 1")
    suite = SuiteOptions(
        baselines=options.baselines,
        calibration_chats=options.calibration_chats,
        composites=options.composites,
        generated_rows=options.generate,
        max_new_tokens=options.max_new_tokens,
        cache=options.cache,
    )
    record = evaluate_folder(config, options.data, router, suite, validation_rows=options.validation_rows)
    if options.out is not None:
        write_json(record, options.out)
    print(f"{evaluation_table(record)}\n\n{evaluation_verdict(record)}")
    return 0


def _background(options: argparse.Namespace) -> int:
    from router_training.background import add_background
    from router_training.run import load_with_progress

    config = load_config(options.config)
    router = options.router or config.router_folder
    if router is None:
        raise ConfigError("the config names no router; pass --router DIR")
    add_background(config, options.data, router, load_with_progress)
    print(f"The router artefact in {router} has background statistics.", file=sys.stderr)
    return 0


def _answer(options: argparse.Namespace) -> int:
    from router_training.progress import Progress
    from router_training.run import load_with_progress
    from router_training.self_answers import answer_prompts, read_prompts, write_chats

    if options.max_new_tokens < 1:
        raise ConfigError("--max-new-tokens must be at least 1")
    prompts = read_prompts(options.prompts)
    roster = load_with_progress(load_config(options.config))
    with Progress("answers", total=len(prompts), unit="chat") as progress:
        answers = answer_prompts(roster, prompts, options.max_new_tokens, on_batch=progress.advance)
    count = write_chats(prompts, answers, options.out)
    print(f"{count} chats are in {options.out}.", file=sys.stderr)
    return 0


def _report(options: argparse.Namespace) -> int:
    print("\n\n".join(_rendered(path) for path in options.records))
    if len(options.records) > 1:
        print("\n" + comparison_table({str(path): _read_record(path) for path in options.records}))
    return 0


def _settings(options: argparse.Namespace) -> TrainingConfig:
    given = {name: value for name, value in vars(options).items() if name in TrainingConfig.model_fields}
    try:
        return TrainingConfig(**{**given, "prior": _prior(options.prior)})
    except ValidationError as error:
        problems = "; ".join(f"{problem['loc'][0]}: {problem['msg']}" for problem in error.errors())
        raise ConfigError(f"settings out of range: {problems}") from error


def _prior(pairs: Sequence[str]) -> dict[str, str]:
    prior = dict(pair.rpartition("=")[::2] for pair in pairs)
    if "" in prior or len(prior) < len(pairs):
        raise ConfigError("--prior takes NAME=SHARE, each name once, for example --prior gsm8k=2")
    return prior


def _rendered(path: Path) -> str:
    record = _read_record(path)
    return f"{evaluation_table(record)}\n\n{evaluation_verdict(record)}"


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the evaluation record {path}: {error}") from error
    if "ratio_to_own_adapter" not in record:
        raise ConfigError(f"{path} is not an evaluation record; train and evaluate --out write one")
    return record


if __name__ == "__main__":
    sys.exit(main())
