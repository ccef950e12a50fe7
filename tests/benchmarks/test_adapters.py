"""Adapters that benchmarks write: random ones load in PEFT and here, equal ones have the numbers of their originals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peers.equal_adapters import equalise
from benchmarks.synthetic import projection_shapes, write_adapter, write_router
from server.adapters.records import AdapterInfo, AdapterState
from server.adapters.weights import load_adapter
from server.routing.attach import find_projections
from server.routing.router import load_artefact

BASE = "test/tiny"


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def base(folder: Path) -> Any:
    model: Any = LlamaForCausalLM.from_pretrained(folder)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=torch.arange(20)[None]).logits
    return result


def test_random_adapters_load_in_peft_and_in_our_loader_and_change_the_output(
    model_folder: Path, tmp_path: Path
) -> None:
    shapes = projection_shapes(model_folder)
    assert len(shapes) == 2 * 4
    assert shapes["model.layers.1.self_attn.k_proj"] == (16, 32)
    folder = write_adapter(tmp_path / "random", shapes, base_model=BASE, rank=5, seed=1)
    model = base(model_folder)
    before = logits(model)
    projections = find_projections(model)
    adapter = load_adapter(folder, "random", projections=projections, base_model_name=BASE)
    assert adapter.rank == 5
    assert len(adapter.weights) == 8
    after = logits(PeftModel.from_pretrained(model, folder).eval())
    assert (after - before).abs().max() > 1e-6
    other = write_adapter(tmp_path / "other", shapes, base_model=BASE, rank=5, seed=2)
    assert load_adapter(other, "other", projections=projections, base_model_name=BASE).digest != adapter.digest


def test_a_random_router_is_one_that_the_server_loads(tmp_path: Path) -> None:
    infos = [AdapterInfo(f"a{i}", AdapterState.READY, "x", digest=f"{i:064x}") for i in range(3)]
    folder = write_router(tmp_path / "router", infos, base_model=BASE, hidden_size=32, num_layers=2, top_k=2)
    artefact = load_artefact(folder)
    assert (artefact.top_k, artefact.granularity, len(artefact.rows)) == (2, "layer", 2)
    assert [adapter.digest for adapter in artefact.adapters] == [info.digest for info in infos]
    assert artefact.rows["layer.0"].shape == (3, 32)
    assert not torch.equal(artefact.rows["layer.0"], artefact.rows["layer.1"])


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "use_rslora": True},
    ],
    ids=["fewer targets and a smaller rank", "rsLoRA"],
)
def test_an_equal_adapter_has_the_numbers_of_its_original(
    settings: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    original: Any = get_peft_model(base(model_folder), LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in original.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    original.save_pretrained(tmp_path / "original")
    expected = logits(original.eval())
    equal = equalise(tmp_path / "original", tmp_path / "equal")
    config = json.loads((equal / "adapter_config.json").read_text())
    assert config["r"] == 16
    assert len(load_file(equal / "adapter_model.safetensors")) == 2 * 4 * 2
    found = logits(PeftModel.from_pretrained(base(model_folder), equal).eval())
    # float32: padding adds zeros only, so what differs is the order of summation.
    assert (found - expected).abs().max() < 1e-5
    assert (expected - logits(base(model_folder))).abs().max() > 1e-3


def test_options_that_padding_would_change_are_refused(model_folder: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "random", projection_shapes(model_folder), base_model=BASE, rank=4, seed=1)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "rank_pattern": {"q_proj": 8}}))
    with pytest.raises(ValueError, match="rank_pattern"):
        equalise(folder, tmp_path / "equal")
    path.write_text(json.dumps({**config, "target_modules": ["up_proj"]}))
    with pytest.raises(ValueError, match="targets other than"):
        equalise(folder, tmp_path / "equal")
