"""The committed demo router: made for the committed adapters, and as good as its record says."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from router_training.settings import BASE_NAME, TrainingConfig
from server.adapters.weights import load_adapter
from server.config import load_config
from server.routing.attach import find_projections
from server.routing.background import from_tensors
from server.routing.bank import ProjectionInfo
from server.routing.policy import BASE_DIGEST
from server.routing.router import RouterArtefact, load_artefact

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def artefact() -> RouterArtefact:
    return load_artefact(ROOT / "examples/demo/router")


@pytest.fixture(scope="module")
def projections() -> dict[str, ProjectionInfo]:
    """Of a model of SmolLM2-135M's shape, without its weights."""
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
    )
    with torch.device("meta"):
        return find_projections(LlamaForCausalLM(config))


def test_it_routes_exactly_the_adapters_of_the_default_configuration(
    artefact: RouterArtefact, projections: dict[str, ProjectionInfo]
) -> None:
    config = load_config(ROOT / "adapters.yaml")
    assert config.router_folder == ROOT / "examples/demo/router"
    by_name = {adapter.name: adapter for adapter in artefact.adapters}
    assert by_name.pop(BASE_NAME).digest == BASE_DIGEST
    assert set(by_name) == {spec.name for spec in config.adapters if spec.routed}
    for spec in config.adapters:
        adapter = load_adapter(
            ROOT / spec.source, spec.name, projections=projections, base_model_name=config.base_model.name
        )
        recorded = by_name[spec.name]
        assert (recorded.digest, recorded.source) == (adapter.digest, spec.source)
        assert (recorded.rank, recorded.targets) == (adapter.rank, adapter.targets)


def test_it_has_one_gate_per_layer_with_background_statistics(artefact: RouterArtefact) -> None:
    assert (artefact.granularity, artefact.top_k, artefact.temperature) == ("layer", 2, 1.0)
    assert set(artefact.rows) == {f"layer.{index}" for index in range(30)}
    assert sum(rows.numel() for rows in artefact.rows.values()) == 17_280 * 9
    background = from_tensors(artefact.background, artefact.rows)
    assert set(background.domains.tolist()) == set(range(9))
    assert sum(file.stat().st_size for file in (ROOT / "examples/demo/router").iterdir()) < 10_000_000


def test_its_prompt_gate_covers_every_choice_and_can_take_newcomers(artefact: RouterArtefact) -> None:
    gate = artefact.prompt_gate
    assert gate is not None
    assert gate.scores.shape == (49_152, 9)
    assert gate.statistics is not None
    assert {label for _, label in gate.statistics.questions} == set(range(9))


def test_its_record_shows_it_ahead_of_base_and_uniform_on_every_task(artefact: RouterArtefact) -> None:
    validation = artefact.training["validation"]
    names = {adapter.name for adapter in artefact.adapters} - {BASE_NAME}
    assert set(validation["beats_base"]) == set(validation["beats_uniform"]) == names
    assert validation["mean_ratio_to_own_adapter"] < 1.02
    assert validation["off_domain"]["ratio_to_base"]["routed"] < 1.04
    TrainingConfig(**artefact.training["settings"])
