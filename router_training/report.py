"""Evaluation records to Markdown. Knows the record's layout and computes nothing new."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from router_training.settings import BASE_NAME
from server.errors import ConfigError

POLICY_TITLES = {"base": "base", "own_adapter": "own adapter", "uniform": "uniform mix", "routed": "routed"}
"""Column order and titles of the policies."""


def evaluation_text(record: Mapping[str, Any]) -> str:
    """Table and verdict, and a table of the chats that were asked in other phrasings, if any were."""
    parts = [evaluation_table(record), evaluation_verdict(record)]
    if "phrased" in record:
        phrased = record["phrased"]
        count = sum(phrased["chats"].values())
        parts.append(f"Asked in other phrasings, {count} of {count + sum(phrased['left_out'].values())} chats:")
        parts.append(evaluation_table(phrased))
    return "\n\n".join(parts)


def evaluation_table(record: Mapping[str, Any]) -> str:
    """One evaluation as a Markdown table: nats per answer token by task and policy, and routed against own adapter."""
    policies = [policy for policy in POLICY_TITLES if policy in record["policies"]]
    header = ["task", "chats", *(POLICY_TITLES[policy] for policy in policies), "routed / own", "own adapter's share"]
    rows = []
    for task, ratio in record["ratio_to_own_adapter"].items():
        routed = record["policies"]["routed"][task]
        values = [f"{record['policies'][policy][task]['nll']:.3f}" for policy in policies]
        chats = str(record["chats"][task])
        rows.append([task, chats, *values, f"{ratio:.3f}", f"{100 * routed['own_share']:.0f} %"])
    mean = record["mean_ratio_to_own_adapter"]
    footer = ["mean", "", *([""] * len(policies)), f"{mean:.3f}", ""]
    return markdown_table(header, [*rows, footer])


def evaluation_verdict(record: Mapping[str, Any]) -> str:
    """One sentence: on which tasks the router wins."""
    tasks = [task for task in record["ratio_to_own_adapter"] if task != BASE_NAME]
    losses = {
        name: [task for task in tasks if task not in record[field]]
        for name, field in (("the base model", "beats_base"), ("the uniform mix", "beats_uniform"))
    }
    parts = [
        f"beats {name} on all {len(tasks)} tasks" if not lost else f"does not beat {name} on {', '.join(lost)}"
        for name, lost in losses.items()
    ]
    return f"The router {' and '.join(parts)}."


def comparison_table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Several evaluations side by side: routed nats per answer token, one column per record; – for a task that a record
    lacks."""
    tasks = list(dict.fromkeys(task for record in records.values() for task in record["ratio_to_own_adapter"]))
    routed = [record["policies"]["routed"] for record in records.values()]
    rows = [[task, *(f"{found[task]['nll']:.3f}" if task in found else "–" for found in routed)] for task in tasks]
    means = [f"{record['mean_ratio_to_own_adapter']:.3f}" for record in records.values()]
    return markdown_table(["task", *records], [*rows, ["mean ratio to own adapter", *means]])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1) -> str:
    """A Markdown table that also reads well as plain text: columns padded, all behind `text_columns` right-aligned."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    rule = ["-" * width if index < text_columns else "-" * (width - 1) + ":" for index, width in enumerate(widths)]
    lines = []
    for row in [header, rule, *rows]:
        padded = enumerate(zip(row, widths, strict=True))
        cells = [cell.ljust(width) if index < text_columns else cell.rjust(width) for index, (cell, width) in padded]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rendered(path: Path) -> str:
    """`evaluation_text` of a record file. Raises ConfigError for anything else."""
    try:
        return evaluation_text(read_record(path))
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is a damaged evaluation record: {type(error).__name__} {error}") from error


def read_record(path: Path) -> dict[str, Any]:
    """An evaluation record. Raises ConfigError for anything else."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read the evaluation record {path}: {error}") from error
    if not isinstance(record, dict) or "ratio_to_own_adapter" not in record:
        raise ConfigError(f"{path} is not an evaluation record; train and evaluate --out write one")
    return record
