"""JSON as strangers send it: size-capped, no duplicate keys, no NaN, no deep nesting. Knows nothing about adapters."""

import json
from typing import Any

MAX_DEPTH = 32
"""Deepest nesting of brackets: adapter configs use 3, safetensors headers 3."""


class StrictJsonError(ValueError):
    """The text is not acceptable JSON; the message says why, in words fit for an adapter's author."""


def parse_object(data: bytes, *, max_bytes: int) -> dict[str, Any]:
    """Parse one JSON object. Raises StrictJsonError when it is too large, malformed, ambiguous or no object."""
    if len(data) > max_bytes:
        raise StrictJsonError(f"it has {len(data)} bytes, more than the limit of {max_bytes}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StrictJsonError(f"it is not UTF-8 text (byte {error.start})") from error
    if _depth(text) > MAX_DEPTH:
        raise StrictJsonError(f"it nests deeper than {MAX_DEPTH} levels")
    try:
        parsed = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except StrictJsonError:
        raise
    except ValueError as error:
        raise StrictJsonError(f"it is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise StrictJsonError(f"it holds a {type(parsed).__name__}, not an object")
    return parsed


def _depth(text: str) -> int:
    """Upper bound of the nesting: brackets inside strings count too, which only ever errs towards refusing."""
    depth = deepest = 0
    for character in text:
        if character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise StrictJsonError(f"the key {key[:100]!r} appears twice")
        result[key] = value
    return result


def _refuse_constant(text: str) -> Any:
    raise StrictJsonError(f"{text} is not a JSON number")
