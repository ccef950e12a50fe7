"""A set of its own for the evaluation: validation questions asked in other ways than the data's. Measures nothing."""

import hashlib
import json
from collections.abc import Mapping, Sequence

from router_training.data import Chat
from router_training.phrasings import Phrasing, phrase_some
from router_training.settings import BASE_NAME
from server.errors import ConfigError

PHRASED_SEED = 0
"""Which template a question gets: one fixed draw, so that records compare, and the one of `lora-mixer-train phrase`."""


def ask_anew(chats: Mapping[str, Sequence[Chat]], phrasings: Mapping[str, Phrasing]) -> dict[str, list[Chat]]:
    """By task in the order of `chats`, every chat that can be read, its question in one of the task's templates.

    A task's chats are asked alike whatever other tasks there are and however many chats follow. Raises ConfigError for
    phrasings of a task without chats, and where no question of an adapter's task can be read.
    """
    if unknown := sorted(task for task in phrasings if not chats.get(task)):
        raise ConfigError(f"there are phrasings of {', '.join(unknown)}, but no validation chats")
    result = {}
    for task, rows in chats.items():
        phrased, _ = phrase_some(rows, phrasings, 1.0, PHRASED_SEED)
        # A chat that nothing can read comes back as it was.
        if anew := [after for before, after in zip(rows, phrased, strict=True) if after is not before]:
            result[task] = anew
    if not result.keys() - {BASE_NAME}:
        raise ConfigError("the phrasings cannot read a single validation question of an adapter's task")
    return result


def phrasings_digest(phrasings: Mapping[str, Phrasing]) -> str:
    """sha256 over tasks, patterns and templates: changes with whatever a file says, not with its comments."""
    content = {task: [[pattern.pattern for pattern in one.read], one.write] for task, one in phrasings.items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
