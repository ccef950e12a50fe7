"""What a loaded base model promises, and what stops the loading."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from server.config import BaseModelConfig
from server.errors import ModelLoadError
from server.model.loader import UNLIMITED_MODEL_LEN, LoadedModel, load_base_model, parse_device
from server.model.quantization import quantize


def load(folder: Path, **settings: Any) -> LoadedModel:
    config = BaseModelConfig(**{"name": "org/tiny", "source": folder.name, "dtype": "float32", **settings})
    return load_base_model(config, device="cpu", cache_folder=folder / "unused", root=folder.parent)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_loaded_model_is_frozen_tied_and_described(model_folder: Path, byte_level: PreTrainedTokenizerFast) -> None:
    loaded = load(model_folder)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight
    assert (loaded.name, loaded.revision, loaded.source_sha256) == ("org/tiny", None, None)
    assert loaded.model.name_or_path == loaded.config.name_or_path == "org/tiny"
    assert (loaded.max_model_len, loaded.vocab_size) == (512, 320)
    assert byte_level.eos_token_id in loaded.eos_token_ids


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_of_the_file_in_the_dtype_asked_for(model_folder: Path, dtype: str) -> None:
    stored = load_file(model_folder / "model.safetensors")
    loaded = dict(load(model_folder, dtype=dtype).model.named_parameters())
    for name, tensor in stored.items():
        assert torch.equal(loaded[name], tensor.to(getattr(torch, dtype)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_of_8_bits_are_those_of_the_file_rounded(model_folder: Path, dtype: str) -> None:
    stored = load_file(model_folder / "model.safetensors")
    loaded = load(model_folder, dtype=dtype, quantization="int8")
    assert not load(model_folder, dtype=dtype).quantized
    assert "lm_head" in loaded.quantized
    assert "model.layers.0.self_attn.q_proj" in loaded.quantized
    weights = dict(loaded.model.named_parameters())
    for name, tensor in stored.items():
        linear = "lm_head" if name == "model.embed_tokens.weight" else name.removesuffix(".weight")  # tied
        tensor = tensor.to(getattr(torch, dtype))
        expected = quantize(tensor).expanded(tensor.dtype) if linear in loaded.quantized else tensor
        assert torch.equal(weights[name], expected)


def test_end_of_sequence_ids_come_from_the_generation_config_and_the_tokenizer(
    model_folder: Path, byte_level: PreTrainedTokenizerFast
) -> None:
    edit(model_folder / "generation_config.json", eos_token_id=[7, 9])
    edit(model_folder / "config.json", eos_token_id=11)
    assert load(model_folder).eos_token_ids == {7, 9, byte_level.eos_token_id}


def test_a_model_that_states_no_context_length_is_unlimited(
    tiny_gpt2: Callable[..., Any], byte_level: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=320, hidden_size=32, n_layer=1, n_head=2)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    byte_level.save_pretrained(tmp_path / "bloom")
    assert load(tmp_path / "bloom").max_model_len == UNLIMITED_MODEL_LEN
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    byte_level.save_pretrained(tmp_path / "gpt2")
    assert load(tmp_path / "gpt2").max_model_len == 512


def test_a_checkpoint_that_lacks_weights_is_refused_rather_than_filled_with_noise(model_folder: Path) -> None:
    path = model_folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"1 weights missing \(first: model\.layers\.1\.mlp\.up_proj\.weight\)"):
        load(model_folder)


def test_a_checkpoint_of_another_shape_is_refused(model_folder: Path) -> None:
    edit(model_folder / "config.json", intermediate_size=96)
    with pytest.raises(ModelLoadError, match=r"shape|size"):
        load(model_folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "64"},
        {"num_hidden_layers": 2.5},
        {"num_attention_heads": 5},
        {"max_position_embeddings": None},
        {"rope_scaling": [1]},
        {"hidden_act": "none of ours"},
    ],
    ids=str,
)
def test_a_malformed_config_is_refused_with_the_cause(changes: dict[str, Any], model_folder: Path) -> None:
    edit(model_folder / "config.json", **changes)
    with pytest.raises(ModelLoadError, match=r"in .* cannot be loaded: \w+Error: "):
        load(model_folder)


def test_an_end_of_sequence_id_that_is_no_number_is_refused(model_folder: Path) -> None:
    edit(model_folder / "generation_config.json", eos_token_id=[2, "</s>"])
    with pytest.raises(ModelLoadError, match="eos_token_id holds '</s>'"):
        load(model_folder)


def test_damaged_weights_are_refused_by_name(model_folder: Path) -> None:
    (model_folder / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(ModelLoadError, match=r"cannot be loaded: .*delete the folder"):
        load(model_folder)


def test_a_damaged_tokenizer_is_refused_by_name(model_folder: Path) -> None:
    (model_folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"the tokenizer in .* cannot be loaded"):
        load(model_folder)


def test_remote_code_in_a_config_stops_the_loading(model_folder: Path) -> None:
    (model_folder / "modeling.py").write_text("raise SystemExit('remote code ran')")
    edit(model_folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    with pytest.raises(ModelLoadError, match="auto_map"):
        load(model_folder)


def test_the_demo_model_loads_from_its_package(demo_base: Callable[[str], LoadedModel]) -> None:
    loaded = demo_base("bfloat16")
    assert loaded.name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert loaded.source_sha256 is not None
    assert loaded.eos_token_ids == set(loaded.tokenizer.encode("<|im_end|>", add_special_tokens=False))
    assert (loaded.max_model_len, loaded.vocab_size, loaded.model.dtype) == (8192, 49152, torch.bfloat16)


def test_devices_are_checked_before_anything_is_loaded(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_device("cpu") == torch.device("cpu")
    for device in ("tpu", "cuda:x", "cpu:0", "mps", ""):
        with pytest.raises(ModelLoadError, match="use cpu, cuda or cuda:N") as caught:
            parse_device(device)
        assert caught.value.param == "server.device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelLoadError, match="sees no CUDA device"):
        load_base_model(BaseModelConfig(source=str(model_folder)), device="cuda", cache_folder=Path(), root=Path())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parse_device("cuda") == torch.device("cuda", 0)
    assert parse_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ModelLoadError, match="has 2 CUDA devices"):
        parse_device("cuda:2")
