"""Tiny base models under a name, their projections, and adapter folders to spoil."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from server.adapters.registry import AdapterRegistry
from server.adapters.weights import Adapter, load_adapter
from server.config import ServerSettings
from server.routing.attach import RoutedModel, attach_routing, find_projections
from server.routing.bank import ProjectionInfo
from tests.adapters.fake_hub import FakeHub
from tests.adapters.folders import BASE, edit_config
from tests.adapters.harness import run_inline

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, LlamaForCausalLM


@pytest.fixture(scope="session")
def llama(tiny_llama: "Callable[..., LlamaForCausalLM]") -> "LlamaForCausalLM":
    return tiny_llama()


@pytest.fixture(scope="session")
def gpt2(tiny_gpt2: "Callable[..., GPT2LMHeadModel]") -> "GPT2LMHeadModel":
    return tiny_gpt2()


@pytest.fixture(scope="session")
def projections(llama: "LlamaForCausalLM") -> dict[str, ProjectionInfo]:
    return find_projections(llama)


@pytest.fixture(scope="session")
def save_adapter(make_adapter: Callable[..., Path]) -> Callable[..., Path]:
    """As `make_adapter`, for the base name BASE. A name on the model itself would make PEFT look it up on the Hub."""

    def build(*arguments: Any, **options: Any) -> Path:
        return edit_config(make_adapter(*arguments, **options), {"base_model_name_or_path": BASE})

    return build


@pytest.fixture(scope="session")
def plain_folder(
    tmp_path_factory: pytest.TempPathFactory, llama: "LlamaForCausalLM", save_adapter: Callable[..., Path]
) -> Path:
    """A sound adapter on q_proj and v_proj of the tiny Llama, rank 4. Read only: copy it before changing it."""
    return save_adapter(tmp_path_factory.mktemp("plain"), llama, 4, ["q_proj", "v_proj"])


@pytest.fixture
def load(projections: dict[str, ProjectionInfo]) -> Callable[..., Adapter]:
    """`load(folder, **options)`: load_adapter for the tiny Llama."""

    def call(folder: Path, **options: Any) -> Adapter:
        return load_adapter(folder, "test", **{"projections": projections, "base_model_name": BASE, **options})

    return call


@pytest.fixture
def routed(tiny_llama: "Callable[..., LlamaForCausalLM]") -> RoutedModel:
    return attach_routing(tiny_llama(), num_slots=5)


@pytest.fixture(scope="session")
def sources(
    tmp_path_factory: pytest.TempPathFactory, llama: "LlamaForCausalLM", save_adapter: Callable[..., Path]
) -> Path:
    """A folder with the adapters a, b, c, d, of different ranks and targets. Read only."""
    root = tmp_path_factory.mktemp("sources")
    targets = [["q_proj"], ["q_proj", "v_proj"], ["up_proj"], ["o_proj"]]
    for index, name in enumerate("abcd"):
        save_adapter(root / name, llama, index + 1, targets[index], seed=index)
    return root


@pytest.fixture
def make_registry(routed: RoutedModel, sources: Path) -> Iterator[Callable[..., AdapterRegistry]]:
    made: list[AdapterRegistry] = []

    def build(**options: Any) -> AdapterRegistry:
        defaults: dict[str, Any] = {
            "base_model_name": BASE,
            "settings": ServerSettings(max_adapters=4),
            "run_between_steps": run_inline,
            "root": sources,
        }
        model = options.pop("routed_model", routed)
        made.append(AdapterRegistry(model, **{**defaults, **options}))
        return made[-1]

    yield build
    for registry in made:
        registry.close()


@pytest.fixture
def registry(make_registry: Callable[..., AdapterRegistry]) -> AdapterRegistry:
    return make_registry()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with FakeHub() as hub:
        yield hub
