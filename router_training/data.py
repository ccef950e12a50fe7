"""Chat-JSONL folders to labelled chats: reading, checking, balanced sampling, digest. Knows no tokens and no model.

Layout: DATA/<adapter name>/{train,validation}.jsonl, one `{"task", "messages": [{"role", "content"}, ...]}` a line.
The adapter that a chat belongs to is the one its folder is named after. Several DATA folders may share the tasks.
"""

import codecs
import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from server.errors import LoraMixerError

Split = Literal["train", "validation"]

MAX_LISTED_PROBLEMS = 50
"""A broken export can have a problem on every line; the first ones tell enough."""


class TrainingDataError(LoraMixerError):
    """The data cannot be trained on. `problems` holds every problem with file and line."""

    default_code = "invalid_training_data"

    def __init__(self, problems: Sequence[str]) -> None:
        listed = list(problems[:MAX_LISTED_PROBLEMS])
        if len(problems) > len(listed):
            listed.append(f"and {len(problems) - len(listed)} more")
        super().__init__("the training data has problems:\n  " + "\n  ".join(listed))
        self.problems = tuple(problems)


ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""What the template is given for the role of a message, as when serving."""
SURROGATE = re.compile("[\ud800-\udfff]")
"""JSON escapes can spell half of a UTF-16 pair; no tokenizer takes it."""


@dataclass(frozen=True)
class Chat:
    """One example: the last message is the answer that counts."""

    task: str
    """Name of the adapter it belongs to."""
    messages: tuple[Mapping[str, str], ...]
    origin: str
    """`file:line`, for messages to people."""
    tests: tuple[str, ...] = ()
    """Assertions that a generated program must pass (field `tests` of the line); task metrics use them."""


def read_splits(
    data: Sequence[Path], tasks: Sequence[str], splits: Sequence[Split] = ("train", "validation")
) -> dict[Split, dict[str, list[Chat]]]:
    """Every chat by split and task, in file order; each task is in one of the folders `data`.

    Raises TrainingDataError with all problems of all files, a task that two folders have among them.
    """
    problems: list[str] = []
    folders = {task: _folder_of(task, data, problems) for task in tasks}
    chats: dict[Split, dict[str, list[Chat]]] = {
        split: {task: read_chats(folders[task] / f"{split}.jsonl", task, problems) for task in tasks}
        for split in splits
    }
    if problems:
        raise TrainingDataError(problems)
    return chats


def balanced_sample(chats: Mapping[str, Sequence[Chat]], count: int, seed: int) -> list[Chat]:
    """`count` chats in shuffled order, tasks as equal in number as `count` allows.

    A task with fewer chats than its share repeats them, every chat once before any twice. Any prefix of the result
    is itself nearly balanced: tasks take turns, in an order drawn anew each round.
    """
    generator = random.Random(seed)
    decks: dict[str, list[Chat]] = {task: [] for task in chats}
    sample: list[Chat] = []
    while len(sample) < count:
        turn = sorted(chats)
        generator.shuffle(turn)
        for task in turn[: count - len(sample)]:
            if not decks[task]:
                decks[task] = list(chats[task])
                generator.shuffle(decks[task])
            sample.append(decks[task].pop())
    return sample


def data_digest(chats: Sequence[Chat]) -> str:
    """sha256 over tasks and messages in order: what a router was trained on, whatever the file layout."""
    sha = hashlib.sha256()
    for chat in chats:
        content = [chat.task, [dict(message) for message in chat.messages]]
        sha.update(json.dumps(content, sort_keys=True, ensure_ascii=False).encode())
        sha.update(b"\n")
    return sha.hexdigest()


def has_task(data: Sequence[Path], task: str) -> bool:
    """Whether one of the folders `data` has chats of this task."""
    return any((folder / task).is_dir() for folder in data)


def task_folders(data: Sequence[Path]) -> list[str]:
    """Names of all tasks in the folders `data`, sorted. Raises TrainingDataError for a folder that cannot be listed."""
    names: set[str] = set()
    for folder in data:
        try:
            names |= {path.name for path in folder.iterdir() if path.is_dir()}
        except OSError as error:
            raise TrainingDataError([f"{folder}: not a readable folder ({error.strerror})"]) from error
    return sorted(names)


def read_chats(path: Path, task: str, problems: list[str]) -> list[Chat]:
    """The chats of one file, all of `task`, in file order; `problems` gets whatever is wrong with it."""
    try:
        # As bytes, so that what is no UTF-8 is found by line. A byte order mark is not part of the first one.
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        problems.append(f"{path}: adapter {task!r} has no readable samples ({error})")
        return []
    chats = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        origin = f"{path}:{number}"
        found = _check_line(line)
        if isinstance(found, str):
            problems.append(f"{origin}: {found}")
        else:
            messages, tests = found
            chats.append(Chat(task, messages, origin, tests))
    if not any(line.strip() for line in lines):
        problems.append(f"{path}: the file is empty, so adapter {task!r} has no samples")
    return chats


def _folder_of(task: str, data: Sequence[Path], problems: list[str]) -> Path:
    """Where the chats of a task are; where they should be, if nowhere."""
    found = [folder / task for folder in data if (folder / task).is_dir()]
    if len(found) > 1:
        listed = " and ".join(map(str, found))
        problems.append(f"{listed}: both hold chats of {task!r}; join them into one, or name fewer folders")
    return found[0] if found else data[0] / task


def _check_line(line: bytes) -> tuple[tuple[Mapping[str, str], ...], tuple[str, ...]] | str:
    """The messages and tests of a line, or what is wrong with it."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return f"not UTF-8 ({error.reason} at byte {error.start + 1} of the line)"
    except ValueError as error:
        return f"not JSON ({error})"
    except RecursionError:
        return "not a chat: brackets are nested too deeply to read"
    if not isinstance(row, dict):
        return "not a JSON object"
    if "messages" not in row:
        return "field 'messages' is missing"
    messages = row["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
        return "'messages' must be a list of at least a question and an answer"
    for index, message in enumerate(messages):
        if problem := _check_message(message):
            return f"messages[{index}]: {problem}"
    if messages[-1]["role"] != "assistant":
        return f"the last message must be the assistant's, not the {messages[-1]['role']}'s"
    if not messages[-1]["content"].strip():
        return "the answer is empty"
    tests = [] if row.get("tests") is None else row["tests"]
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        return "'tests' must be a list of strings"
    return tuple({"role": ROLES[message["role"]], "content": message["content"]} for message in messages), tuple(tests)


def _check_message(message: Any) -> str | None:
    if not isinstance(message, dict):
        return "not a JSON object"
    missing = [name for name in ("role", "content") if name not in message]
    if missing:
        return f"field {' and '.join(map(repr, missing))} is missing"
    if not isinstance(message["role"], str) or not isinstance(message["content"], str):
        return "'role' and 'content' must be strings"
    if message["role"] not in ROLES:
        return f"role {message['role']!r} is none of {', '.join(ROLES)}"
    if SURROGATE.search(message["content"]):
        return "the text holds half of a surrogate pair (\\ud800 to \\udfff), which is no character"
    return None
