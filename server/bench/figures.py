"""What is computed from the token times of one case: the definitions of benchmarks/README.md, and ratios of cases.

decode tok/s      R (n - 1) / (T(n) - T(1)): R requests of n new tokens; T(m) is the wall time of the whole load with m
                  new tokens per request. T(1) is measured in a run of its own, so that what is left is decoding alone.
end-to-end tok/s  tokens received / T(n), prefill included.
TTFT, ITL         per request, from sending to its first token; per token, the time since the one before.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from server.bench.load import Answer, Load

RATIO_FIGURES = ("decode_tok_s", "end_to_end_tok_s", "prefill_tok_s")

GROUP_KEYS = ("kind", "mode", "concurrency", "prompt_tokens", "new_tokens")
"""Cases that agree in these are compared with each other."""


def generation_figures(load: Load, first_token_load: Load | None, concurrency: int | None) -> dict[str, Any]:
    """Figures of one case. `first_token_load` is the same load with one new token per request; None in open loop."""
    answers = [answer for answer in load.answers if answer.error is None]
    num_tokens = sum(len(answer.token_s) for answer in answers)
    decode = None
    if first_token_load is not None and not _has_failed(first_token_load) and not _has_failed(load):
        decode = _rate(num_tokens - len(answers), load.wall_s - first_token_load.wall_s)
    first_ms = [1e3 * (answer.token_s[0] - answer.sent_s) for answer in answers if answer.token_s]
    return {
        "concurrency": concurrency,
        "requests": len(load.answers),
        "tokens": num_tokens,
        "wall_s": round(load.wall_s, 4),
        "decode_tok_s": decode,
        "end_to_end_tok_s": _rate(num_tokens, load.wall_s),
        **_percentiles("ttft_ms", first_ms),
        **_percentiles("itl_ms", [gap for answer in answers for gap in _gaps_ms(answer)]),
        **_failures(load),
    }


def prefill_figures(load: Load, prompt_tokens: int) -> dict[str, Any]:
    """Figures of one request of `prompt_tokens` tokens and one new token: prompt tokens / T(1)."""
    failed = _has_failed(load)
    return {
        "concurrency": 1,
        "requests": len(load.answers),
        "wall_s": round(load.wall_s, 4),
        "prefill_tok_s": None if failed else _rate(prompt_tokens * len(load.answers), load.wall_s),
        **_failures(load),
    }


def ratio_lines(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every policy over `base`, per kind, size and concurrency: median and range over the repeats.

    A ratio is taken within one repeat, where both ran one after the other: absolute figures drift with the machine. An
    open loop has none, since its speed is the arrivals'.
    """
    groups: dict[tuple[Any, ...], dict[tuple[str, int], Mapping[str, Any]]] = defaultdict(dict)
    for result in results:
        if result["concurrency"] is not None:
            groups[tuple(result[name] for name in GROUP_KEYS)][result["policy"], result["repeat"]] = result
    lines = []
    for key, group in groups.items():
        facts = dict(zip(GROUP_KEYS, key, strict=True))
        for policy in dict.fromkeys(policy for policy, _ in group if policy != "base"):
            repeats = [repeat for name, repeat in group if name == policy and ("base", repeat) in group]
            pairs = [(group[policy, repeat], group["base", repeat]) for repeat in repeats]
            ratios = {f"{figure}_ratio": _spread(pairs, figure) for figure in RATIO_FIGURES}
            if any(ratios.values()):
                measured = {name: spread for name, spread in ratios.items() if spread is not None}
                lines.append({"case": f"{policy}/base", **facts, "kind": "ratio", "of": facts["kind"], **measured})
    return lines


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear interpolation between the closest ranks; None of nothing."""
    return float(np.percentile(values, percent)) if values else None


def _percentiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    found = {f"{name}_p{percent}": percentile(values, percent) for percent in (50, 99)}
    return {key: None if value is None else round(value, 3) for key, value in found.items()}


def _gaps_ms(answer: Answer) -> list[float]:
    return [1e3 * (later - earlier) for earlier, later in zip(answer.token_s, answer.token_s[1:], strict=False)]


def _failures(load: Load) -> dict[str, Any]:
    errors = [answer.error for answer in load.answers if answer.error is not None]
    return {"failures": len(errors), **({"first_failure": errors[0]} if errors else {})}


def _has_failed(load: Load) -> bool:
    return any(answer.error is not None for answer in load.answers)


def _rate(count: int, seconds: float) -> float | None:
    """None where the clock shows nothing: too short a run to say."""
    return round(count / seconds, 2) if count > 0 and seconds > 0 else None


def _spread(pairs: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]], figure: str) -> dict[str, float] | None:
    """Median and range of `figure` over its base's; None where no pair has it."""
    ratios = [mine[figure] / base[figure] for mine, base in pairs if mine.get(figure) and base.get(figure)]
    if not ratios:
        return None
    return {
        "median": round(statistics.median(ratios), 4),
        "min": round(min(ratios), 4),
        "max": round(max(ratios), 4),
        "repeats": len(ratios),
    }
