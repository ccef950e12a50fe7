"""Runs every peer in turn, several rounds, and writes benchmarks/results/compare.json.

    python -m benchmarks.compare                                  # every peer, two rounds
    python -m benchmarks.compare --only ours,vllm-base --rounds 1
    python -m benchmarks.compare --resume                         # what a cut-off comparison has not measured yet

Each peer runs alone, in a process of its own per round, and each round starts with another one. Start-up is not timed.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.peers.catalogue import Command, Peer, full_argv, peers
from benchmarks.peers.environments import ROOT, PeerUnavailableError, note
from benchmarks.peers.protocol import Workload, add_workload_flags, positive_int, workload_from
from benchmarks.ratios import figures, ratios
from benchmarks.results_file import read_json, write_json
from server.bench.facts import OtherLoad
from server.config import cache_folder, load_config
from server.errors import LoraMixerError
from server.machine import machine_facts, version_facts
from server.model.loader import base_model_folder

RESULT = ROOT / "benchmarks" / "results" / "compare.json"
TIMEOUT_S = 900.0
"""Longest run of one peer in one round, start-up included."""

Run = Callable[[Peer, Command, Workload, int], list[dict[str, Any]]]


class PeerFailedError(Exception):
    """A peer ended badly; its last words."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the result; 1 if any peer failed, 2 for wrong usage."""
    arguments = build_parser().parse_args(argv)
    chosen = select(peers(), arguments.only, arguments.skip)
    result = new_result(workload_from(arguments), arguments.rounds)
    try:
        if arguments.resume:
            result = resumed(read_json(arguments.out), result)
        model = base_model_folder(
            load_config(ROOT / "adapters.yaml").base_model, cache_folder=cache_folder(), root=ROOT
        )
    except (LoraMixerError, ValueError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    commands = prepare(chosen, model, result)
    if arguments.prepare_only:
        return 0
    compare(chosen, commands, result, run_peer, lambda: write_json(arguments.out, summarised(result)))
    write_json(arguments.out, summarised(result))
    for ratio in summarised(result)["ratios"]:
        target = "" if ratio["target"] is None else f", target {ratio['target']}"
        note(f"{ratio['name']}, {ratio['size']}: {ratio['median']} ({ratio['min']} to {ratio['max']}{target})")
    return 1 if result["errors"] else 0


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=(__doc__ or "").split("\n")[0])
    names = [peer.name for peer in peers()]
    parser.add_argument("--only", type=_names(names), default=(), metavar="LIST", help=f"of {', '.join(names)}")
    parser.add_argument("--skip", type=_names(names), default=(), metavar="LIST", help="peers to leave out")
    parser.add_argument("--rounds", type=positive_int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--resume", action="store_true", help="keep what --out holds, measure what it lacks")
    parser.add_argument("--prepare-only", action="store_true", help="set the peers up, measure nothing")
    parser.add_argument("--out", type=Path, default=RESULT, metavar="FILE")
    add_workload_flags(parser)
    return parser


def select(known: Sequence[Peer], only: Sequence[str], skip: Sequence[str]) -> list[Peer]:
    """The peers to run, in their own order."""
    return [peer for peer in known if (not only or peer.name in only) and peer.name not in skip]


def new_result(workload: Workload, rounds: int) -> dict[str, Any]:
    """A result without figures."""
    return {
        "format_version": 1,
        "machine": machine_facts(),
        "versions": version_facts(),
        "workload": {**asdict(workload), "batches": list(workload.batches)},
        "rounds": rounds,
        "commands": {},
        "skipped": {},
        "errors": [],
        "runs": [],
    }


def resumed(old: dict[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`old` with room for what `new` asks for. Raises ValueError if they measure different things."""
    for key in ("format_version", "machine", "workload"):
        if old.get(key) != new[key]:
            raise ValueError(f"cannot resume: its {key} is {old.get(key)}, now it is {new[key]}")
    return {**old, "rounds": max(old["rounds"], new["rounds"]), "errors": [], "skipped": {}}


def prepare(chosen: Sequence[Peer], model: Path, result: dict[str, Any]) -> dict[str, Command]:
    """Set up every peer before anything is timed; those that cannot run are noted as skipped."""
    commands = {}
    for peer in chosen:
        try:
            commands[peer.name] = peer.prepare(model)
        except PeerUnavailableError as reason:
            note(f"{peer.name} is left out: {reason}")
            result["skipped"][peer.name] = str(reason).replace(f"{ROOT}/", "")
    return commands


def compare(
    chosen: Sequence[Peer], commands: Mapping[str, Command], result: dict[str, Any], run: Run, save: Callable[[], None]
) -> None:
    """Fill `result` with what is missing, round by round; save after every peer."""
    common = Workload(**{**result["workload"], "batches": tuple(result["workload"]["batches"])})
    done = {(line["peer"], line["round"]) for line in result["runs"]}
    able = [peer for peer in chosen if peer.name in commands]
    for number in range(result["rounds"]):
        shift = number % max(1, len(able))
        for peer in [*able[shift:], *able[:shift]]:
            if (peer.name, number) in done:
                continue
            note(f"round {number + 1}/{result['rounds']}: {peer.name}")
            command, workload = commands[peer.name], peer.workload(common)
            result["commands"][peer.name] = Command(full_argv(command, workload), command.environment).shown()
            try:
                lines = run(peer, command, workload, number)
            except PeerFailedError as error:
                note(f"{peer.name} failed: {error}")
                result["errors"].append({"peer": peer.name, "round": number, "message": str(error)})
            else:
                add_lines(result, peer.name, number, lines)
            save()


def add_lines(result: dict[str, Any], peer: str, number: int, lines: Sequence[Mapping[str, Any]]) -> None:
    """Put one peer's lines of one round into the result; its versions go to the others'."""
    for line in lines:
        if peer != "ours":  # the result has ours from the start
            for package, version in line.get("versions", {}).items():
                result["versions"][f"{peer}: {package}"] = version
        kept = {key: value for key, value in line.items() if key != "versions"}
        result["runs"].append({"peer": peer, "round": number, **kept})


def summarised(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result with figures and ratios made of its raw lines."""
    measured = [line for line in result["runs"] if line["kind"] in ("generation", "prefill")]
    return {**result, "figures": figures(measured), "ratios": ratios(measured)}


def run_peer(peer: Peer, command: Command, workload: Workload, number: int) -> list[dict[str, Any]]:
    """One peer, one round: its JSON lines, each with the cores that others kept busy. Raises PeerFailedError."""
    argv = full_argv(command, workload)
    if peer.name == "ours":
        argv += ["--shift", str(number)]
    others, before_s = OtherLoad(), _children_s()
    with tempfile.TemporaryFile("w+") as errors:
        try:
            done = subprocess.run(
                argv,
                cwd=ROOT,
                env={**os.environ, **command.environment},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise PeerFailedError(f"not done after {TIMEOUT_S:.0f} s") from error
        errors.seek(0)
        last_words = errors.read()[-2000:]
    if done.returncode:
        raise PeerFailedError(f"exit status {done.returncode}: {last_words.strip()}")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"kind"')]
    other_cores = others.cores(also_own_s=_children_s() - before_s)
    return [{**line, "other_cores": other_cores} for line in lines]


def _children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _names(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        words = tuple(word.strip() for word in text.split(","))
        if unknown := sorted(set(words) - set(known)):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
        return words

    return parse


if __name__ == "__main__":
    sys.exit(main())
