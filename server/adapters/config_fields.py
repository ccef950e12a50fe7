"""Every field of PEFT's LoraConfig (0.21) as data: its default, and what we do with it. No code reads a config here.

The rule is to fail closed: a field is read, is known to have no influence on inference, or must stand at its default.
A test compares this table with the dataclass of the installed PEFT, so that no field is forgotten.
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any


class Treatment(Enum):
    """What becomes of a field."""

    READ = auto()
    """Parsed into `PeftConfig`, or checked there by its own rule."""
    NO_EFFECT = auto()
    """Matters to training or loading only; any value gives the same numbers at inference."""
    DEFAULT_ONLY = auto()
    """Would change the numbers in a way that is not implemented: refused away from its default."""


@dataclass(frozen=True)
class ConfigField:
    """One row of the table. `code` and `why` go into the refusal of DEFAULT_ONLY fields."""

    name: str
    default: Any
    treatment: Treatment
    code: str = ""
    why: str = ""
    may_be_empty: bool = False
    """DEFAULT_ONLY: an empty list is as good as null. Elsewhere PEFT asks `is not None`, so {} switches a field on."""

    def is_unset(self, value: Any) -> bool:
        """Whether a value means `not used` to PEFT: null, the default, or an empty list where that is the same."""
        is_default = type(value) is type(self.default) and value == self.default
        return value is None or is_default or (self.may_be_empty and value == [])


def _read(name: str, default: Any) -> ConfigField:
    return ConfigField(name, default, Treatment.READ)


def _no_effect(name: str, default: Any) -> ConfigField:
    return ConfigField(name, default, Treatment.NO_EFFECT)


def _default_only(name: str, default: Any, code: str, why: str, *, may_be_empty: bool = False) -> ConfigField:
    return ConfigField(name, default, Treatment.DEFAULT_ONLY, code, why, may_be_empty)


_MERGE = "merge it into a base model of its own, or retrain it as plain LoRA"

LORA_CONFIG_FIELDS: tuple[ConfigField, ...] = (
    _read("peft_type", None),
    _read("task_type", None),
    _read("base_model_name_or_path", None),
    _read("r", 8),
    _read("lora_alpha", 8),
    _read("use_rslora", False),
    _read("target_modules", None),
    _read("exclude_modules", None),
    _read("layers_to_transform", None),
    _read("layers_pattern", None),
    _read("rank_pattern", {}),
    _read("alpha_pattern", {}),
    _read("bias", "none"),
    _read("init_lora_weights", True),
    # PEFT sets it per module from the module's class and warns where the config differs.
    _no_effect("fan_in_fan_out", False),
    _no_effect("auto_mapping", None),  # names a Python class for PEFT to import; never imported here
    _no_effect("peft_version", None),
    _no_effect("revision", None),
    _no_effect("inference_mode", False),
    _no_effect("lora_dropout", 0.0),
    _no_effect("qalora_group_size", 16),  # read with `use_qalora` only
    _no_effect("runtime_config", {"ephemeral_gpu_offload": False}),
    # Settings of inits; PEFT ignores them unless `init_lora_weights` names the init, and that is checked.
    _no_effect("loftq_config", {}),
    _no_effect("eva_config", None),
    _no_effect("corda_config", None),
    _no_effect("lora_ga_config", None),
    _default_only("use_dora", False, "dora", f"DoRA rescales the base weights by a learned magnitude; {_MERGE}"),
    _default_only(
        "modules_to_save",
        None,
        "modules_to_save",
        f"it replaces whole modules of the base; {_MERGE}",
        may_be_empty=True,
    ),
    _default_only("lora_bias", False, "lora_bias", f"it adds a bias to the update; {_MERGE}"),
    _default_only("trainable_token_indices", None, "added_tokens", f"it changes rows of the token embedding; {_MERGE}"),
    _default_only(
        "target_parameters",
        None,
        "target_parameters",
        f"LoRA on bare parameters is not served; {_MERGE}",
        may_be_empty=True,
    ),
    _default_only(
        "layer_replication",
        None,
        "layer_replication",
        "it stacks the base's layers anew, which makes another base",
        may_be_empty=True,
    ),
    _default_only("megatron_config", None, "megatron", "Megatron's parallel layers are not served"),
    _default_only("megatron_core", "megatron.core", "megatron", "Megatron's parallel layers are not served"),
    _default_only("alora_invocation_tokens", None, "alora", "activated LoRA starts in the middle of a prompt"),
    _default_only("use_qalora", False, "qalora", f"QALoRA pools the input of a quantised base; {_MERGE}"),
    _default_only("velora_config", None, "velora", "VeLoRA keeps tensors of its own; retrain it as plain LoRA"),
    _default_only("monteclora_config", None, "monteclora", f"MonteCLoRA samples its weights; {_MERGE}"),
    _default_only("use_bdlora", None, "bdlora", f"BD-LoRA's block-diagonal factors are not served; {_MERGE}"),
    _default_only("arrow_config", None, "arrow", "Arrow routes between adapters by itself; register those instead"),
    _default_only("kasa_config", None, "kasa", f"KaSA truncates the base weights; {_MERGE}"),
    _default_only(
        "ensure_weight_tying", False, "weight_tying", f"adapters of tied embeddings are not served; {_MERGE}"
    ),
)

HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""Named `init_lora_weights` that leave the base weights alone, as true, false and null do: they only choose where A and
B start. In PEFT, `LoraLayer.update_layer` never assigns to the base layer's weight for them."""

BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Inits (or prefixes of their names) that subtract from, or quantise, the base weights before training, so that the
saved A and B are meaningless on the unchanged base."""
