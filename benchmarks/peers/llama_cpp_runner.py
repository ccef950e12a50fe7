"""llama.cpp in bfloat16: `llama-batched-bench` for decoding, `llama-bench` for the prefill.

Both draw their own random tokens; lengths, batches and greedy decoding are those of the workload.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import Workload, add_workload_flags, emit, emit_prefill, workload_from


def main() -> None:
    """Run both programs, print JSON lines."""
    parser = argparse.ArgumentParser(prog="llama_cpp_runner", description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True, help="GGUF file")
    parser.add_argument("--bin", type=Path, required=True, help="folder with the two programs")
    parser.add_argument("--version", required=True)
    parser.add_argument("--threads", type=int, default=2)
    add_workload_flags(parser)
    arguments = parser.parse_args()
    workload = workload_from(arguments)
    emit(kind="start", case="llama.cpp", startup_s=0.0, versions={"llama.cpp": arguments.version})
    common = ["-m", str(arguments.model), "-t", str(arguments.threads)]
    output = _run([str(arguments.bin / "llama-batched-bench"), *common, *batched_flags(workload)])
    for line in generation_lines(json_lines(output)):
        emit(**line)
    if workload.prefill:
        flags = ["-p", str(workload.prefill), "-n", "0", "-r", "2", "-o", "jsonl"]
        for row in json_lines(_run([str(arguments.bin / "llama-bench"), *common, *flags])):
            emit_prefill("base", row["n_prompt"], row["avg_ts"])


def batched_flags(workload: Workload) -> list[str]:
    """Flags of llama-batched-bench; the context holds the largest batch."""
    context = max(workload.batches) * (workload.prompt_tokens + workload.new_tokens)
    sizes = ["-npp", str(workload.prompt_tokens), "-ntg", str(workload.new_tokens)]
    batches = ["-npl", ",".join(map(str, workload.batches))]
    return ["-c", str(context), "-b", "2048", "-ub", "512", *sizes, *batches, "--output-format", "jsonl"]


def generation_lines(rows: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """llama-batched-bench's rows in our words: `tg` new tokens per sequence took t_tg seconds, the prompts t_pp."""
    for row in rows:
        yield {
            "kind": "generation",
            "case": "base",
            "batch": row["pl"],
            "prompt_tokens": row["pp"],
            "new_tokens": row["tg"],
            "first_s": row["t_pp"],
            "all_s": row["t_pp"] + row["t_tg"],
            "decode_tok_s": row["pl"] * row["tg"] / row["t_tg"],
            "end_to_end_tok_s": row["pl"] * row["tg"] / (row["t_pp"] + row["t_tg"]),
        }


def json_lines(text: str) -> list[dict[str, Any]]:
    """The lines that hold JSON objects; both programs log between them."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{Path(command[0]).name} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
