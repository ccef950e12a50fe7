"""The skeleton of a base model: the real one's modules and shapes, no weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from server.config import BaseModelConfig
from server.errors import ModelLoadError
from server.model.skeleton import load_skeleton
from server.routing.attach import find_projections

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: "Callable[..., LlamaForCausalLM]") -> Path:
    """A tiny Llama as a model folder; the skeleton looks at no tokenizer, only at its presence."""
    tiny_llama().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def test_it_has_the_projections_of_the_real_model_and_no_numbers(
    folder: Path, tmp_path: Path, tiny_llama: "Callable[..., LlamaForCausalLM]"
) -> None:
    skeleton = load_skeleton(BaseModelConfig(source=str(folder)), cache_folder=tmp_path / "cache", root=Path())
    assert find_projections(skeleton) == find_projections(tiny_llama())
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}


def test_an_architecture_that_is_not_served_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    with pytest.raises(ModelLoadError, match="t5"):
        load_skeleton(BaseModelConfig(source=str(folder)), cache_folder=tmp_path / "cache", root=Path())


def test_an_architecture_that_cannot_be_built_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))
    with pytest.raises(ModelLoadError, match="cannot be built"):
        load_skeleton(BaseModelConfig(source=str(folder)), cache_folder=tmp_path / "cache", root=Path())
