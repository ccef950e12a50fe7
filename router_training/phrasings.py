"""Other ways to ask the questions of a task, from a file: a question is taken apart and put together anew.

A router reads how tasks are asked as well as what they are; data in three templates teaches it three templates. The
question's parts, its answer and its label stay as they are.
"""

import json
import random
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from router_training.data import Chat, Split, read_splits, task_folders
from server.errors import ConfigError

FIELD = re.compile(r"\{([A-Za-z_]\w*)\}")


@dataclass(frozen=True)
class Phrasing:
    """How one task's questions are read and written."""

    read: tuple[re.Pattern[str], ...]
    """Each takes a whole question apart into named groups; the first that matches counts."""
    write: tuple[str, ...]
    """Templates with `{group}` for the parts; other braces are text."""

    def apply(self, question: str, generator: random.Random) -> str | None:
        """The question in one of the templates; None if nothing can read it."""
        matches = (pattern.fullmatch(question) for pattern in self.read)
        if (found := next((match for match in matches if match), None)) is None:
            return None
        parts = found.groupdict(default="")
        return FIELD.sub(lambda field: parts.get(field[1], field[0]), generator.choice(self.write))


def read_phrasings(path: Path) -> dict[str, Phrasing]:
    """By task. Raises ConfigError with everything that is wrong with the file."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({error})") from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{path}: expected a mapping of tasks, each with the lists `read` and `write`")
    problems: list[str] = []
    phrasings = {str(task): _phrasing(str(task), entry, problems) for task, entry in content.items()}
    if problems:
        raise ConfigError(f"{path}: {'; '.join(problems)}")
    return phrasings


def phrase_some(
    chats: Sequence[Chat], phrasings: Mapping[str, Phrasing], fraction: float, seed: int
) -> tuple[list[Chat], int]:
    """The chats in order, `fraction` of those that can be read asked anew, and how many these are.

    The last question of a chat is the one that changes. Which ones and how follows from `seed`.
    """
    generator = random.Random(f"phrase {seed}")
    result, count = [], 0
    for chat in chats:
        *history, question, answer = chat.messages
        phrasing = phrasings.get(chat.task)
        chosen = generator.random() < fraction
        content = phrasing.apply(question["content"], generator) if phrasing and chosen else None
        if content is None:
            result.append(chat)
            continue
        count += 1
        result.append(replace(chat, messages=(*history, {**question, "content": content}, answer)))
    return result, count


def phrase_data(
    data: Sequence[Path],
    phrasings: Mapping[str, Phrasing],
    out: Path,
    splits: Collection[Split],
    fraction: float,
    seed: int,
) -> dict[str, tuple[int, int]]:
    """Copy task folders to `out`, with chats of `splits` asked anew; per task how many were, of how many in `splits`.

    Everything is read and checked before anything is written. Raises TrainingDataError, and ConfigError for phrasings
    of a task that there is no data of and for an `out` among the data, where it would replace them or pass for a task.
    """
    tasks = task_folders(data)
    problems = [
        f"{out} is in the data folder {folder}; name a folder outside it for the copies"
        for folder in data
        if out.resolve().is_relative_to(folder.resolve())
    ]
    if unknown := sorted(set(phrasings) - set(tasks)):
        problems.append(f"there are phrasings of {', '.join(unknown)}, but no such folder in the data")
    if problems:
        raise ConfigError("; ".join(problems))
    chats = read_splits(data, tasks)
    counts = {}
    for task in tasks:
        phrased = total = 0
        for split, rows in ((split, chats[split][task]) for split in chats):
            if split in splits:
                rows, count = phrase_some(rows, phrasings, fraction, seed)
                phrased, total = phrased + count, total + len(rows)
            _write(rows, out / task / f"{split}.jsonl")
        counts[task] = (phrased, total)
    return counts


def _write(chats: Sequence[Chat], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"task": chat.task, "messages": list(chat.messages), **({"tests": list(chat.tests)} if chat.tests else {})}
        for chat in chats
    ]
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")


def _phrasing(task: str, entry: Any, problems: list[str]) -> Phrasing:
    known = {"read", "write"}
    if not isinstance(entry, dict) or set(entry) != known or not all(_texts(entry[key]) for key in known):
        problems.append(f"{task}: expected the lists `read` and `write`, each of at least one text")
        return Phrasing((), ())
    patterns = []
    for text in entry["read"]:
        try:
            patterns.append(re.compile(text, re.DOTALL))
        except re.error as error:
            problems.append(f"{task}: {text!r} is no regular expression ({error})")
    for template in entry["write"]:
        fields = set(FIELD.findall(template))
        if not fields:
            problems.append(f"{task}: {template!r} has no part of the question in it")
        for pattern in patterns:
            if lost := fields - set(pattern.groupindex):
                problems.append(f"{task}: {template!r} needs {sorted(lost)}, which {pattern.pattern!r} does not name")
    return Phrasing(tuple(patterns), tuple(entry["write"]))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text for text in value)
