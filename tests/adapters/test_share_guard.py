"""Caps on the share of routed traffic: who exceeds one leaves the pool of new requests until an operator lets it in."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from server.adapters.records import AdapterInfo
from server.adapters.registry import AdapterRegistry
from server.config import AdapterSpec, ServerSettings
from server.errors import AdapterConflictError, InvalidRequestError
from server.routing.attach import attach_routing
from tests.adapters.harness import add, local, save_router

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

WINDOW = 1000
Serve = Callable[..., AdapterRegistry]


@pytest.fixture
def serve(
    make_registry: Callable[..., AdapterRegistry], tiny_llama: "Callable[..., LlamaForCausalLM]", tmp_path: Path
) -> Serve:
    """`serve(*configured, **settings)`: the server of before is gone, one with the same journal and router is there."""
    alive: list[AdapterRegistry] = []

    def start(*configured: AdapterSpec, **settings: Any) -> AdapterRegistry:
        for registry in alive:
            registry.close()
        routed = attach_routing(tiny_llama(), num_slots=5)
        options = {"max_adapters": 4, "gate_share_window": WINDOW, **settings}
        registry = make_registry(
            routed_model=routed, journal=tmp_path / "adapters.state", settings=ServerSettings(**options)
        )
        alive[:] = [registry]
        for name in registry.restore(configured):
            registry.wait(name, 30)
        if not (tmp_path / "router").exists():
            add(registry, "a", max_gate_share=0.5)
            add(registry, "b", max_gate_share=0.9)
            add(registry, "c")
            known = [(info.name, str(info.digest)) for info in registry.list()]
            save_router(tmp_path / "router", routed, known)
        registry.swap_router(tmp_path / "router")
        return registry

    return start


def slot_of(registry: AdapterRegistry, name: str) -> int:
    slot = registry.roster.adapters[name].slot
    assert slot is not None
    return slot


def route(registry: AdapterRegistry, **masses: float) -> None:
    """One step whose routed gate mass is this, by adapter; `base` is slot 0."""
    mass = [(0 if name == "base" else slot_of(registry, name), value) for name, value in masses.items()]
    registry.record_traffic(mass, mass)


def let_lane_finish(registry: AdapterRegistry) -> None:
    registry._publisher.run(lambda: None)


def excluded(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "adapters.state.excluded"
    found: dict[str, Any] = json.loads(path.read_text())["excluded"] if path.exists() else {}
    return found


def routed(registry: AdapterRegistry) -> str:
    return "".join(info.name for info in registry.list() if info.routed)


def test_who_takes_more_than_its_cap_leaves_the_pool_of_new_requests_only(serve: Serve) -> None:
    registry = serve()
    running, without = registry.lease("auto"), registry.lease("auto", adapters=["b", "c"])
    route(registry, a=600.0, b=200.0, c=199.0)
    assert routed(registry) == "abc", "the window is not full"
    route(registry, base=1.0)
    info = registry.get("a")
    assert (info.state, info.routed, info.max_gate_share) == ("READY", False, 0.5)
    assert info.exclusion == {
        "generation": 1, "digest": info.digest, "share": 0.6, "max_gate_share": 0.5, "window_tokens": WINDOW,
    }  # fmt: skip
    assert "it had 60.0% of the gate weight of the last 1000 routed tokens" in str(info.reason)
    assert slot_of(registry, "a") in running.plan.allowed_slots
    assert registry.lease("auto").plan == without.plan, "the same pool, the same function, the same prefix cache"
    assert registry.lease("a").plan.weights, "by name it serves on"
    with pytest.raises(InvalidRequestError, match="is not routed: it had 60"):
        registry.lease("auto", adapters=["a", "b"])


def test_shares_below_the_cap_and_adapters_without_one_stay(serve: Serve) -> None:
    registry = serve()
    route(registry, a=490.0, b=510.0)
    route(registry, c=1000.0)
    assert routed(registry) == "abc"
    assert registry.get("c").max_gate_share is None


def test_requests_that_name_an_adapter_do_not_count(serve: Serve) -> None:
    registry = serve()
    registry.record_traffic([(slot_of(registry, "a"), 10_000.0)], [])
    route(registry, b=800.0, c=200.0)
    assert routed(registry) == "abc"


def test_one_leaves_at_a_time_and_the_others_are_judged_without_it(serve: Serve) -> None:
    registry = serve()
    for _ in range(5):
        route(registry, a=600.0, b=400.0)
    assert routed(registry) == "bc"
    route(registry, b=10_000.0)
    assert routed(registry) == "c"
    assert registry.get("b").exclusion is not None


def test_equal_weights_under_another_name_do_not_take_its_place(serve: Serve) -> None:
    registry = serve()
    add(registry, "d", source="./a")
    route(registry, a=1000.0)
    assert routed(registry) == "bc"
    assert "the same weights are routed as 'a'" in str(registry.get("d").reason)


def test_registering_the_same_again_lets_it_in_and_counts_anew(serve: Serve, tmp_path: Path) -> None:
    registry = serve()
    route(registry, a=1000.0)
    let_lane_finish(registry)
    assert set(excluded(tmp_path)) == {"a"}
    info = registry.register(local("a"))
    assert (info.routed, info.exclusion, info.generation) == (True, None, 1)
    assert excluded(tmp_path) == {}
    route(registry, b=500.0, c=500.0)
    assert routed(registry) == "abc"
    route(registry, a=10_000.0)
    assert routed(registry) == "bc"


def test_another_cap_is_a_next_generation_which_begins_in_the_pool(serve: Serve) -> None:
    registry = serve()
    route(registry, a=1000.0)
    with pytest.raises(AdapterConflictError, match="taken by other content or settings"):
        registry.register(local("a", max_gate_share=0.8))
    registry.register(local("a", max_gate_share=0.8), expected=["*"])
    info = registry.wait("a", 30)
    registry._publisher.run(lambda: None)  # behind the collection in the lane: the row goes with the first generation
    registry._publisher.run(lambda: None)
    info = registry.get("a")
    assert (info.generation, info.max_gate_share, info.exclusion) == (2, 0.8, None)
    assert info.routed, info.reason


def test_a_restart_keeps_it_out_while_content_and_cap_are_the_same(serve: Serve, tmp_path: Path) -> None:
    registry = serve()
    route(registry, a=1000.0)
    let_lane_finish(registry)
    before = registry.get("a")
    for _ in range(2):
        registry = serve()
        assert registry.get("a").exclusion == before.exclusion
        assert registry.get("a").reason == before.reason
        assert routed(registry) == "bc"
    registry.retire("a")
    assert excluded(tmp_path) == {}
    assert registry.wait_retired("a", 30)
    add(registry, "a", max_gate_share=0.5)
    assert registry.get("a").routed


def test_a_configured_adapter_stays_out_until_its_cap_changes(serve: Serve) -> None:
    serve().retire("a")
    capped = local("a", max_gate_share=0.5)
    registry = serve(capped)
    route(registry, a=1000.0)
    let_lane_finish(registry)
    assert not serve(capped).get("a").routed
    assert serve(local("a", max_gate_share=0.6)).get("a").routed
    assert not serve(capped).get("a").routed, "nobody has let it in"
    serve(capped).register(capped)
    assert serve(capped).get("a").routed


def test_what_was_let_in_is_not_kept_out_by_a_late_write(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The note that it is out waits in the lane while it is let in again."""
    registry = serve()
    writes: list[Callable[[], None]] = []
    monkeypatch.setattr(registry._publisher, "enqueue", writes.append)
    route(registry, a=1000.0)
    assert len(writes) == 1
    registry.register(local("a"))
    writes[0]()
    assert excluded(tmp_path) == {}
    assert registry.get("a").routed


def test_a_disk_that_cannot_be_written_does_not_keep_it_in(serve: Serve, tmp_path: Path) -> None:
    registry = serve()
    (tmp_path / "adapters.state.excluded").mkdir()
    route(registry, a=1000.0)
    let_lane_finish(registry)
    assert routed(registry) == "bc"
    (tmp_path / "adapters.state.excluded").rmdir()


def test_infos_name_the_cap(serve: Serve) -> None:
    shown: dict[str, AdapterInfo] = {info.name: info for info in serve().list()}
    assert {name: info.max_gate_share for name, info in shown.items()} == {"a": 0.5, "b": 0.9, "c": None}
    assert json.dumps([info.to_dict() for info in shown.values()])
