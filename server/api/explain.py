"""Validation errors in words for people: which field, what is wrong with it, what is allowed.

Knows pydantic's error types; knows no status codes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError

from server.errors import InvalidRequestError

MAX_LISTED_PROBLEMS = 8
"""Problems spelled out in one message; a body with thousands of them gets a count of the rest."""

UNSUPPORTED_FIELD = "unsupported_field"
UNKNOWN_FIELD = "unknown_field"
"""Error types that `api/fields.py` raises; their messages are complete sentences."""

Details = Mapping[str, Any]

_EXPLANATIONS: Mapping[str, Callable[[Details], str]] = {
    "missing": lambda _: "is required",
    "bool_type": lambda p: f"must be true or false, not {_kind(p['input'])}",
    "int_type": lambda p: f"must be an integer, not {_kind(p['input'])}",
    "float_type": lambda p: f"must be a number, not {_kind(p['input'])}",
    "finite_number": lambda _: "must be a finite number",
    "string_type": lambda p: f"must be a string, not {_kind(p['input'])}",
    "list_type": lambda p: f"must be a list, not {_kind(p['input'])}",
    "dict_type": lambda p: f"must be an object, not {_kind(p['input'])}",
    "model_type": lambda p: f"must be an object, not {_kind(p['input'])}",
    "model_attributes_type": lambda p: f"must be an object, not {_kind(p['input'])}",
    "greater_than": lambda p: f"must be greater than {_number(p['ctx']['gt'])}, got {_shown(p['input'])}",
    "greater_than_equal": lambda p: f"must be at least {_number(p['ctx']['ge'])}, got {_shown(p['input'])}",
    "less_than": lambda p: f"must be less than {_number(p['ctx']['lt'])}, got {_shown(p['input'])}",
    "less_than_equal": lambda p: f"must be at most {_number(p['ctx']['le'])}, got {_shown(p['input'])}",
    "literal_error": lambda p: f"must be {p['ctx']['expected']}, got {_shown(p['input'])}",
    "enum": lambda p: f"must be {p['ctx']['expected']}, got {_shown(p['input'])}",
    "string_pattern_mismatch": lambda p: f"must match {p['ctx']['pattern']}",
    "too_short": lambda p: f"must have at least {p['ctx']['min_length']} {_units(p['input'])}",
    "too_long": lambda p: f"must have at most {p['ctx']['max_length']} {_units(p['input'])}",
}


def explain_validation(error: RequestValidationError) -> InvalidRequestError:
    """One error for all problems of a body; `param` is the first offending field."""
    problems = error.errors()
    if not problems:
        return InvalidRequestError("The request body is not valid.")
    if problems[0]["type"] == "json_invalid":
        position, reason = problems[0]["loc"][-1], problems[0]["ctx"]["error"]
        return InvalidRequestError(
            f"The request body is not valid JSON: {reason} at character {position}.", code="invalid_json"
        )
    listed = [explain_problem(problem) for problem in problems[:MAX_LISTED_PROBLEMS]]
    if rest := len(problems) - len(listed):
        listed.append(f"and {rest} more problems")
    first = problems[0]
    code = first["type"] if first["type"] in (UNSUPPORTED_FIELD, UNKNOWN_FIELD) else None
    return InvalidRequestError("; ".join(listed), param=field_path(first["loc"]), code=code)


def explain_problem(problem: Details) -> str:
    """`temperature must be at most 2, got 3`."""
    path = field_path(problem["loc"])
    if path is None and problem["type"] == "missing":
        return "the request needs a JSON body"
    return f"{path or 'the request body'} {reason_of(problem)}"


def reason_of(problem: Details) -> str:
    """What is wrong, without the field: `must be at most 2, got 3`."""
    explain = _EXPLANATIONS.get(problem["type"])
    return str(problem["msg"]) if explain is None else explain(problem)


def field_path(location: Sequence[str | int]) -> str | None:
    """`messages[0].content` for ("body", "messages", 0, "content"); None for the body itself."""
    path = ""
    for part in location:
        if part == "body" and not path:
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path or None


def _kind(value: object) -> str:
    names = {
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return "null" if value is None else names.get(type(value), "something else")


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _units(value: object) -> str:
    return "characters" if isinstance(value, str) else "entries"


def _shown(value: object) -> str:
    """A short value as it was sent; long ones are not worth repeating."""
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{_kind(value)} of {len(shown)} characters"
