"""This server's engine in process, by `lora-mixer bench`, in the words of the peers' runners."""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.peers.protocol import Workload, add_workload_flags, emit, workload_from

POLICIES = ("base", "pinned", "routed")


def main() -> None:
    """Run the benchmark once, print JSON lines."""
    parser = argparse.ArgumentParser(prog="ours_runner", description=main.__doc__)
    parser.add_argument("--config", default="adapters.yaml", metavar="FILE")
    parser.add_argument("--shift", type=int, default=0, metavar="N", help="policies take turns starting with the N-th")
    add_workload_flags(parser)
    arguments = parser.parse_args()
    command = bench_command(arguments.config, workload_from(arguments), arguments.shift)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode or not lines:
        failures = {line["first_failure"] for line in lines if "first_failure" in line}
        sys.exit(f"lora-mixer bench ended with {done.returncode}: {'; '.join(sorted(failures)) or 'see above'}")
    emit(kind="start", case="ours", startup_s=0.0, versions=lines[0]["versions"])
    for line in lines:
        if line["kind"] != "ratio":
            emit(**translated(line))


def bench_command(config: str, workload: Workload, shift: int) -> list[str]:
    """`lora-mixer bench` with the peers' workload."""
    start = shift % len(POLICIES)
    return [
        *(sys.executable, "-m", "server", "bench", "--config", config, "--repeat", "1"),
        *("--policies", ",".join(POLICIES[start:] + POLICIES[:start])),
        *("--concurrency", ",".join(map(str, workload.batches))),
        *("--prompt-tokens", str(workload.prompt_tokens), "--new-tokens", str(workload.new_tokens)),
        *("--seed", str(workload.seed)),
        *(("--prefill", str(workload.prefill)) if workload.prefill else ()),
    ]


def translated(line: Mapping[str, Any]) -> dict[str, Any]:
    """One line of `lora-mixer bench` as a peer's runner would print it."""
    kept = {name: line[name] for name in ("kind", "prompt_tokens", "new_tokens")}
    figures = ("decode_tok_s", "end_to_end_tok_s", "prefill_tok_s")
    return {
        **kept,
        "case": line["policy"],
        "batch": line["concurrency"],
        **{name: line[name] for name in figures if name in line},
    }


if __name__ == "__main__":
    main()
