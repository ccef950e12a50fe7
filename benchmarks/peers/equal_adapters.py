"""Adapters of unequal ranks and targets -> equal ones with the same numbers, as PEFT's Arrow demands them.

Ranks are padded with zero rows of A and zero columns of B, missing projections get B = 0, and each adapter's own
scaling (alpha / r, or alpha / sqrt(r) for rsLoRA) goes into B, so that all share r = alpha = 16. Nothing of this
changes an adapter's update, but Arrow does compute with the padding.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EQUAL_RANK = 16
EQUAL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")

_UNSUPPORTED = ("rank_pattern", "alpha_pattern", "use_dora", "modules_to_save")


def equalise(folder: Path, target: Path) -> Path:
    """Write the equal form of a PEFT folder to `target`. Raises ValueError for options it would change silently."""
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if given := [name for name in _UNSUPPORTED if config.get(name)]:
        raise ValueError(f"{folder}: cannot make an adapter with {', '.join(given)} equal to others")
    if config["r"] > EQUAL_RANK or not set(config["target_modules"]) <= set(EQUAL_TARGETS):
        raise ValueError(f"{folder}: rank above {EQUAL_RANK} or targets other than {', '.join(EQUAL_TARGETS)}")
    tensors = load_file(folder / "adapter_model.safetensors")
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    target.mkdir(parents=True, exist_ok=True)
    save_file(equal_tensors(tensors, scaling), target / "adapter_model.safetensors")
    equal = {"r": EQUAL_RANK, "lora_alpha": EQUAL_RANK, "use_rslora": False, "target_modules": list(EQUAL_TARGETS)}
    (target / "adapter_config.json").write_text(json.dumps({**config, **equal}), encoding="utf-8")
    return target


def equal_tensors(tensors: Mapping[str, Any], scaling: float) -> dict[str, Any]:
    """The padded float32 tensors. Shapes of missing projections are the model's: q as o, v as k (square attention)."""
    import torch

    layers = sorted({name.rpartition(".self_attn.")[0] for name in tensors}, key=lambda name: (len(name), name))
    twins = {"k_proj": "v_proj", "v_proj": "k_proj", "o_proj": "q_proj", "q_proj": "o_proj"}
    equal = {}
    for layer in layers:
        for leaf in EQUAL_TARGETS:
            prefix = f"{layer}.self_attn.{leaf}"
            present = f"{prefix}.lora_A.weight" in tensors
            origin = prefix if present else f"{layer}.self_attn.{twins[leaf]}"
            a, b = (tensors[f"{origin}.lora_{which}.weight"].float() for which in "AB")
            padded_a = torch.zeros(EQUAL_RANK, a.shape[1])
            padded_b = torch.zeros(b.shape[0], EQUAL_RANK)
            padded_a[: a.shape[0]] = a  # of its twin where it is missing: Arrow needs a direction, B = 0 makes it idle
            if present:
                padded_b[:, : b.shape[1]] = b * scaling
            equal[f"{prefix}.lora_A.weight"], equal[f"{prefix}.lora_B.weight"] = padded_a, padded_b
    return equal
