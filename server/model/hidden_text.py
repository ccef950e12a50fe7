"""Keeps what users typed apart from the control tokens of a chat template.

Control tokens spelled out in a message are swapped for single private-use characters before the template runs and
put back as literal text afterwards (a message must not open a turn of its own: CVE-2026-44222 in vLLM). Knows
neither templates nor tokenizers.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from server.errors import InvalidRequestError

_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
"""Unicode promises never to give these code points a meaning."""


class ControlTexts:
    """The spellings of a tokenizer's control tokens, and what of a string could be read as one."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.whole = re.compile(_any_of(texts)) if texts else None
        # Of a control token that a template could make by joining a string with its neighbour.
        self.beginnings = frozenset(text[:length] for text in texts for length in range(1, len(text)))
        self.endings = frozenset(text[length:] for text in texts for length in range(1, len(text)))
        self.max_length = max(map(len, texts), default=0)


class HiddenText:
    """Which dangerous texts of one chat are hidden behind which stand-in. False when nothing had to be hidden."""

    def __init__(self, control: ControlTexts, messages: Sequence[dict[str, Any]]) -> None:
        self._control = control
        self._free = _unused_characters(messages)
        self._stand_in_of: dict[str, str] = {}
        self.messages: list[dict[str, Any]] = _map_strings(list(messages), self._hide)
        """The chat, safe to give to a template."""

    def __bool__(self) -> bool:
        return bool(self._stand_in_of)

    def reveal(self, text: str) -> str:
        """Put what was hidden back into rendered text."""
        for hidden, stand_in in self._stand_in_of.items():
            text = text.replace(stand_in, hidden)
        return text

    def _hide(self, text: str) -> str:
        if self._control.whole is not None:
            text = self._control.whole.sub(lambda match: self._stand_in(match[0]), text)
        for length in range(min(len(text), self._control.max_length), 0, -1):
            if text[:length] in self._control.endings:
                text = self._stand_in(text[:length]) + text[length:]
                break
        for length in range(min(len(text), self._control.max_length), 0, -1):
            if text[-length:] in self._control.beginnings:
                return text[:-length] + self._stand_in(text[-length:])
        return text

    def _stand_in(self, text: str) -> str:
        if text not in self._stand_in_of:
            stand_in = next(self._free, None)
            if stand_in is None:
                raise InvalidRequestError("messages use every private-use character of Unicode", param="messages")
            self._stand_in_of[text] = stand_in
        return self._stand_in_of[text]


def _unused_characters(messages: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Private-use characters that occur in no message; reads the messages when the first one is taken."""
    used = set("".join(_strings(messages)))
    yield from (chr(code) for codes in _PRIVATE_USE for code in codes if chr(code) not in used)


def _any_of(texts: Sequence[str]) -> str:
    """Pattern for the longest of many strings; looks at each character of the input once per start, however many."""
    rest_after: dict[str, list[str]] = {}
    for text in sorted(texts):
        if text:
            rest_after.setdefault(text[0], []).append(text[1:])
    branches = [re.escape(first) + _any_of(rests) for first, rests in rest_after.items()]
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)}){'?' if '' in texts else ''}"


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _strings(key)
            yield from _strings(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _strings(value)


def _map_strings(content: Any, change: Any) -> Any:
    if isinstance(content, str):
        return change(content)
    if isinstance(content, dict):
        return {_map_strings(key, change): _map_strings(value, change) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_map_strings(value, change) for value in content]
    return content
