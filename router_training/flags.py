"""Flags that several `lora-mixer-train` commands share, and flags to settings. Knows no command."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from router_training.settings import GateMode, TrainingConfig, WarmStart
from server.config import BaseModelConfig, ServerConfig, load_config
from server.errors import ConfigError
from server.machine import has_bfloat16
from server.routing.router import Granularity

DEFAULTS = TrainingConfig()

Settings = TypeVar("Settings", bound=TrainingConfig)


def count(text: str) -> int:
    """A flag's whole number from 0 up."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up")
    return int(text)


def positive(text: str) -> int:
    """A flag's whole number from 1 up."""
    if (number := count(text)) < 1:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return number


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Config, data and how much of the validation data to use."""
    add_sources(parser)
    parser.add_argument(
        "--validation-rows", type=count, default=0, metavar="N", help="validation chats per task (default 0: all)"
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """What `config_from` reads."""
    parser.add_argument(
        "--config",
        type=Path,
        default=Path("adapters.yaml"),
        metavar="FILE",
        help="base model and adapters (default adapters.yaml)",
    )
    parser.add_argument(
        "--dtype",
        choices=get_args(BaseModelConfig.model_fields["dtype"].annotation),
        help="precision to compute in (default: base_model.dtype of the config); float32 is several times as fast on "
        "CPUs without bfloat16 arithmetic",
    )


def config_from(options: argparse.Namespace) -> ServerConfig:
    """The config that the flags name. Says on stderr where another --dtype would be far faster on this CPU."""
    config = load_config(options.config)
    if options.dtype is not None:
        base_model = config.base_model.model_copy(update={"dtype": options.dtype})
        return config.model_copy(update={"base_model": base_model})
    if config.base_model.dtype == "bfloat16" and not has_bfloat16():
        print("This CPU has no bfloat16 arithmetic: --dtype float32 is several times as fast.", file=sys.stderr)
    return config


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Config and data."""
    add_config(parser)
    parser.add_argument(
        "--data",
        type=Path,
        action="append",
        required=True,
        metavar="DIR",
        help="one folder per adapter name with {train,validation}.jsonl; repeatable, each adds tasks",
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Every setting of `TrainingConfig` that has a flag, each with its default."""

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
    parser.add_argument(
        "--prompt-gate",
        action="store_true",
        help="read each question whole before it runs, and give what is clear to one adapter (default off)",
    )
    add("--prompt-gate-samples", "prompt_gate_samples", int, "most chats that the prompt gate is fitted on")
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


def settings_from(options: argparse.Namespace, kind: type[Settings]) -> Settings:
    """The flags as settings. Raises ConfigError with everything that is out of range."""
    given = {name: value for name, value in vars(options).items() if name in kind.model_fields}
    try:
        return kind(**{**given, "prior": _prior(options.prior)})
    except ValidationError as error:
        problems = "; ".join(": ".join([*map(str, problem["loc"][:1]), problem["msg"]]) for problem in error.errors())
        raise ConfigError(f"settings out of range: {problems}") from error


def _prior(pairs: Sequence[str]) -> dict[str, str]:
    prior = dict(pair.rpartition("=")[::2] for pair in pairs)
    if "" in prior or len(prior) < len(pairs):
        raise ConfigError("--prior takes NAME=SHARE, each name once, for example --prior gsm8k=2")
    return prior
