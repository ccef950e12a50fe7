"""What every peer's runner shares: workload, prompts, definitions, and the JSON lines it prints.

Standard library only: it is imported by interpreters that hold nothing but their peer.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

MAX_DRAWN_TOKEN_ID = 32_000
"""As `lora-mixer bench` draws them, in the same order from the same generator: every peer gets the same prompts."""

WARM_UP_TOKENS = 4

Generate = Callable[[list[list[int]], int], None]
"""Generate exactly that many tokens for each prompt, greedily, whatever the end of sequence says."""


@dataclass(frozen=True)
class Workload:
    """Sizes in tokens; `new_tokens` may be less than 128 for slow peers, and every line tells it."""

    prompt_tokens: int = 64
    new_tokens: int = 128
    batches: tuple[int, ...] = (1, 8, 32)
    prefill: int = 1024
    """0 leaves it out."""
    seed: int = 0


def prompts(batch: int, num_tokens: int, seed: int) -> list[list[int]]:
    """`batch` prompts of random token ids."""
    rng = random.Random(seed)
    return [[rng.randrange(MAX_DRAWN_TOKEN_ID) for _ in range(num_tokens)] for _ in range(batch)]


def add_workload_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per field of Workload."""
    default = Workload()
    parser.add_argument("--prompt-tokens", type=positive_int, default=default.prompt_tokens, metavar="N")
    parser.add_argument("--new-tokens", type=at_least_two, default=default.new_tokens, metavar="N")
    parser.add_argument("--batches", type=counts, default=default.batches, metavar="LIST")
    parser.add_argument("--prefill", type=count_or_zero, default=default.prefill, metavar="N", help="0: leave it out")
    parser.add_argument("--seed", type=int, default=default.seed, metavar="N")


def workload_from(arguments: argparse.Namespace) -> Workload:
    return Workload(**{name: getattr(arguments, name) for name in Workload.__dataclass_fields__})


def flags_of(workload: Workload) -> list[str]:
    """The flags that `workload_from` reads back."""
    return [
        *("--prompt-tokens", str(workload.prompt_tokens)),
        *("--new-tokens", str(workload.new_tokens)),
        *("--batches", ",".join(map(str, workload.batches))),
        *("--prefill", str(workload.prefill)),
        *("--seed", str(workload.seed)),
    ]


def decode_rate(batch: int, new_tokens: int, first_s: float, all_s: float) -> float | None:
    """B (n - 1) / (T(n) - T(1)); None where the clock shows nothing."""
    seconds = all_s - first_s
    return batch * (new_tokens - 1) / seconds if seconds > 0 else None


def measure(case: str, generate: Generate, workload: Workload) -> None:
    """Print one line per batch size, and one for the prefill of a single long prompt. Each shape is warmed up first."""
    for batch in workload.batches:
        ids = prompts(batch, workload.prompt_tokens, workload.seed)
        generate(ids, WARM_UP_TOKENS)
        first_s = timed(generate, ids, 1)
        all_s = timed(generate, ids, workload.new_tokens)
        emit(
            kind="generation",
            case=case,
            batch=batch,
            prompt_tokens=workload.prompt_tokens,
            new_tokens=workload.new_tokens,
            first_s=first_s,
            all_s=all_s,
            decode_tok_s=decode_rate(batch, workload.new_tokens, first_s, all_s),
            end_to_end_tok_s=batch * workload.new_tokens / all_s,
        )
    if workload.prefill:
        # A prompt of its own for the warm-up: a prefix cache must not answer the one that is timed.
        generate(prompts(1, workload.prefill, workload.seed + 1), 1)
        seconds = timed(generate, prompts(1, workload.prefill, workload.seed + 2), 1)
        emit_prefill(case, workload.prefill, workload.prefill / seconds)


def emit_prefill(case: str, num_tokens: int, rate: float) -> None:
    """The line of one prefill, tokens per second."""
    emit(kind="prefill", case=case, batch=1, prompt_tokens=num_tokens, new_tokens=1, prefill_tok_s=rate)


def timed(generate: Generate, ids: list[list[int]], new_tokens: int) -> float:
    """Wall seconds of one call."""
    started_s = time.perf_counter()
    generate(ids, new_tokens)
    return time.perf_counter() - started_s


def emit(**fields: Any) -> None:
    """Print one JSON line, numbers rounded to what a clock can tell."""
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in fields.items()}
    print(json.dumps(rounded), flush=True)


def check_lengths(outputs: Sequence[Sequence[int]], new_tokens: int) -> None:
    """Refuse a peer that stopped early: its speed would count tokens that it never made."""
    wrong = sorted({len(output) for output in outputs} - {new_tokens})
    if wrong:
        sys.exit(f"asked for {new_tokens} tokens per prompt, got {', '.join(map(str, wrong))}")


def positive_int(text: str) -> int:
    """Argument type: an integer of at least 1."""
    return _integer(text, 1)


def at_least_two(text: str) -> int:
    """Argument type: the decode rate needs a second token."""
    return _integer(text, 2)


def count_or_zero(text: str) -> int:
    """Argument type: an integer of at least 0."""
    return _integer(text, 0)


def counts(text: str) -> tuple[int, ...]:
    """Argument type: distinct integers of at least 1, comma-separated."""
    values = tuple(positive_int(word.strip()) for word in text.split(","))
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"{text!r} names a value twice")
    return values


def _integer(text: str, least: int) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text!r}")
    return int(text)
