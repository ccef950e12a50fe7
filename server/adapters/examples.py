"""Examples of what an adapter is for: prompts or whole chats, from a request or from `examples.jsonl` beside it.

Reading, checking and encoding; knows no router.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from server.errors import InvalidRequestError

EXAMPLES_NAME = "examples.jsonl"
MIN_EXAMPLES = 2
"""Different ones. One alone tells nothing of what examples have in common, and cannot judge a row made without it."""
MAX_EXAMPLES = 64
MAX_FILE_BYTES = 4 * 2**20
"""64 chats of ordinary length are a hundredth of this."""
MAX_EXAMPLE_BYTES = MAX_FILE_BYTES // MAX_EXAMPLES
"""A thousand tokens are some 5,000 bytes, and fewer are computed."""
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
    source: str = field(default="", compare=False, repr=False)
    """The chat as one line of JSON, to be encoded anew after a restart."""


EncodeExamples = Callable[[Sequence[Any]], tuple[Example, ...]]
"""Raw examples to encoded ones. Raises InvalidRequestError naming every problem."""


def encode_examples(
    raw: Sequence[Any], tokenizer: ChatRenderer, *, vocab_size: int | None = None
) -> tuple[Example, ...]:
    """2 to 64 examples, each a prompt, `{"prompt": text}` or `{"messages": [...]}`, rendered as a request would be.
    What is given twice counts once. Tokens from `vocab_size` on are none of the model's, if it is given.

    Raises InvalidRequestError(param="examples") that names every problem by its index.
    """
    if not MIN_EXAMPLES <= len(raw) <= MAX_EXAMPLES:
        message = f"{len(raw)} examples; give {MIN_EXAMPLES} to {MAX_EXAMPLES}, or none"
        raise InvalidRequestError(message, param="examples", code="invalid_examples")
    chats, problems = [], []
    for index, value in enumerate(raw):
        messages = _messages(value)
        checked = messages if isinstance(messages, str) else _with_source(messages)
        if isinstance(checked, str):
            problems.append(f"examples[{index}] {checked}")
        else:
            chats.append(checked)
    if problems:
        raise InvalidRequestError("; ".join(problems[:10]), param="examples", code="invalid_examples")
    template = tokenizer.render_chat([{"role": "user", "content": ""}])
    encoded = [_encode(chat, source, tokenizer, template) for chat, source in chats]
    for index, example in enumerate(encoded):
        if vocab_size is not None and max(example.token_ids, default=-1) >= vocab_size:
            message = f"has token {max(example.token_ids)} of the tokenizer, and the model knows ids below {vocab_size}"
            raise InvalidRequestError(f"examples[{index}] {message}", param="examples", code="invalid_examples")
    examples = tuple(dict.fromkeys(encoded))
    if len(examples) < MIN_EXAMPLES:
        message = f"all {len(raw)} examples are the same; give {MIN_EXAMPLES} to {MAX_EXAMPLES} different ones"
        raise InvalidRequestError(message, param="examples", code="invalid_examples")
    return examples


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
    return read_lines(path, MAX_FILE_BYTES) if path.is_file() else None


def read_lines(path: Path, max_bytes: int) -> list[Any]:
    """The JSON values of a file, one a line, empty lines left out. Raises InvalidRequestError naming the line."""
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise ValueError(f"it has more than {max_bytes} bytes")
        lines = content.decode("utf-8").split("\n")
    except (OSError, ValueError) as error:
        message = f"{path.name} cannot be used: {error}"
        raise InvalidRequestError(message, param="examples", code="invalid_examples") from error
    values = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            message = f"{path.name}, line {number} is not JSON: {error}"
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


def _with_source(messages: list[Message]) -> tuple[list[Message], str] | str:
    """The messages and their line of JSON, or what is wrong with them."""
    try:
        source = json.dumps({"messages": messages}, ensure_ascii=False)
        size_bytes = len(source.encode("utf-8"))
    except UnicodeEncodeError:
        return "holds half a surrogate pair, which is no text"
    if size_bytes > MAX_EXAMPLE_BYTES:
        return (
            f"has {size_bytes} bytes, more than the limit of {MAX_EXAMPLE_BYTES}; {MAX_TOKENS} tokens of it would count"
        )
    return messages, source


def _encode(messages: list[Message], source: str, tokenizer: ChatRenderer, template: Sequence[int]) -> Example:
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
    return Example((*prompt, *answer), start, len(prompt), source)
