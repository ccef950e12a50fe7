"""Reads a configuration file strictly, and says in its reader's words what is wrong with a value. Knows no setting."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from server.errors import ConfigError

MAX_DEPTH = 32
"""Deepest nesting of lists and mappings; adapters.yaml has 3, a study's plan 5."""

_PLAIN_WORDS = {
    "tuple_type": "must be a list",
    "model_type": "must be a mapping",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "finite_number": "must be a finite number",
}
"""Kinds of problem that pydantic words in terms of Python."""


class Frozen(BaseModel):
    """Part of a configuration: unknown keys are errors, numbers finite, nothing changes after it is read."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, field: ValidationInfo) -> Any:
        """Python takes true for 1, so that `port: true` would be a port."""
        if isinstance(value, bool) and cls.model_fields[str(field.field_name)].annotation is not bool:
            raise PydanticCustomError("boolean", "must not be true or false")
        return value


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML forbids repeated keys, yet PyYAML lets the last one win: half of such a file would be ignored in silence.

    Nesting is bounded, because PyYAML calls itself for each level, until Python ends it with a RecursionError.
    """

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            where = None if parent is None else parent.start_mark
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=where)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.MarkedYAMLError(problem=f"the key {key[1]!r} appears twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read_mapping(path: Path) -> dict[str, Any]:
    """The file's mapping; an empty one for a file of nothing but comments. Raises ConfigError."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}. Pass --config with the path of an adapters.yaml."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping with the keys base_model, router, adapters, server")
    return content


def explain(problem: Mapping[str, Any], known_keys: Sequence[str]) -> str:
    """One entry of a ValidationError's `errors()`: its place, and an unknown key with its nearest known one.

    `known_keys` are those that may stand where the problem is.
    """
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        return f"{place}: {_PLAIN_WORDS.get(problem['type'], problem['msg'])}"
    nearest = difflib.get_close_matches(str(problem["loc"][-1]), known_keys, n=1)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else f"; known keys: {', '.join(sorted(known_keys))}"
    return f"unknown key '{place}'{hint}"
