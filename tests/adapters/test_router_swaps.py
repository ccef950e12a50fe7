"""A router swapped while requests run: no moment at which the newcomers that it had are out of the routed pool."""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from server.adapters.calibration import Calibrator
from server.adapters.examples import encode_examples
from server.adapters.records import AdapterInfo
from server.adapters.registry import AdapterRegistry
from server.config import AdapterSpec, ServerSettings
from server.errors import LoraMixerError, NotReadyError
from server.routing.attach import RoutedModel, attach_routing
from server.routing.router import load_artefact, save_artefact
from tests.adapters.calibrating import ORDINARY, OWN, ByteRenderer, router_with_statistics
from tests.adapters.folders import BASE
from tests.adapters.harness import run_inline

SaveRouter = Callable[[int], Path]


@pytest.fixture(scope="session")
def folders(
    tmp_path_factory: pytest.TempPathFactory, llama: "LlamaForCausalLM", save_adapter: Callable[..., Path]
) -> Path:
    root = tmp_path_factory.mktemp("swapped")
    for index, name in enumerate("abcdef"):
        save_adapter(root / name, llama, index + 1, ["q_proj", "v_proj"], seed=index)
    return root


@pytest.fixture
def routed(tiny_llama: "Callable[..., LlamaForCausalLM]") -> RoutedModel:
    return attach_routing(tiny_llama(), num_slots=8)


@pytest.fixture
def registry(routed: RoutedModel, folders: Path) -> Iterator[AdapterRegistry]:
    """With a and b, and no router yet."""
    registry = AdapterRegistry(
        routed,
        base_model_name=BASE,
        settings=ServerSettings(max_adapters=7),
        run_between_steps=run_inline,
        root=folders,
        encode_examples=functools.partial(encode_examples, tokenizer=ByteRenderer()),
    )
    for name in "ab":
        add(registry, name)
    yield registry
    registry.close()


@pytest.fixture
def save_router(registry: AdapterRegistry, routed: RoutedModel, tmp_path: Path) -> SaveRouter:
    """`save_router(seed)`: folder of a router that was trained with a and b. The first one is installed."""
    known = [(name, str(registry.get(name).digest)) for name in "ab"]
    artefacts = [router_with_statistics(routed, known, seed=seed) for seed in range(3)]
    for seed, artefact in enumerate(artefacts):
        save_artefact(artefact, tmp_path / str(seed))
    registry.swap_router(tmp_path / "0")
    return lambda seed: tmp_path / str(seed)


def add(registry: AdapterRegistry, name: str, examples: list[str] | None = None) -> AdapterInfo:
    registry.register(AdapterSpec(name=name, source=f"./{name}"), examples or [])
    return registry.wait(name, 60)


def slot_of(registry: AdapterRegistry, name: str) -> int:
    slot = registry.roster.adapters[name].slot
    assert slot is not None
    return slot


class Calibrations:
    """Holds up every calibration until it may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Semaphore(0)
        self.may_go = threading.Event()
        self.failure: Exception | None = None
        calibrate = Calibrator.calibrate

        def slow(calibrator: Calibrator, *arguments: Any, **options: Any) -> Any:
            self.begun.release()
            assert self.may_go.wait(20)
            if self.failure is not None:
                raise self.failure
            return calibrate(calibrator, *arguments, **options)

        monkeypatch.setattr(Calibrator, "calibrate", slow)


@contextlib.contextmanager
def swapping(registry: AdapterRegistry, *folders: Path) -> Iterator[list[LoraMixerError]]:
    """Swaps run, begun in this order, until the end of the block; what they raised."""
    failures: list[LoraMixerError] = []

    def swap(folder: Path) -> None:
        try:
            registry.swap_router(folder)
        except LoraMixerError as error:
            failures.append(error)

    threads = [threading.Thread(target=swap, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    yield failures
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_no_request_misses_a_newcomer_while_the_router_is_swapped(
    registry: AdapterRegistry, save_router: SaveRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(registry, "c", OWN)
    add(registry, "d", OWN[::-1][:4])
    router = save_router(1)
    before = registry.router_info()["generation"]
    newcomers = {slot_of(registry, name) for name in "cd"}
    calibrations, is_over = Calibrations(monkeypatch), threading.Event()
    generations: list[int | None] = []
    problems: list[BaseException] = []

    def ask() -> None:
        try:
            while not is_over.is_set():
                for pool in (None, ["c", "d"]):
                    lease = registry.lease("auto", adapters=pool)
                    generations.append(lease.plan.router_generation)
                    assert newcomers <= set(lease.plan.allowed_slots)
                    lease.release()
                assert registry.get("c").routed
        except BaseException as problem:
            problems.append(problem)

    clients = [threading.Thread(target=ask) for _ in range(2)]
    for client in clients:
        client.start()
    with swapping(registry, router) as failures:
        assert calibrations.begun.acquire(timeout=20)
        num_asked = len(generations)
        while len(generations) < num_asked + 100 and not problems:
            time.sleep(0.002)
        assert registry.router_info()["generation"] == before, "it serves until the newcomers' rows are there"
        calibrations.may_go.set()
    assert failures == []
    assert all(registry.get(name).routed for name in "cd"), "the moment that the swap has returned"
    is_over.set()
    for client in clients:
        client.join(60)
    assert problems == []
    assert set(generations) == {before, registry.router_info()["generation"]}


def test_what_comes_while_a_router_is_swapped_counts_under_the_new_one(
    registry: AdapterRegistry, save_router: SaveRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retirement, a next generation and more examples."""
    for name in "cde":
        add(registry, name, OWN[:4])
    router = save_router(1)
    calibrations = Calibrations(monkeypatch)
    with swapping(registry, router) as failures:
        assert calibrations.begun.acquire(timeout=20)
        registry.retire("c")
        registry.calibrate("d", OWN[4:])
        registry.register(AdapterSpec(name="e", source="./f"), OWN, expected=["*"])
        while registry.get("e").generation < 2:
            time.sleep(0.002)
        calibrations.may_go.set()
    assert failures == []
    assert registry.wait_retired("c", 60)
    assert registry.roster.router is not None
    artefact = registry.roster.router.artefact
    assert artefact.rows["layer.0"].equal(load_artefact(router).rows["layer.0"])
    for name in "de":
        info = registry.wait(name, 60)
        assert info.to_dict()["calibration"]["num_examples"] == 6
        assert info.routed, info.reason
        calibration = registry.roster.adapters[name].calibration
        assert calibration is not None
        assert calibration.artefact is artefact
    assert not registry.has_leases


def test_of_two_swaps_the_later_one_stays(
    registry: AdapterRegistry, save_router: SaveRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(registry, "c", OWN)
    routers = [save_router(1), save_router(2)]
    calibrations = Calibrations(monkeypatch)
    with swapping(registry, *routers) as failures:
        calibrations.may_go.set()
    assert failures == []
    assert registry.router_info()["source"] == str(routers[1])
    assert registry.get("c").routed


def test_a_swap_goes_on_without_a_newcomer_whose_row_cannot_be_made(
    registry: AdapterRegistry, save_router: SaveRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(registry, "c", OWN)
    calibrations = Calibrations(monkeypatch)
    calibrations.failure = LoraMixerError("the examples are too long for the cache")
    calibrations.may_go.set()
    registry.swap_router(save_router(1))
    info = registry.get("c")
    assert info.reason == "the examples are too long for the cache: served by name only"
    assert set(registry.lease("auto").plan.allowed_slots) == {slot_of(registry, name) for name in "ab"}


def test_a_swap_that_the_servers_end_cuts_off_changes_nothing(
    registry: AdapterRegistry, save_router: SaveRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(registry, "c", OWN)
    routers = [save_router(1), save_router(2)]
    before = registry.roster.router
    calibrations = Calibrations(monkeypatch)
    with swapping(registry, *routers) as failures:
        assert calibrations.begun.acquire(timeout=20)
        closing = threading.Thread(target=registry.close)
        closing.start()
        time.sleep(0.05)
        calibrations.may_go.set()
    closing.join(60)
    assert [type(failure) for failure in failures] == [NotReadyError, NotReadyError]
    assert registry.roster.router is before


def test_who_was_not_routed_says_that_the_swap_has_its_row_made(
    registry: AdapterRegistry, save_router: SaveRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not add(registry, "c", ORDINARY).routed
    calibrations = Calibrations(monkeypatch)
    with swapping(registry, save_router(1)) as failures:
        pass
    assert failures == []
    assert registry.get("c").reason == "its gate row is being calibrated: served by name only"
    assert not registry.get("c").is_settled
    calibrations.may_go.set()
    assert "%" in str(registry.wait("c", 60).reason)
