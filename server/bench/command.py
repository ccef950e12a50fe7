"""`lora-mixer bench`: its flags, and the loop that prints one JSON line per case."""

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

from server.bench.cases import POLICIES, Plan, run_plan
from server.bench.facts import config_digest
from server.bench.figures import ratio_lines
from server.bench.load import Target
from server.cli_flags import (
    HelpFormatter,
    add_config_flags,
    add_settings_flags,
    config_from,
    key_from_environment,
    positive_float,
    positive_int,
)
from server.config import ServerConfig
from server.errors import ConfigError
from server.machine import machine_facts, version_facts

T = TypeVar("T")

ENGINE_SETTINGS = (
    "device",
    "num_threads",
    "backend",
    "max_model_len",
    "kv_cache_mib",
    "block_size",
    "max_num_seqs",
    "max_num_batched_tokens",
    "prefix_caching",
    "speculative_tokens",
)
"""Settings that change what an in-process benchmark measures."""

COUNTS = {
    "prompt_tokens": "tokens per prompt",
    "new_tokens": "tokens generated per request",
    "repeat": "times to run all cases; policies take turns",
    "requests_per_client": "requests that each client of a closed loop sends, one after the other",
    "num_requests": "requests in all, with --rate",
}
"""Fields of Plan that are counts of at least one, and what they count."""

DESCRIPTION = """\
Measures generation speed and prints one JSON line per case, then one line per ratio of a policy to base.
Greedy, end of sequence ignored, prompts of seeded random token ids, no run profits from another's prefix cache.
Without --url the engine runs in this process, as --config says; with --url requests go to a running server.
Figures are comparable within one run on one otherwise idle machine only; benchmarks/README.md defines them.
Exit status: 0 measured, 1 some requests failed, 2 wrong usage or configuration."""


def add_bench_parser(commands: Any) -> None:
    """Add `bench` to the main parser's `commands`."""
    parser = commands.add_parser(
        "bench", formatter_class=_BenchHelp, help="measure speed reproducibly", description=DESCRIPTION
    )
    parser.add_argument(
        "--url",
        help="measure this server over HTTP, e.g. http://127.0.0.1:8000 (default: the engine in "
        "this process); the key is LORA_MIXER_ADMIN_KEY, else the first of LORA_MIXER_API_KEYS",
    )
    _add_load_flags(parser, Plan())
    parser.add_argument("--json-out", type=Path, metavar="FILE", help="append the lines to FILE as well")
    add_config_flags(parser)
    add_settings_flags(parser, only=ENGINE_SETTINGS)
    parser.set_defaults(run=run_bench)


def _add_load_flags(parser: argparse.ArgumentParser, plan: Plan) -> None:
    """One flag per field of Plan; its defaults are `plan`'s."""
    parser.add_argument(
        "--policies",
        type=_policies,
        default=plan.policies,
        metavar="LIST",
        help=f"comma-separated, of {', '.join(POLICIES)}; pinned takes another adapter for each request, in turn; "
        f"mixed takes the other three in turn within one batch (default: {','.join(plan.policies)})",
    )
    parser.add_argument(
        "--concurrency",
        type=_counts,
        default=plan.concurrency,
        metavar="LIST",
        help=f"requests at once, comma-separated (default: {','.join(map(str, plan.concurrency))})",
    )
    for name, what in COUNTS.items():
        value = getattr(plan, name)
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=positive_int, default=value, metavar="N", help=f"{what} (default: {value})")
    parser.add_argument(
        "--rate",
        type=positive_float,
        metavar="R",
        help="open loop: send requests at R per second, Poisson, instead of closed loops at --concurrency "
        "(default: off)",
    )
    parser.add_argument(
        "--prefill",
        type=positive_int,
        nargs="?",
        const=1024,
        metavar="N",
        help="also measure one prompt of N tokens with one new token (default: off; without N: 1024)",
    )
    parser.add_argument(
        "--seed", type=int, default=plan.seed, metavar="N", help=f"seed of prompts and arrivals (default: {plan.seed})"
    )


def run_bench(arguments: argparse.Namespace) -> int:
    """Measure as the flags say; 1 if any request failed."""
    plan = Plan(**{name: getattr(arguments, name) for name in Plan.__dataclass_fields__})
    config = None if arguments.url else config_from(arguments)
    try:
        copy = arguments.json_out.open("a", encoding="utf-8") if arguments.json_out else None
    except OSError as error:
        raise ConfigError(f"cannot write --json-out {arguments.json_out}: {error.strerror}") from error
    try:
        return asyncio.run(_measure(plan, arguments.url, config, copy))
    finally:
        if copy is not None:
            copy.close()


async def _measure(plan: Plan, url: str | None, config: ServerConfig | None, copy: TextIO | None) -> int:
    async with _over_http(url) if config is None else _in_process(config) as (target, digest):
        facts = {"versions": version_facts(), "machine": machine_facts(), "config_digest": digest}
        return await report(target, plan, facts, copy)


@asynccontextmanager
async def _over_http(url: str | None) -> AsyncIterator[tuple[Target, str | None]]:
    """A server's configuration is its own affair: no digest."""
    from server.bench.over_http import HttpTarget

    assert url is not None, "without a configuration there is a URL"
    async with await HttpTarget.connect(url, key_from_environment()) as target:
        yield target, None


@asynccontextmanager
async def _in_process(config: ServerConfig) -> AsyncIterator[tuple[Target, str | None]]:
    from server.bench.in_process import in_process

    _note("loading model and adapters")
    async with in_process(config) as (target, adapter_digests):
        yield target, config_digest(config, adapter_digests)


async def report(target: Target, plan: Plan, facts: Mapping[str, Any], copy: TextIO | None = None) -> int:
    """Run `plan`, print its lines with `facts` on each, to `copy` too; 1 if any request failed."""
    results = []

    def emit(line: Mapping[str, Any]) -> None:
        text = json.dumps({**line, **facts})
        print(text, flush=True)
        if copy is not None:
            print(text, file=copy, flush=True)

    async for result in run_plan(target, plan, _note):
        results.append(result)
        emit(result)
    for line in ratio_lines(results):
        emit(line)
    return 1 if any(result["failures"] for result in results) else 0


class _BenchHelp(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description."""


def _policies(text: str) -> tuple[str, ...]:
    def one(word: str) -> str:
        if word not in POLICIES:
            raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(POLICIES)}")
        return word

    return _distinct(text, one)


def _counts(text: str) -> tuple[int, ...]:
    return _distinct(text, positive_int)


def _distinct(text: str, parse: Callable[[str], T]) -> tuple[T, ...]:
    values = tuple(parse(word.strip()) for word in text.split(","))
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"{text!r} names a value twice")
    return values


def _note(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)
