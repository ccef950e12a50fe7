"""Examples of what an adapter is for: prompts or whole chats, from a request or from `examples.jsonl` beside it.

Reading, checking and encoding; knows no router.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from server.errors import InvalidRequestError

EXAMPLES_NAME = "examples.jsonl"
MIN_EXAMPLES = 2
"""One alone tells nothing of what the examples have in common."""
MAX_EXAMPLES = 64
MAX_FILE_BYTES = 4 * 2**20
"""64 chats of ordinary length are a hundredth of this."""
MAX_TOKENS = 192
"""Tokens computed per example: what one step between two of the running requests' may cost."""
_ROLES = ("system", "user", "assistant")

Message = dict[str, str]


class ChatRenderer(Protocol):
    """What encoding needs of `model.tokenizer.ChatTokenizer`."""

    def render_chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class Example:
    """One rendered chat."""

    token_ids: tuple[int, ...]
    start: int
    """First token that another chat would not begin with as well: what the template always prints is no evidence."""
    answer_start: int
    """First token of the answer; the number of tokens when it is a prompt only."""


EncodeExamples = Callable[[Sequence[Any]], tuple[Example, ...]]
"""Raw examples to encoded ones. Raises InvalidRequestError naming every problem."""


def encode_examples(raw: Sequence[Any], tokenizer: ChatRenderer) -> tuple[Example, ...]:
    """2 to 64 examples, each a prompt, `{"prompt": text}` or `{"messages": [...]}`, rendered as a request would be.

    Raises InvalidRequestError(param="examples") that names every problem by its index.
    """
    if not MIN_EXAMPLES <= len(raw) <= MAX_EXAMPLES:
        message = f"{len(raw)} examples; give {MIN_EXAMPLES} to {MAX_EXAMPLES}, or none"
        raise InvalidRequestError(message, param="examples", code="invalid_examples")
    chats, problems = [], []
    for index, value in enumerate(raw):
        found = _messages(value)
        if isinstance(found, str):
            problems.append(f"examples[{index}] {found}")
        else:
            chats.append(found)
    if problems:
        raise InvalidRequestError("; ".join(problems[:10]), param="examples", code="invalid_examples")
    template = tokenizer.render_chat([{"role": "user", "content": ""}])
    return tuple(_encode(chat, tokenizer, template) for chat in chats)


@dataclass(frozen=True)
class ExamplesFile:
    """Where the source of an adapter has examples, or may have."""

    folder: Path | None = None
    """None: it has none."""
    link_root: Path | None = None
    """Folder that a link may lead into, such as the Hub's cache; None: a link is no examples file."""
    problem: str | None = None
    """Why its examples could not be had."""

    def read(self) -> list[Any] | None:
        """As `read_examples`; also raises InvalidRequestError when they could not be had."""
        if self.problem is not None:
            raise InvalidRequestError(self.problem, param="examples", code="invalid_examples")
        return None if self.folder is None else read_examples(self.folder, self.link_root)


NO_EXAMPLES = ExamplesFile()


def read_examples(folder: Path, link_root: Path | None = None) -> list[Any] | None:
    """Raw examples of `examples.jsonl` in an adapter's folder, one JSON value a line; None where there is no file.

    A link counts only if it leads into `link_root`. Raises InvalidRequestError naming the line.
    """
    path = folder / EXAMPLES_NAME
    if path.is_symlink() and (link_root is None or not path.resolve().is_relative_to(link_root.resolve())):
        return None
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
        lines = content.decode("utf-8").split("\n")
    except (OSError, ValueError) as error:
        message = f"{EXAMPLES_NAME} cannot be used: {error}"
        raise InvalidRequestError(message, param="examples", code="invalid_examples") from error
    values = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            message = f"{EXAMPLES_NAME}, line {number} is not JSON: {error}"
            raise InvalidRequestError(message, param="examples", code="invalid_examples") from error
    return values


def _messages(value: Any) -> list[Message] | str:
    """The messages of one example, or what is wrong with it."""
    if isinstance(value, dict) and set(value) == {"prompt"}:
        value = value["prompt"]
    if isinstance(value, str):
        return [{"role": "user", "content": value}] if value.strip() else "is an empty prompt"
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        return "must be a prompt, {'prompt': text} or {'messages': [...]} with at least one message"
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            return f"messages[{position}] must be an object with the strings 'role' and 'content'"
        if message["role"] not in _ROLES:
            return f"messages[{position}].role must be one of {', '.join(_ROLES)}"
    if messages[0]["role"] == "assistant" or not any(message["content"].strip() for message in messages):
        return "must begin with a system or user message and hold some text"
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _encode(messages: list[Message], tokenizer: ChatRenderer, template: Sequence[int]) -> Example:
    """A chat whose last message is the assistant's has an answer; any other is a prompt."""
    is_answered = messages[-1]["role"] == "assistant"
    prompt = tokenizer.render_chat([*messages[:-1]] if is_answered else [*messages])
    answer: list[int] = []
    if is_answered:
        whole = tokenizer.render_chat([*messages], add_generation_prompt=False)
        if whole[: len(prompt)] != prompt:
            message = "the chat template does not put the answer of an example behind its prompt; send prompts only"
            raise InvalidRequestError(message, param="examples", code="invalid_examples")
        answer = whole[len(prompt) :]
    answer = answer[: max(MAX_TOKENS // 2, MAX_TOKENS - len(prompt))]
    if len(prompt) > (kept := MAX_TOKENS - len(answer)):
        # The middle goes: the template's beginning and the generation prompt stay.
        prompt = prompt[: kept // 2] + prompt[len(prompt) - (kept - kept // 2) :]
    start = next((i for i, pair in enumerate(zip(prompt, template, strict=False)) if pair[0] != pair[1]), 0)
    return Example((*prompt, *answer), start, len(prompt))
