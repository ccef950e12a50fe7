"""Figures and ratios of a comparison from its raw lines. Knows the definitions and targets, runs nothing."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Ratio:
    """One figure of ours over another's, with the least we want at batch 1, 8, 32 and in the prefill."""

    name: str
    ours: str
    """Our case: `routed`, `base` or `pinned`."""
    peer: str
    case: str
    targets: Mapping[str, float]


RATIOS = (
    Ratio("routed / our base", "routed", "ours", "base", {"1": 0.85, "8": 0.85, "32": 0.85, "prefill": 0.85}),
    Ratio("routed / vLLM base", "routed", "vllm-base", "base", {"1": 1.1, "8": 1.0, "32": 1.0, "prefill": 0.8}),
    Ratio(
        "routed / vLLM with eight adapters",
        "routed",
        "vllm-adapters",
        "eight adapters",
        {"1": 3.0, "8": 3.0, "32": 4.0, "prefill": 8.0},
    ),
    Ratio("routed / PEFT Arrow", "routed", "peft-arrow", "arrow", {"1": 5.0, "8": 5.0, "32": 5.0}),
    Ratio("our base / llama.cpp", "base", "llama-cpp", "base", {"1": 1.0, "8": 2.0, "32": 3.5, "prefill": 5.0}),
    Ratio("our base / bare GEMM chain", "base", "gemm-chain", "chain", {"1": 0.8, "8": 0.7, "32": 0.6, "prefill": 0.6}),
    Ratio("our base / vLLM base", "base", "vllm-base", "base", {}),
    Ratio("routed / PEFT with eight adapters", "routed", "peft-adapters", "eight adapters", {}),
    Ratio("our base / transformers continuous batching", "base", "transformers-cb", "base", {}),
)


def size_of(line: Line) -> str:
    """`prefill`, or the batch size: the column a line belongs to. A prefill of other lengths has its length in it."""
    if line["kind"] == "generation":
        return str(line["batch"])
    return "prefill" if line["prompt_tokens"] >= 1024 else f"prefill {line['prompt_tokens']}"


def value_of(line: Line) -> float | None:
    """Tokens per second: of decoding, or of the prefill."""
    value = line.get("decode_tok_s" if line["kind"] == "generation" else "prefill_tok_s")
    return None if value is None else float(value)


def figures(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """Median and range over the rounds of every peer, case and size, in order of appearance."""
    groups: dict[tuple[str, str, str], list[Line]] = defaultdict(list)
    for line in lines:
        if value_of(line) is not None:
            groups[line["peer"], line["case"], size_of(line)].append(line)
    return [
        {"peer": peer, "case": case, "size": size, "new_tokens": group[0]["new_tokens"], **spread(map(_value, group))}
        for (peer, case, size), group in groups.items()
    ]


def ratios(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Every ratio of RATIOS that was measured, taken within each round, then median and range over the rounds."""
    values = {(line["peer"], line["case"], size_of(line), line["round"]): value_of(line) for line in lines}
    found = []
    for ratio in RATIOS:
        for size in dict.fromkeys(size_of(line) for line in lines):
            per_round = []
            for number in sorted({line["round"] for line in lines}):
                mine = values.get(("ours", ratio.ours, size, number))
                theirs = values.get((ratio.peer, ratio.case, size, number))
                if mine and theirs:
                    per_round.append(mine / theirs)
            if per_round:
                target = ratio.targets.get(size)
                summary = spread(per_round)
                met = None if target is None else summary["median"] >= target
                found.append({"name": ratio.name, "size": size, **summary, "target": target, "met": met})
    return found


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Median, range, and how many there were."""
    numbers = list(values)
    return {
        "median": round(statistics.median(numbers), 3),
        "min": round(min(numbers), 3),
        "max": round(max(numbers), 3),
        "rounds": len(numbers),
    }


def _value(line: Line) -> float:
    value = value_of(line)
    assert value is not None, "lines without a value were left out"
    return value
