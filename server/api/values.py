"""Field values that come in several shapes, brought into one: stop strings, prompts, message content, adapter pools.

Each parser raises pydantic's custom error with words that follow the field's name.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import PlainValidator

from server.api.explain import UNKNOWN_FIELD
from server.api.fields import Text, problem
from server.routing.policy import BASE_ALIAS

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
"""A longer stop string would hold back that much text on every stream."""
MAX_ADAPTERS_IN_REQUEST = 4096
MAX_ADAPTER_WEIGHT = 2.0
MAX_CONTENT_PARTS = 1024
MAX_LOGIT_BIASES = 16384
MAX_PROMPTS = 4096
"""Entries that are looked at; how many may be computed is checked where that is known."""
TOKEN_ID_LIMIT = 2**31
"""Beyond any vocabulary; the exact range is checked where the vocabulary is known."""

PromptInput = str | list[int]
"""One prompt of a completions request: text or token ids."""


def _parse_stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise problem("must be a string or a list of strings")
    if len(stops) > MAX_STOP_STRINGS:
        raise problem(f"must have at most {MAX_STOP_STRINGS} entries, got {len(stops)}")
    if any(not stop for stop in stops):
        raise problem("must not hold an empty string")
    if any(len(stop) > MAX_STOP_CHARACTERS for stop in stops):
        raise problem(f"must hold strings of at most {MAX_STOP_CHARACTERS} characters")
    return tuple(_unicode(stop) for stop in stops)


def _parse_prompts(value: Any) -> list[PromptInput]:
    if isinstance(value, str):
        return [_unicode(value)]
    if not isinstance(value, list):
        raise problem("must be a string, a list of strings, a list of token ids or a list of lists of token ids")
    if not value:
        raise problem("must not be an empty list")
    if type(value[0]) is int:
        return [_token_ids(value, "")]
    if len(value) > MAX_PROMPTS:
        raise problem(f"must have at most {MAX_PROMPTS} entries, got {len(value)}")
    return [_parse_prompt(entry, index) for index, entry in enumerate(value)]


def _parse_prompt(entry: Any, index: int) -> PromptInput:
    if isinstance(entry, str):
        return _unicode(entry)
    if isinstance(entry, list):
        return _token_ids(entry, f" in entry {index}")
    raise problem(f"must hold strings or lists of token ids; entry {index} is neither")


def _token_ids(ids: list[Any], where: str) -> list[int]:
    if not ids:
        raise problem(f"must not hold an empty list of token ids{where}")
    return _checked_ids(ids, where)


def _parse_token_ids(value: Any) -> list[int]:
    if not isinstance(value, list):
        raise problem("must be a list of token ids")
    return _checked_ids(value, "")


def _checked_ids(ids: list[Any], where: str) -> list[int]:
    for position, token_id in enumerate(ids):
        if type(token_id) is not int or not 0 <= token_id < TOKEN_ID_LIMIT:
            raise problem(f"must hold non-negative integers as token ids{where}; the one at {position} is not")
    return ids


def _parse_content(value: Any) -> str:
    """Message text; several text parts are joined by newlines, as vLLM does."""
    if isinstance(value, str):
        return _unicode(value)
    if not isinstance(value, list):
        raise problem("must be a string or a list of text parts")
    if not 0 < len(value) <= MAX_CONTENT_PARTS:
        raise problem(f"must have 1 to {MAX_CONTENT_PARTS} parts")
    return "\n".join(_part_text(part, index) for index, part in enumerate(value))


def _part_text(part: Any, index: int) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind is None:
        raise problem(f"must hold objects with a type; part {index} has none")
    if kind != "text":
        raise problem(f"part {index} has type {str(kind)[:40]!r}, which is not supported: this server reads text only")
    foreign = [name for name, value in part.items() if name not in ("type", "text") and value is not None]
    if foreign:
        raise problem(f"part {index} has the field {foreign[0][:64]!r}, which is not a known field", UNKNOWN_FIELD)
    if not isinstance(part.get("text"), str):
        raise problem(f"part {index} must have a text, as a string")
    return _unicode(part["text"])


def _parse_adapters(value: Any) -> list[str] | dict[str, float]:
    if not isinstance(value, list | dict):
        raise problem("must be a list of adapter names or an object of adapter weights")
    if not 0 < len(value) <= MAX_ADAPTERS_IN_REQUEST:
        raise problem(f"must name 1 to {MAX_ADAPTERS_IN_REQUEST} adapters")
    if not all(isinstance(name, str) and name for name in value):
        raise problem("must hold adapter names, as strings")
    if isinstance(value, dict):
        if BASE_ALIAS in value:
            raise problem(f"must not weigh {BASE_ALIAS!r}: the base model is always there, and weights add to it")
        return {_unicode(name): _adapter_weight(name, weight) for name, weight in value.items()}
    if len(set(value)) < len(value):
        raise problem("must not name an adapter twice")
    return [_unicode(name) for name in value]


def _adapter_weight(name: str, weight: Any) -> float:
    if not _is_number_within(weight, 0, MAX_ADAPTER_WEIGHT):
        raise problem(f"weight of {name[:96]!r} must be a finite number from 0 to {MAX_ADAPTER_WEIGHT:g}")
    return float(weight)


def _parse_logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict):
        raise problem("must be an object of token ids and biases")
    if len(value) > MAX_LOGIT_BIASES:
        raise problem(f"must have at most {MAX_LOGIT_BIASES} entries, got {len(value)}")
    return tuple((_bias_key(key), _bias(key, bias)) for key, bias in value.items())


def _bias_key(key: str) -> int:
    if not (key.isascii() and key.isdigit()) or len(key) > 10 or str(int(key)) != key:
        raise problem(f"key {key[:40]!r} must be a token id")
    return int(key)


def _bias(key: str, bias: Any) -> float:
    if not _is_number_within(bias, -100, 100):
        raise problem(f"value of {key!r} must be a number from -100 to 100")
    return float(bias)


def _is_number_within(value: Any, least: float, most: float) -> bool:
    """False for NaN and infinities, and for integers that no float can hold, which `math.isfinite` would raise for."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _unicode(value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise problem("is not valid Unicode: it holds a lone surrogate") from None
    return value


StopStrings = Annotated[tuple[str, ...], PlainValidator(_parse_stop, json_schema_input_type=Text | list[Text])]
Prompts = Annotated[
    list[PromptInput],
    PlainValidator(_parse_prompts, json_schema_input_type=Text | list[Text] | list[int] | list[list[int]]),
]
TokenIds = Annotated[list[int], PlainValidator(_parse_token_ids, json_schema_input_type=list[int])]
Content = Annotated[str, PlainValidator(_parse_content, json_schema_input_type=Text | list[Mapping[str, Text]])]
AdapterPool = Annotated[
    list[str] | dict[str, float],
    PlainValidator(_parse_adapters, json_schema_input_type=list[Text] | dict[str, float]),
]
LogitBias = Annotated[
    tuple[tuple[int, float], ...], PlainValidator(_parse_logit_bias, json_schema_input_type=dict[str, float])
]
