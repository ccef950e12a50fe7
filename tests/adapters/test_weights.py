"""Adapters as values: what their digest sees, and the demo adapters as they are."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from server.adapters.weights import load_adapter
from server.routing.bank import ProjectionInfo
from tests.adapters.folders import WEIGHTS, copied, edit_config, edit_tensors

Load = Callable[..., Any]
DEMO = Path(__file__).parents[2] / "examples" / "demo" / "adapters"


@pytest.fixture
def folder(plain_folder: Path, tmp_path: Path) -> Path:
    return copied(plain_folder, tmp_path / "adapter")


def test_the_digest_is_blind_to_order_names_metadata_and_place(load: Load, folder: Path, tmp_path: Path) -> None:
    before = load(folder).digest
    tensors = load_file(folder / WEIGHTS)
    renamed = {name.replace("weight", "default.weight"): tensors[name] for name in reversed(list(tensors))}
    save_file(renamed, folder / WEIGHTS, metadata={"format": "pt", "note": "x" * 99})
    shutil.move(folder, tmp_path / "moved")
    assert load(tmp_path / "moved").digest == before


def test_the_digest_is_blind_to_the_dtype_of_equal_values(load: Load, folder: Path) -> None:
    edit_tensors(folder, lambda tensors: {name: tensor.bfloat16().float() for name, tensor in tensors.items()})
    before = load(folder).digest
    edit_tensors(folder, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    assert load(folder).digest == before


@pytest.mark.parametrize("changes", [{"lora_alpha": 9}, {"use_rslora": True}, {"alpha_pattern": {"layers.0.*": 3}}])
def test_the_digest_sees_every_field_that_changes_the_numbers(
    changes: dict[str, Any], load: Load, folder: Path
) -> None:
    before = load(folder).digest
    assert load(edit_config(folder, changes)).digest != before


def test_fields_that_come_to_the_same_scaling_share_a_digest(load: Load, folder: Path) -> None:
    before = load(edit_config(folder, {"lora_alpha": 8})).digest
    assert load(edit_config(folder, {"lora_alpha": 4, "use_rslora": True})).digest == before


def test_null_is_as_good_as_false_where_peft_only_asks_for_true(load: Load, folder: Path) -> None:
    before = load(folder).digest
    assert load(edit_config(folder, {"use_rslora": None})).digest == before


def test_the_digest_sees_one_changed_weight(load: Load, folder: Path) -> None:
    before = load(folder).digest

    def nudge(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[next(iter(tensors))][0, 0] += 1e-3
        return tensors

    assert load(edit_tensors(folder, nudge)).digest != before


def test_adapters_state_where_they_come_from(load: Load, folder: Path) -> None:
    adapter = load(folder, source="org/name", revision="a" * 40)
    assert (adapter.name, adapter.source, adapter.revision) == ("test", "org/name", "a" * 40)
    assert (adapter.rank, adapter.targets) == (4, ("q_proj", "v_proj"))


SMOLLM2 = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (576, 192),
    "self_attn.v_proj": (576, 192),
    "self_attn.o_proj": (576, 576),
}


@pytest.mark.parametrize(
    ("name", "rank", "num_targets"),
    [("arc", 4, 4), ("cola", 8, 4), ("gsm8k", 16, 4), ("mbpp", 16, 4), ("pubmedqa", 8, 2), ("snips", 8, 4),
     ("sst2", 8, 2), ("wikisql", 16, 4)],
)  # fmt: skip
def test_demo_adapters_are_servable(name: str, rank: int, num_targets: int) -> None:
    paths = {f"model.layers.{layer}.{leaf}": (layer, *size) for layer in range(30) for leaf, size in SMOLLM2.items()}
    projections = {path: ProjectionInfo(path, d_in, d_out, at, False) for path, (at, d_in, d_out) in paths.items()}
    adapter = load_adapter(
        DEMO / name, name, projections=projections, base_model_name="HuggingFaceTB/SmolLM2-135M-Instruct"
    )
    assert (adapter.rank, len(adapter.targets)) == (rank, num_targets)
    assert len(adapter.weights) == 30 * num_targets
    lora = adapter.weights["model.layers.0.self_attn.q_proj"]
    raw = load_file(DEMO / name / WEIGHTS)["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].float()
    scaling = 16 / 8**0.5 if name == "snips" else 2.0  # the only one trained with rsLoRA
    torch.testing.assert_close(lora.B, raw * scaling)
