"""Result files -> Markdown tables. Pure functions of a result's content; no number is typed by hand anywhere."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]

SIZES = ("1", "8", "32", "prefill")
MEBIBYTE = 2**20


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def facts(result: Result) -> str:
    """Machine and versions, one sentence each."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(result["versions"].items()))
    hardware = f"{machine['cpu_model']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
    return f"{hardware}, {machine['system']}.\n{versions}."


def compare_tables(result: Result) -> str:
    """Ratios with their targets, absolute figures, commands, and what did not run."""
    sizes = [size for size in SIZES if any(row["size"] == size for row in result["figures"])]
    sizes += [row["size"] for row in result["figures"] if row["size"] not in sizes]
    sizes = list(dict.fromkeys(sizes))
    ratio_rows = _pivot(result["ratios"], ("name",), sizes, _ratio_cell)
    figure_rows = _pivot(result["figures"], ("peer", "case", "new_tokens_max"), sizes, _figure_cell)
    columns = [size if size.startswith("prefill") else f"batch {size}" for size in sizes]
    parts = [
        facts(result),
        f"{result['rounds']} rounds; median (range) of the rounds' ratios, and the target where there is one:",
        table(["ratio", *columns], ratio_rows),
        "Tokens per second, median (range); n = new tokens per request:",
        table(["peer", "case", "n", *columns], figure_rows),
    ]
    busy = [line["other_cores"] for line in result["runs"] if line.get("other_cores") is not None]
    if busy:
        parts.append(f"Cores that other processes kept busy meanwhile: at most {max(busy)}.")
    parts += [f"Left out: {peer}, {reason}" for peer, reason in result["skipped"].items()]
    parts += [f"Failed: {error['peer']} in round {error['round'] + 1}" for error in result["errors"]]
    commands = "\n".join(f"{name}: {command}" for name, command in sorted(result["commands"].items()))
    return "\n\n".join([*parts, f"```text\n{commands}\n```"])


def scaling_tables(result: Result) -> str:
    """One table per curve, 64 adapters against 8, and the parts of a step."""
    parts = [facts(result), f"`{result['command']}`, {result['new_tokens']} new tokens, {result['duration_s']} s."]
    for name, points in result["curves"].items():
        policies = list(dict.fromkeys(point["policy"] for point in points))
        values = {(point["x"], point["policy"]): point["tok_s"] for point in points}
        rows = [
            [str(x), *(_number(values.get((x, policy))) for policy in policies)]
            for x in dict.fromkeys(point["x"] for point in points)
        ]
        parts.append(table([name, *(f"{policy}, tok/s" for policy in policies)], rows))
    rows = [
        [str(row["concurrency"]), str(row["ratio"]), str(row["target"]), _yes(row["met"])]
        for row in result["many_adapters"]
    ]
    parts.append(table(["concurrency", "64 adapters / 8 adapters", "target", "met"], rows))
    names = list(dict.fromkeys(name for cost in result["step_costs"] for name in cost["parts_ms"]))
    cost_rows = [
        [str(cost["concurrency"]), str(cost["step_ms"]), *(_number(cost["parts_ms"].get(name)) for name in names)]
        for cost in result["step_costs"]
    ]
    parts.append(table(["concurrency", "step, ms", *names], cost_rows))
    return "\n\n".join(parts)


def serving_tables(result: Result) -> str:
    """What a client and an operator see, each beside its target."""
    http, start, stall, memory = (result[name] for name in ("http", "start", "registration", "memory"))
    rows = [
        [
            f"HTTP / in process, {http['clients']} streams",
            f"{http['ratio']['median']} ({http['ratio']['min']}–{http['ratio']['max']})",
            f"≥ {http['target']}",
            _yes(http["ratio"]["median"] >= http["target"]),
        ]
    ]
    rows += [
        [
            f"second turn, {turn['policy']}, prefix {turn['prefix_tokens']}: first token warm / cold",
            f"{turn['ratio']} ({turn['warm_ms']} / {turn['cold_ms']} ms)",
            f"≤ {turn['target']}",
            _yes(turn["ratio"] <= turn["target"]),
        ]
        for turn in result["second_turn"]
    ]
    gap = f"{stall['stall_ms']} ms (without: {stall['gap_without_ms']['max']} ms)"
    rows += [
        [
            "longest gap of a stream while adapters are registered",
            gap,
            f"≤ {stall['target_ms']} ms",
            _yes(stall["stall_ms"] <= stall["target_ms"]),
        ],
        ["graphs compiled again by that", str(stall["recompiled_graphs"]), "0", _yes(stall["recompiled_graphs"] == 0)],
        [
            "ready after a warm start",
            f"{start['warm_s']} s",
            f"≤ {start['warm_target_s']} s",
            _yes(start["warm_s"] <= start["warm_target_s"]),
        ],
        [
            "ready after the very first start",
            f"{start['first_s']} s",
            f"≤ {start['first_target_s']} s",
            _yes(start["first_s"] <= start["first_target_s"]),
        ],
        [
            "resident memory",
            f"{memory['resident_bytes'] // MEBIBYTE} MiB (peak {memory['peak_bytes'] // MEBIBYTE})",
            f"≤ {memory['allowed_bytes'] // MEBIBYTE} MiB",
            _yes(memory["met"]),
        ],
        ["of it Python and its libraries, nothing loaded", f"{memory['runtime_bytes'] // MEBIBYTE} MiB", "–", "–"],
    ]
    return "\n\n".join([facts(result), f"`{result['command']}`", table(["what", "measured", "target", "met"], rows)])


def _pivot(
    rows: Sequence[Result], keys: Sequence[str], sizes: Sequence[str], cell: Callable[[Result], str]
) -> list[list[str]]:
    """One line per distinct `keys`, one column per size."""
    most = {(row.get("peer"), row.get("case")): 0 for row in rows}
    for row in rows:
        place = (row.get("peer"), row.get("case"))
        most[place] = max(most[place], 0 if row["size"].startswith("prefill") else row.get("new_tokens", 0))
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        whole = {**row, "new_tokens_max": most[row.get("peer"), row.get("case")] or "–"}
        lines.setdefault(tuple(str(whole[key]) for key in keys), {})[row["size"]] = cell(row)
    return [[*key, *(cells.get(size, "–") for size in sizes)] for key, cells in lines.items()]


def _ratio_cell(row: Result) -> str:
    target = "" if row["target"] is None else f", {'≥' if row['met'] else 'below'} {row['target']}"
    return f"{row['median']:.2f} ({row['min']:.2f}–{row['max']:.2f}){target}"


def _figure_cell(row: Result) -> str:
    return f"{_number(row['median'])} ({_number(row['min'])}–{_number(row['max'])})"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _yes(is_met: bool) -> str:
    return "yes" if is_met else "**no**"
