"""The server over HTTP: speed beside its engine's, second turns, registration under load, start-up, memory.

python -m benchmarks.serving            # about 6 minutes, writes benchmarks/results/serving.json
python -m benchmarks.serving --quick    # few tokens: shows that everything runs
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import ROOT
from benchmarks.peers.protocol import prompts
from benchmarks.registration import recompiled_in_process, stall_over_http
from benchmarks.results_file import write_json
from benchmarks.server_process import ServerProcess, runtime_bytes, serving
from benchmarks.synthetic import projection_shapes, write_adapter
from server.bench.load import Answer, Job
from server.bench.over_http import HttpTarget
from server.config import ServerConfig, cache_folder, load_config
from server.errors import LoraMixerError
from server.machine import machine_facts, version_facts
from server.model.loader import base_model_folder

RESULT = ROOT / "benchmarks" / "results" / "serving.json"
CLIENTS = 32
PREFIX_TOKENS = 1024
SUFFIX_TOKENS = 32
"""What differs between two requests that share a prefix."""

BASE_FACTOR = 1.5
"""Allowed memory per byte of base weights."""


@dataclass(frozen=True)
class Effort:
    """How long each part takes."""

    clients: int = CLIENTS
    new_tokens: int = 128
    repeat: int = 2
    prefix_tokens: int = PREFIX_TOKENS
    turns: int = 5
    num_registrations: int = 3
    settle_s: float = 4.0


QUICK = Effort(clients=4, new_tokens=8, repeat=1, prefix_tokens=128, turns=2, num_registrations=1, settle_s=1.0)


async def measure(effort: Effort, work: Path) -> dict[str, Any]:
    """Every part, one after the other. Raises LoraMixerError if one could not be measured."""
    config = load_config(ROOT / "adapters.yaml")
    model = base_model_folder(config.base_model, cache_folder=cache_folder(), root=ROOT)
    shapes = projection_shapes(model)
    folders = [
        write_adapter(work / f"late-{index}", shapes, base_model=config.base_model.name, rank=16, seed=index)
        for index in range(effort.num_registrations)
    ]
    note("first start, with an empty cache")
    async with serving(environment={"LORA_MIXER_CACHE": str(work / "cache")}) as server:
        first_start_s = server.ready_s
    note("warm start")
    async with serving(["--adapter-root", str(work), "--registry-file", str(work / "registered")]) as server:
        note("HTTP beside the engine in process")
        http = [_http_ratio(server, effort) for _ in range(effort.repeat)]
        async with await HttpTarget.connect(server.url, None) as target:
            note("second turns")
            turns = [await second_turn(target, policy, effort) for policy in ("base", "pinned", "routed")]
            note("registration under load")
            stall = await stall_over_http(server.url, target, folders, effort.settle_s)
        memory = _memory(server, config, model, folders)
        ready_s = server.ready_s
    note("registration under load, in process")
    recompiled = await recompiled_in_process(config, folders)
    return {
        "start": {
            "first_s": round(first_start_s, 2),
            "warm_s": round(ready_s, 2),
            "first_target_s": 60,
            "warm_target_s": 10,
        },
        "http": summarised_http(http, effort.clients),
        "second_turn": turns,
        "registration": {**stall, "recompiled_graphs": recompiled, "target_ms": 250},
        "memory": memory,
    }


def summarised_http(repeats: Sequence[dict[str, Any]], clients: int) -> dict[str, Any]:
    """The ratio of each repeat, and their median."""
    ratios = [repeat["http_tok_s"] / repeat["in_process_tok_s"] for repeat in repeats]
    return {
        "clients": clients,
        "repeats": list(repeats),
        "ratio": {
            "median": round(statistics.median(ratios), 3),
            "min": round(min(ratios), 3),
            "max": round(max(ratios), 3),
        },
        "target": 0.9,
    }


async def second_turn(target: HttpTarget, policy: str, effort: Effort) -> dict[str, Any]:
    """Time to first token of a long prompt with nothing cached, and of others that share all but its end.

    Every turn has a salt of its own; its second request has the first one's prefix and different content after it.
    """
    model = {"base": target.base_model, "pinned": target.adapters[0], "routed": "auto"}[policy]
    cold, warm = [], []
    for turn in range(effort.turns + 1):
        (prefix,) = prompts(1, effort.prefix_tokens, seed=turn)
        suffixes = prompts(2, SUFFIX_TOKENS, seed=1000 + turn)
        answers = [
            await target.generate(Job(model, (*prefix, *suffix), 2, f"turn-{policy}-{turn}")) for suffix in suffixes
        ]
        if turn:  # the first turn warms up
            cold.append(first_token_ms(answers[0]))
            warm.append(first_token_ms(answers[1]))
    cold_ms, warm_ms = statistics.median(cold), statistics.median(warm)
    return {
        "policy": policy,
        "prefix_tokens": effort.prefix_tokens,
        "cold_ms": round(cold_ms, 2),
        "warm_ms": round(warm_ms, 2),
        "ratio": round(warm_ms / cold_ms, 4),
        "target": 0.15,
        "turns": effort.turns,
    }


def first_token_ms(answer: Answer) -> float:
    """Time to first token. Raises LoraMixerError for a request that failed."""
    if answer.error is not None:
        raise LoraMixerError(f"a request failed: {answer.error}")
    return 1e3 * (answer.token_s[0] - answer.sent_s)


def _http_ratio(server: ServerProcess, effort: Effort) -> dict[str, Any]:
    """Routed closed loop in process, then the same over HTTP; the idle server costs the first one nothing."""
    return {
        "in_process_tok_s": _end_to_end(effort),
        "http_tok_s": _end_to_end(effort, "--url", server.url),
    }


def _end_to_end(effort: Effort, *more: str) -> float:
    command = [
        *(sys.executable, "-m", "server", "bench", "--policies", "routed", "--repeat", "1"),
        *("--concurrency", str(effort.clients), "--new-tokens", str(effort.new_tokens), *more),
    ]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise LoraMixerError(f"lora-mixer bench ended with {done.returncode}; its reason is above")
    return float(json.loads(done.stdout.splitlines()[0])["end_to_end_tok_s"])


def _memory(server: ServerProcess, config: ServerConfig, model: Path, registered: Sequence[Path]) -> dict[str, Any]:
    """Resident memory after all that load, beside what is allowed for it."""
    stored = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    base = stored // (2 if config.base_model.dtype == "bfloat16" else 1)  # the cache holds float32
    assert config.router_folder is not None, "the demo has a router"
    folders = [config.root / spec.source for spec in config.adapters] + list(registered)
    adapters = sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))
    allowed = int(base * BASE_FACTOR) + config.server.kv_cache_mib * 2**20 + adapters
    resident = server.memory_bytes()
    return {
        "resident_bytes": resident,
        "peak_bytes": server.memory_bytes("VmHWM"),
        "base_bytes": base,
        "kv_bytes": config.server.kv_cache_mib * 2**20,
        "adapter_bytes": adapters,
        "runtime_bytes": runtime_bytes(),
        "allowed_bytes": allowed,
        "met": resident <= allowed,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure everything and write the result; 1 if something could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few tokens; the figures mean nothing")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"default: {RESULT.relative_to(ROOT)}; not with --quick"
    )
    arguments = parser.parse_args(argv)
    if arguments.quick and arguments.out is None:
        parser.error("--quick needs --out: its figures must not replace measured ones")
    with tempfile.TemporaryDirectory(prefix="lora-mixer-serving-") as work:
        try:
            parts = asyncio.run(measure(QUICK if arguments.quick else Effort(), Path(work)))
        except LoraMixerError as error:
            print(f"serving: {error.message}", file=sys.stderr)
            return 1
    facts = {"format_version": 1, "machine": machine_facts(), "versions": version_facts()}
    command = "python -m benchmarks.serving" + (" --quick" if arguments.quick else "")
    write_json(arguments.out or RESULT, {**facts, "command": command, **parts})
    return 0


def note(text: str) -> None:
    """Tell people what is about to run."""
    print(f"serving: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
