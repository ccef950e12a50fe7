"""Model folders we must not or cannot serve are refused with every reason, before a model class runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from server.errors import ModelLoadError
from server.model.compatibility import check_model_folder


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


def test_a_complete_folder_passes_and_gives_its_config(model_folder: Path) -> None:
    assert check_model_folder(model_folder)["model_type"] == "llama"


def test_settings_that_real_configs_carry_are_not_mistaken_for_remote_code(model_folder: Path) -> None:
    edit(
        model_folder / "config.json",
        _attn_implementation_autoset=True,
        _attn_implementation="eager",
        attn_implementation={"text_config": "sdpa", "vision_config": None},
        auto_map=None,
        _name_or_path="org/model",
    )
    check_model_folder(model_folder)


@pytest.mark.parametrize(
    ("file", "changes", "named"),
    [
        (
            "config.json",
            {"auto_map": {"AutoModel": "modeling.Evil"}},
            r"config\.json, key 'auto_map'.*never",
        ),
        ("config.json", {"text_config": {"auto_map": {"AutoConfig": "x.Y"}}}, r"key 'text_config\.auto_map'"),
        ("config.json", {"parts": [{"auto_map": {"a": "b"}}]}, r"key 'parts\.0\.auto_map'"),
        ("config.json", {"_attn_implementation_internal": "evil/kernel"}, "private setting"),
        ("config.json", {"architectures": 5}, r"key 'architectures': 5 is not"),
        ("config.json", {"num_hidden_layers": 0}, r"key 'num_hidden_layers': a model of 0 layers"),
        ("model.safetensors.index.json", {"weight_map": 5}, "no weight_map"),
        ("model.safetensors.index.json", {"weight_map": {"a": 5}}, "files that are missing: 5"),
        ("config.json", {"_attn_implementation_internal": "sdpa"}, "private setting"),
        ("config.json", {"_attn_implementation": "evil/kernel"}, "'evil/kernel' is not an implementation"),
        ("config.json", {"attn_implementation": {"": "evil/kernel:f"}}, "is not an implementation"),
        ("config.json", {"_experts_implementation": "evil/kernel"}, "is not an implementation"),
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": "tok.Evil"}},
            r"tokenizer_config\.json, key 'auto_map'",
        ),
        (
            "config.json",
            {"architectures": ["BertForMaskedLM"], "model_type": "bert"},
            "BertForMaskedLM is not the causal",
        ),
        (
            "config.json",
            {"model_type": "clip", "architectures": ["CLIPModel"]},
            r"no causal .* of type 'clip'",
        ),
        ("config.json", {"model_type": None}, "of type None"),
        ("config.json", {"is_encoder_decoder": True}, "encoder-decoder"),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "quantised with 'gptq'"),
    ],
)
def test_what_we_refuse_is_named(model_folder: Path, file: str, changes: dict[str, Any], named: str) -> None:
    edit(model_folder / file, **changes)
    with pytest.raises(ModelLoadError, match=named):
        check_model_folder(model_folder)


def test_every_problem_is_listed_at_once(model_folder: Path) -> None:
    edit(model_folder / "config.json", auto_map={"AutoConfig": "x.Y"}, quantization_config={"quant_method": "awq"})
    (model_folder / "tokenizer.json").unlink()
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError) as caught:
        check_model_folder(model_folder)
    for part in ("auto_map", "'awq'", "no tokenizer files", "pytorch_model.bin is pickle"):
        assert part in caught.value.message


def test_missing_shards_and_shards_outside_the_folder_are_named(model_folder: Path) -> None:
    index = model_folder / "model.safetensors.index.json"
    edit(index, weight_map={"a": "model-00001-of-00002.safetensors"})
    with pytest.raises(ModelLoadError, match=r"files that are missing: model-00001-of-00002\.safetensors"):
        check_model_folder(model_folder)
    edit(index, weight_map={"a": "../elsewhere.safetensors"})
    with pytest.raises(ModelLoadError, match=r"outside the folder: \.\./elsewhere"):
        check_model_folder(model_folder)


def test_a_folder_without_config_says_what_a_model_folder_holds(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"has no config\.json\. A model folder holds"):
        check_model_folder(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_damaged_config_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        check_model_folder(tmp_path)
