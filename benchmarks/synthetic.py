"""Random adapters in PEFT's file format and a random router over them, for curves that the demo's eight cannot draw."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from server.adapters.records import AdapterInfo
from server.routing.router import ArtefactAdapter, RouterArtefact, save_artefact

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")

WEIGHT_SCALE = 0.02
"""Small enough that the model's activations stay sane, not zero: denormal or zero products can be faster."""


def projection_shapes(model_folder: Path) -> dict[str, tuple[int, int]]:
    """Module path -> (d_out, d_in) of every projection of a base model whose leaf is in TARGETS; reads headers only."""
    shapes: dict[str, tuple[int, int]] = {}
    for path in sorted(model_folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                module = name.removesuffix(".weight")
                if name.endswith(".weight") and module.rpartition(".")[2] in TARGETS:
                    d_out, d_in = file.get_slice(name).get_shape()
                    shapes[module] = (d_out, d_in)
    return shapes


def write_adapter(
    folder: Path, shapes: Mapping[str, tuple[int, int]], *, base_model: str, rank: int, seed: int
) -> Path:
    """One adapter over the given projections, bfloat16, alpha = rank."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (d_out, d_in) in shapes.items():
        for name, shape in (("lora_A", (rank, d_in)), ("lora_B", (d_out, rank))):
            weight = torch.randn(shape, generator=generator) * WEIGHT_SCALE
            tensors[f"base_model.model.{module}.{name}.weight"] = weight.bfloat16()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(TARGETS),
        "bias": "none",
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write_router(
    folder: Path, adapters: Sequence[AdapterInfo], *, base_model: str, hidden_size: int, num_layers: int, top_k: int
) -> Path:
    """A per-layer router with random rows for the given adapters: every token picks, none is favoured."""
    generator = torch.Generator().manual_seed(len(adapters))
    rows = {
        f"layer.{layer}": torch.randn(len(adapters), hidden_size, generator=generator) / hidden_size**0.5
        for layer in range(num_layers)
    }
    artefact = RouterArtefact(
        base_model=base_model,
        hidden_size=hidden_size,
        num_layers=num_layers,
        granularity="layer",
        top_k=top_k,
        temperature=1.0,
        adapters=tuple(ArtefactAdapter(info.name, info.digest or "") for info in adapters),
        rows=rows,
    )
    save_artefact(artefact, folder)
    return folder
