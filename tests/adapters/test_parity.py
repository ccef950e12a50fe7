"""For every accepted config field, base weight + B A equals the weight that PEFT itself merges."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel

from server.adapters.weights import Adapter, load_adapter
from server.routing.attach import find_projections
from tests.adapters.folders import BASE, edit_config, edit_tensors

LLAMA_CASES: dict[str, tuple[int, Any, dict[str, Any]]] = {
    "one rank, alpha over r": (4, ["q_proj", "v_proj"], {"lora_alpha": 32}),
    "rank 1": (1, ["o_proj"], {}),
    "rank above both sizes": (80, ["k_proj"], {}),
    "mlp": (4, ["gate_proj", "up_proj", "down_proj"], {}),
    "rsLoRA": (8, ["q_proj", "o_proj"], {"use_rslora": True}),
    "fractional alpha": (8, ["q_proj"], {"lora_alpha": 0.3}),
    "negative alpha": (8, ["q_proj"], {"lora_alpha": -3}),
    "rank pattern": (4, ["q_proj", "v_proj"], {"rank_pattern": {"q_proj": 7, r"layers\.1\.self_attn\.v_proj": 2}}),
    "alpha pattern": (4, ["q_proj", "v_proj"], {"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 1, "v_proj": 3}}),
    # In sorted order, since PEFT sorts the keys of the file that it saves.
    "first pattern wins": (4, ["q_proj", "k_proj"], {"rank_pattern": {".*0.*q_proj": 2, "[qk]_proj": 3, "q_proj": 6}}),
    "patterns with rsLoRA": (
        4,
        ["q_proj", "v_proj"],
        {"use_rslora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"v_proj": 5}},
    ),
    "one layer": (4, ["q_proj", "down_proj"], {"layers_to_transform": 1}),
    "some layers": (4, ["q_proj"], {"layers_to_transform": [0, 2]}),
    "no layer filter": (4, ["q_proj"], {"layers_to_transform": []}),
    "layers by list name": (4, ["q_proj"], {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "layers by list names": (4, ["q_proj"], {"layers_to_transform": [1], "layers_pattern": ["h", "layers"]}),
    "full paths ignore the layer filter": (
        4,
        ["model.layers.0.self_attn.q_proj", "v_proj"],
        {"layers_to_transform": [2]},
    ),
    "path suffix": (4, ["self_attn.q_proj", "mlp.up_proj"], {}),
    "pattern of targets": (4, r".*layers\.(0|2)\.(self_attn|mlp)\.(q|up|k)_proj", {}),
    "all-linear": (4, "all-linear", {}),
    "All-Linear": (4, "All-Linear", {"rank_pattern": {"mlp.*": 2}}),
    "excluded names": (4, ["q_proj", "v_proj"], {"exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "excluded pattern": (4, ["q_proj", "v_proj"], {"exclude_modules": r".*\.2\..*"}),
    "all-linear less the mlp": (4, "all-linear", {"exclude_modules": r".*mlp.*"}),
    "gaussian init": (4, ["q_proj"], {"init_lora_weights": "gaussian"}),
    "orthogonal init": (4, ["q_proj"], {"init_lora_weights": "orthogonal"}),
    "mica init": (4, ["q_proj"], {"init_lora_weights": "mica"}),
    "random init": (4, ["q_proj"], {"init_lora_weights": False}),
    "fan_in_fan_out on linear modules": (4, ["q_proj"], {"fan_in_fan_out": True}),
    "no task type": (4, ["q_proj"], {"task_type": None}),
    "dropout": (4, ["q_proj"], {"lora_dropout": 0.5}),
    "bfloat16 file": (4, ["q_proj", "v_proj"], {"dtype": "bfloat16"}),
    "float16 file": (4, ["q_proj", "v_proj"], {"dtype": "float16", "use_rslora": True}),
}

GPT2_CASES: dict[str, tuple[int, Any, dict[str, Any]]] = {
    "fused attention": (4, ["c_attn"], {}),
    "one name in two blocks": (4, ["c_proj"], {}),
    "all of it": (4, ["c_attn", "c_proj", "c_fc"], {"rank_pattern": {"mlp.c_proj": 6}}),
    "fan_in_fan_out left unset": (4, ["c_attn"], {"fan_in_fan_out": False}),
    "all-linear": (4, "all-linear", {}),
    "layers": (4, ["c_attn"], {"layers_to_transform": [1], "layers_pattern": "h"}),
}


@pytest.mark.parametrize("case", LLAMA_CASES)
def test_llama_deltas_equal_those_that_peft_merges(
    case: str, llama: PreTrainedModel, save_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    _check(llama, *LLAMA_CASES[case], save_adapter=save_adapter, folder=tmp_path)


@pytest.mark.parametrize("case", GPT2_CASES)
def test_gpt2_deltas_equal_those_that_peft_merges(
    case: str, gpt2: PreTrainedModel, save_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    _check(gpt2, *GPT2_CASES[case], save_adapter=save_adapter, folder=tmp_path)


def test_config_that_says_all_linear_equals_the_expanded_list_that_peft_saves(
    llama: PreTrainedModel, save_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save_adapter(tmp_path, llama, 4, "all-linear", exclude_modules=["k_proj"])
    expanded = _load(folder, llama)
    adapter = _load(edit_config(folder, {"target_modules": "all-linear"}), llama)
    assert adapter.digest == expanded.digest
    _compare(adapter, llama, folder)


def test_a_list_made_for_several_architectures_equals_what_peft_makes_of_it(
    llama: PreTrainedModel, save_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save_adapter(tmp_path, llama, 4, ["q_proj", "query_key_value", "c_attn"])
    adapter = _load(folder, llama)
    assert adapter.targets == ("q_proj",)
    _compare(adapter, llama, folder)


@pytest.mark.parametrize("suffix", ["", ".default"])
def test_tensor_names_with_and_without_the_default_adapter_name_load_as_in_peft(
    suffix: str, llama: PreTrainedModel, save_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save_adapter(tmp_path, llama, 4, ["q_proj"])
    edit_tensors(folder, lambda tensors: {n.replace(".weight", f"{suffix}.weight"): t for n, t in tensors.items()})
    _compare(_load(folder, llama), llama, folder)


def test_the_delta_is_scaling_times_b_a_of_the_raw_tensors(
    llama: PreTrainedModel, save_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save_adapter(tmp_path, llama, 8, ["q_proj"], lora_alpha=4, use_rslora=True, dtype="bfloat16")
    raw = load_file(folder / "adapter_model.safetensors")
    module = "model.layers.2.self_attn.q_proj"
    b, a = (raw[f"base_model.model.{module}.lora_{matrix}.weight"].float() for matrix in "BA")
    lora = _load(folder, llama).weights[module]
    torch.testing.assert_close(lora.B @ lora.A, (b @ a) * 4 / 8**0.5, rtol=1e-5, atol=1e-6)


def _check(
    model: PreTrainedModel,
    rank: int,
    targets: Any,
    options: dict[str, Any],
    *,
    save_adapter: Callable[..., Path],
    folder: Path,
) -> None:
    with warnings.catch_warnings():
        # PEFT warns about what some cases are for: fan_in_fan_out on other modules, unused excludes.
        warnings.simplefilter("ignore")
        save_adapter(folder, model, rank, targets, **options)
        _compare(_load(folder, model), model, folder)


def _load(folder: Path, model: PreTrainedModel) -> Adapter:
    return load_adapter(folder, "test", projections=find_projections(model), base_model_name=BASE)


def _compare(adapter: Adapter, model: PreTrainedModel, folder: Path) -> None:
    """Every projection's merged weight against PEFT's; fp32, so 1e-5 allows for the order of products only."""
    tuner: Any = PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
    merged: Any = tuner.merge_and_unload()
    changed = set()
    for name, info in find_projections(model).items():
        ours = model.get_parameter(f"{name}.weight").detach().clone()
        theirs = merged.get_parameter(f"{name}.weight")
        assert not torch.equal(ours, theirs) or name not in adapter.weights
        if name in adapter.weights:
            changed.add(name)
            lora = adapter.weights[name]
            assert lora.A.dtype == lora.B.dtype == torch.float32
            delta = lora.B @ lora.A
            ours += delta.T if info.fan_in_fan_out else delta
        assert (ours - theirs).abs().max() < 1e-5, name
    assert changed == set(adapter.weights)
    assert adapter.rank == max(lora.A.shape[0] for lora in adapter.weights.values())
