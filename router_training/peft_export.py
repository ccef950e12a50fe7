"""Trained adapters as ordinary PEFT folders: `adapter_config.json` and `adapter_model.safetensors`. Needs no PEFT."""

import json
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save

from router_training.trainable import TrainableAdapter
from server.routing.bank import ProjectionInfo

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


def export_adapter(
    adapter: TrainableAdapter, folder: Path, *, base_model: str, projections: Mapping[str, ProjectionInfo]
) -> None:
    """Write one adapter folder; equal adapters give equal bytes. Weights are float32."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name in adapter.a:
        tensors[f"base_model.model.{name}.lora_A.weight"] = adapter.a[name].detach().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = adapter.b[name].detach().contiguous()
    (folder / WEIGHTS_NAME).write_bytes(save(dict(sorted(tensors.items())), metadata={"format": "pt"}))
    config = _config(adapter, base_model, projections)
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def _config(adapter: TrainableAdapter, base_model: str, projections: Mapping[str, ProjectionInfo]) -> dict[str, Any]:
    """PEFT's LoraConfig; projections of another rank than most go into its patterns, with the same scaling."""
    ranks = {name: a.shape[0] for name, a in adapter.a.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: own for name, own in sorted(ranks.items()) if own != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": _alpha(rank, adapter.scaling),
        "rank_pattern": others,
        "alpha_pattern": {name: _alpha(own, adapter.scaling) for name, own in others.items()},
        "lora_dropout": 0.0,
        "target_modules": _targets(ranks, projections),
        "fan_in_fan_out": any(projections[name].fan_in_fan_out for name in ranks),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def _alpha(rank: int, scaling: float) -> int | float:
    """PEFT divides alpha by the rank; whole where it can be, as PEFT declares it."""
    alpha = rank * scaling
    return int(alpha) if alpha == int(alpha) else alpha


def _targets(adapted: Collection[str], projections: Mapping[str, ProjectionInfo]) -> list[str]:
    """Leaf names where they say it all, else full module paths."""
    leaves = {name.rpartition(".")[2] for name in adapted}
    covered = {name for name in projections if name.rpartition(".")[2] in leaves}
    return sorted(leaves) if covered == set(adapted) else sorted(adapted)
