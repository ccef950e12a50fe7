"""`lora-mixer-train answer`: its flags, and questions to chats. The work is in `self_answers` and `invention`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from router_training.flags import add_config, config_from
from server.config import ServerConfig
from server.errors import ConfigError

INVENTION_FLAGS = ("seed", "temperature", "top_p", "max_question_tokens", "exclude")
"""Those that say nothing about questions from a file."""


def add_answer(parser: argparse.ArgumentParser) -> None:
    """All flags of the command."""
    add_config(parser)
    questions = parser.add_mutually_exclusive_group(required=True)
    questions.add_argument("--prompts", type=Path, metavar="FILE", help="text file with one question a line")
    questions.add_argument("--invent", type=int, metavar="N", help="N questions that the base model makes up itself")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="chat-JSONL, e.g. DATA/base/train.jsonl"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer, tokens (default 64)")
    # Absent where not given, so that one given without --invent is seen and refused.
    invent = parser.add_argument_group("with --invent", argument_default=argparse.SUPPRESS)
    invent.add_argument("--seed", type=int, help="of the questions; another one makes others (default 0)")
    invent.add_argument("--temperature", type=float, help="of the questions; divides logits (default 1)")
    invent.add_argument("--top-p", type=float, help="probability of the likeliest tokens drawn from (default 0.97)")
    invent.add_argument("--max-question-tokens", type=int, help="longer questions are dropped (default 200)")
    invent.add_argument(
        "--exclude",
        type=Path,
        action="append",
        metavar="FILE",
        help="chat-JSONL whose questions are not repeated, e.g. DATA/base/validation.jsonl; repeatable (default: none)",
    )
    parser.set_defaults(action=_answer)


def base_alone(config: ServerConfig) -> ServerConfig:
    """The same base model, which answers by itself: there may be no adapters yet."""
    return config.model_copy(update={"adapters": ()})


def _answer(options: argparse.Namespace) -> int:
    from router_training.invention import InventionSettings, invent_questions, read_questions
    from router_training.progress import Progress
    from router_training.run import load_with_progress
    from router_training.self_answers import answer_prompts, read_prompts, write_chats

    if options.out.is_dir():
        raise ConfigError(f"--out {options.out} is a folder; name a file in it")
    if options.max_new_tokens < 1:
        raise ConfigError("--max-new-tokens must be at least 1")
    given: dict[str, Any] = {name: value for name, value in vars(options).items() if name in INVENTION_FLAGS}
    if options.invent is None:
        if given:
            listed = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ConfigError(f"without --invent there is no use for {listed}")
        prompts = read_prompts(options.prompts)
        roster = load_with_progress(base_alone(config_from(options)), least=0)
    else:
        excluded = read_questions(given.pop("exclude", []))
        settings = InventionSettings(options.invent, **given)
        roster = load_with_progress(base_alone(config_from(options)), least=0)
        with Progress("questions", total=settings.count, unit="question") as progress:
            prompts = invent_questions(roster, settings, excluded=excluded, on_round=progress.advance)
    with Progress("answers", total=len(prompts), unit="chat") as progress:
        answers = answer_prompts(roster, prompts, options.max_new_tokens, on_batch=progress.advance)
    count = write_chats(prompts, answers, options.out)
    print(f"{count} chats are in {options.out}.", file=sys.stderr)
    return 0
