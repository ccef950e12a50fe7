"""adapter_config.json -> PeftConfig, or every reason why this server refuses it. Knows no tensors and no model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from server.adapters.config_fields import BASE_CHANGING_INITS, HARMLESS_INITS, LORA_CONFIG_FIELDS, Treatment
from server.adapters.pattern_syntax import PatternSyntaxError
from server.adapters.patterns import Pattern, is_plain
from server.errors import RefusalReason

CONFIG_NAME = "adapter_config.json"

MAX_CONFIG_BYTES = 1024**2
"""Largest config read; real ones have 1 to 40 KB."""

ALL_LINEAR = "all-linear"
"""PEFT's shorthand for every linear map but the output head, in any case."""


MAX_PATTERNS = 10_000
"""Most entries of `rank_pattern`, and of `alpha_pattern`; files that list every module by its full name have hundreds,
of large models thousands."""

MAX_SPECIAL_CHARACTERS = 100_000
"""Characters of all patterns together that are more than names with dots; parsing takes 0.4 s of so many."""

_BREAKING_CODES = ("invalid_config_value", "unsupported_pattern", "no_target_modules")
"""Reasons after which ranks and targets are unknown; any other one leaves the tensors open to checking."""


@dataclass(frozen=True)
class PeftConfig:
    """The fields that decide which projections an adapter changes, and how strongly."""

    rank: int
    alpha: float
    is_rank_stabilized: bool
    """rsLoRA (arXiv 2312.03732): the scaling is alpha / sqrt(r) in place of alpha / r."""
    target_modules: tuple[str, ...] | Pattern
    """Names and name suffixes, or one pattern. `("all-linear",)` with `targets_all_linear`."""
    targets_all_linear: bool = False
    exclude_modules: tuple[str, ...] | Pattern = ()
    layers_to_transform: frozenset[int] | None = None
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: tuple[tuple[Pattern, int], ...] = ()
    """In the order of the file: the first match wins."""
    alpha_pattern: tuple[tuple[Pattern, float], ...] = ()


def parse_config(content: Mapping[str, Any], *, max_rank: int) -> tuple[PeftConfig | None, list[RefusalReason]]:
    """The config and every reason to refuse it; None where values are too broken to judge the tensors by."""
    reader = _Reader(content, max_rank)
    reader.check_kind()  # First: of another method's adapter, only its kind says what it is.
    reader.check_table()
    config = reader.read()
    is_broken = any(reason.code in _BREAKING_CODES for reason in reader.reasons)
    return (None if is_broken else config), reader.reasons


@dataclass
class _Reader:
    """Walks one config and collects reasons; getters return a harmless value after noting a problem."""

    content: Mapping[str, Any]
    max_rank: int
    reasons: list[RefusalReason] = field(default_factory=list)
    num_special_characters: int = 0

    def refuse(self, code: str, message: str, name: str) -> None:
        self.reasons.append(RefusalReason(code, message, f"{CONFIG_NAME}: {name}"))

    def check_table(self) -> None:
        """Refuse fields away from their default that we do not implement, and future ones by name."""
        known = {entry.name: entry for entry in LORA_CONFIG_FIELDS}
        for name, value in self.content.items():
            entry = known.get(name)
            if entry is None:
                if value is not None and value is not False and value not in ("", [], {}):
                    message = f"the field {name[:100]!r} is unknown, so its effect is; this server reads PEFT 0.21"
                    self.refuse("unknown_config_field", message, name[:100])
            elif entry.treatment is Treatment.DEFAULT_ONLY and not entry.is_unset(value):
                self.refuse(entry.code, f"{name} is set: {entry.why}", name)

    def check_kind(self) -> None:
        """Refuse other PEFT methods, other tasks, trained biases and inits that changed the base."""
        content = self.content
        if content.get("peft_type") != "LORA":
            message = f"peft_type is {_show(content.get('peft_type'))}; only LORA is served"
            self.refuse("unsupported_peft_type", message, "peft_type")
        if content.get("task_type") not in (None, "CAUSAL_LM"):
            message = f"task_type is {_show(content['task_type'])}; only CAUSAL_LM adapters generate text"
            self.refuse("unsupported_task_type", message, "task_type")
        if content.get("bias", "none") != "none":
            message = f"bias is {_show(content['bias'])}: trained biases are not served; retrain with bias='none'"
            self.refuse("bias", message, "bias")
        self._check_init(content.get("init_lora_weights", True))

    def read(self) -> PeftConfig:
        content = self.content
        rank = self._rank(content.get("r", 8), "r")
        targets, targets_all_linear = self._targets()
        layers = self._layers(content.get("layers_to_transform"))
        config = PeftConfig(
            rank=rank,
            alpha=self._number(content.get("lora_alpha", 8), "lora_alpha"),
            is_rank_stabilized=self._boolean("use_rslora"),
            target_modules=targets,
            targets_all_linear=targets_all_linear,
            exclude_modules=self._names_or_pattern("exclude_modules"),
            layers_to_transform=layers or None,
            layers_pattern=self._layers_pattern(),
            rank_pattern=tuple(
                (pattern, self._rank(value, "rank_pattern")) for pattern, value in self._pattern_items("rank_pattern")
            ),
            alpha_pattern=tuple(
                (pattern, self._number(value, "alpha_pattern"))
                for pattern, value in self._pattern_items("alpha_pattern")
            ),
        )
        self._check_layer_filters(targets_are_text=isinstance(content.get("target_modules"), str))
        return config

    def _check_init(self, value: Any) -> None:
        name = value.lower() if isinstance(value, str) else value
        if isinstance(name, str) and name.startswith(BASE_CHANGING_INITS):
            message = (
                f"init_lora_weights is {_show(value)}: training changed the base weights, so A and B do not fit the "
                "unchanged base; convert it with save_pretrained(path_initial_model_for_weight_conversion=...)"
            )
            self.refuse("base_changing_init", message, "init_lora_weights")
        elif not (name is None or isinstance(name, bool) or name in HARMLESS_INITS):
            self.refuse("unknown_init", f"init_lora_weights is {_show(value)}, which is unknown", "init_lora_weights")

    def _rank(self, value: Any, name: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.refuse("invalid_config_value", f"{name} is {_show(value)}, not a positive integer", name)
            return 1
        if value > self.max_rank:
            message = f"{name} is {value}; the largest rank served is {self.max_rank} (server.max_adapter_rank)"
            self.refuse("rank_too_large", message, name)
        return value

    def _number(self, value: Any, name: str) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or abs(value) > 1e9 or not math.isfinite(value):
            self.refuse("invalid_config_value", f"{name} is {_show(value)}, not a sensible number", name)
            return 1.0
        return float(value)

    def _boolean(self, name: str) -> bool:
        value = self.content.get(name)
        if value is None:  # as PEFT reads it: it only asks whether the field is true
            return False
        if not isinstance(value, bool):
            self.refuse("invalid_config_value", f"{name} is {_show(value)}, not true or false", name)
            return False
        return value

    def _targets(self) -> tuple[tuple[str, ...] | Pattern, bool]:
        value = self.content.get("target_modules")
        if not value:
            self.refuse("no_target_modules", "target_modules names nothing, so nothing is adapted", "target_modules")
            return (), False
        if isinstance(value, str) and value.lower() == ALL_LINEAR:
            return (ALL_LINEAR,), True
        return self._names_or_pattern("target_modules"), False

    def _names_or_pattern(self, name: str) -> tuple[str, ...] | Pattern:
        value = self.content.get(name)
        if not value:
            return ()
        if isinstance(value, str):
            return self._pattern(value, name) or ()
        return self._names(value, name)

    def _names(self, value: Any, name: str) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            self.refuse("invalid_config_value", f"{name} is {_show(value)}, not a list of names", name)
            return ()
        return tuple(value)

    def _layers(self, value: Any) -> frozenset[int]:
        layers = [value] if isinstance(value, int) else (value or [])
        if not isinstance(layers, list) or any(not isinstance(i, int) or isinstance(i, bool) for i in layers):
            name = "layers_to_transform"
            self.refuse("invalid_config_value", f"{name} is {_show(value)}, not a list of layer indices", name)
            return frozenset()
        return frozenset(layers)

    def _layers_pattern(self) -> tuple[str, ...]:
        value = self.content.get("layers_pattern")
        names = self._names([value] if isinstance(value, str) and value else value or [], "layers_pattern")
        # PEFT puts these into a regular expression and reads a group of it; plain names are all that it documents.
        for name in names:
            if not name.isidentifier():
                message = f"layers_pattern holds {_show(name)}; only the plain name of the layer list is served"
                self.refuse("unsupported_pattern", message, "layers_pattern")
        return names

    def _check_layer_filters(self, *, targets_are_text: bool) -> None:
        """Combinations that PEFT's own LoraConfig raises on."""
        content = self.content
        for name in ("layers_to_transform", "layers_pattern"):
            if targets_are_text and content.get(name) is not None:
                message = f"{name} cannot be used when target_modules is text; PEFT refuses it as well"
                self.refuse("invalid_config_value", message, name)
        if content.get("layers_pattern") and content.get("layers_to_transform") is None:
            message = "layers_pattern needs layers_to_transform; PEFT refuses it as well"
            self.refuse("invalid_config_value", message, "layers_pattern")

    def _pattern_items(self, name: str) -> list[tuple[Pattern, Any]]:
        value = self.content.get(name) or {}
        if not isinstance(value, dict):
            self.refuse("invalid_config_value", f"{name} is {_show(value)}, not a mapping", name)
            return []
        if len(value) > MAX_PATTERNS:
            message = f"{name} has {len(value)} patterns, more than the limit of {MAX_PATTERNS}"
            self.refuse("unsupported_pattern", message, name)
            return []
        compiled = ((self._pattern(key, name), item) for key, item in value.items())
        return [(pattern, item) for pattern, item in compiled if pattern is not None]

    def _pattern(self, text: str, name: str) -> Pattern | None:
        if not is_plain(text):
            self.num_special_characters += len(text)
            if self.num_special_characters > MAX_SPECIAL_CHARACTERS:
                message = f"the patterns are too long, more than {MAX_SPECIAL_CHARACTERS} characters together"
                self.refuse("unsupported_pattern", message, name)
                return None
        try:
            return Pattern(text)
        except PatternSyntaxError as error:
            self.refuse("unsupported_pattern", f"the pattern {_show(text)} cannot be used: {error}", name)
            return None


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "…"
