"""The life of adapters in the registry: register, lease, retire, fail, and the router they share."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from server.adapters.hub import HubSource
from server.adapters.hub_retry import RetryPolicy
from server.adapters.records import AdapterInfo, AdapterState, Record
from server.adapters.registry import AdapterRegistry
from server.config import AdapterSpec, ServerSettings
from server.errors import (
    AdapterConflictError,
    AdapterNotFoundError,
    InvalidRequestError,
    ModelNotFoundError,
    NotReadyError,
    RouterArtefactError,
)
from server.routing.attach import RoutedModel, attach_routing
from server.routing.policy import Policy
from tests.adapters.fake_hub import FakeHub, Fault
from tests.adapters.folders import BASE, WEIGHTS, copied, edit_config
from tests.adapters.harness import StepThread, add, local, run_inline, save_router

MakeRegistry = Callable[..., AdapterRegistry]


def digests(registry: AdapterRegistry) -> list[tuple[str, str]]:
    return [(info.name, info.digest) for info in registry.list() if info.digest is not None]


# Registration


def test_a_local_adapter_becomes_ready_and_pinned_requests_get_its_slot(
    registry: AdapterRegistry, routed: RoutedModel
) -> None:
    started = registry.register(local("a", description="first"))
    assert started.state in (AdapterState.DOWNLOADING, AdapterState.VALIDATING, AdapterState.READY)
    info = registry.wait("a", 30)
    assert (info.state, info.rank, info.targets, info.generation) == (AdapterState.READY, 1, ("q_proj",), 1)
    assert (info.description, info.progress, info.revision, info.source) == ("first", 1.0, None, "./a")
    assert not info.routed
    assert info.reason == "no router is loaded: served by name only"
    lease = registry.lease("a")
    assert (lease.plan.policy, lease.plan.weights, lease.model) == (Policy.PINNED, ((1, 1.0),), "a")
    assert routed.bank.snapshot.slots == {1}
    lease.release()


def test_infos_are_json_with_every_field_of_the_public_interface(registry: AdapterRegistry) -> None:
    add(registry, "a")
    record = json.loads(json.dumps(registry.get("a").to_dict()))
    assert {"name", "state", "source", "revision", "digest", "rank", "targets", "routed", "reason", "bytes", "progress",
            "traffic_share", "generation"} <= set(record)  # fmt: skip
    assert record["state"] == "READY"


def test_a_list_is_made_without_the_mutex_that_every_step_takes(
    registry: AdapterRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(registry, "a", "b")
    usual = Record.info
    with ThreadPoolExecutor(1) as engine:

        def info(record: Record, **facts: Any) -> AdapterInfo:
            engine.submit(registry.record_traffic, [(1, 1.0)]).result(10)
            return usual(record, **facts)

        monkeypatch.setattr(Record, "info", info)
        shares = {info.name: info.traffic_share for info in registry.list()}
    assert shares == {"a": 0.0, "b": 0.0}, "all of one moment"


def test_adapters_take_the_lowest_free_slots_and_are_listed_in_order(
    registry: AdapterRegistry, routed: RoutedModel
) -> None:
    add(registry, "b", "a", "c")
    assert [info.name for info in registry.list()] == ["b", "a", "c"]
    assert [adapter.slot for adapter in registry.roster.adapters.values()] == [1, 2, 3]
    registry.retire("a")
    assert registry.wait_retired("a", 30)
    add(registry, "d")
    assert registry.roster.adapters["d"].slot == 2
    assert routed.bank.snapshot.slots == {1, 2, 3}


def test_other_adapters_rows_stay_bit_identical(registry: AdapterRegistry, routed: RoutedModel) -> None:
    add(registry, "b")
    name = "model.layers.1.self_attn.q_proj"
    before = routed.bank.snapshot.projections[name]
    add(registry, "a")
    registry.retire("b")
    add(registry, "c")
    registry.wait_retired("b", 30)
    registry.retire("a")
    add(registry, "b")
    after = routed.bank.snapshot.projections[name]
    assert torch.equal(after.a[:2], before.a[:2])
    assert torch.equal(after.b[:, :2], before.b[:, :2])


def test_registering_equal_content_again_gives_the_same_adapter(registry: AdapterRegistry, sources: Path) -> None:
    add(registry, "a", description="first")
    info = registry.get("a")
    for source, subfolder in (("./a", None), ("./b/../a", None), (str(sources), "a"), (str(sources / "a"), ".")):
        assert registry.register(AdapterSpec(name="a", source=source, subfolder=subfolder)) == info


def test_a_taken_name_refuses_other_content(make_registry: MakeRegistry, sources: Path, tmp_path: Path) -> None:
    copied(sources / "a", tmp_path / "a")
    copied(sources / "b", tmp_path / "b")
    registry = make_registry(root=tmp_path)
    add(registry, "a")
    for spec in (local("a", "b"), local("a", routed=False), local("a", description="other")):
        with pytest.raises(AdapterConflictError, match="taken by other content"):
            registry.register(spec)
    edit_config(tmp_path / "a", {"lora_alpha": 99})
    with pytest.raises(AdapterConflictError, match="taken by other content"):
        registry.register(local("a"))
    edit_config(tmp_path / "a", {"use_dora": True})
    with pytest.raises(AdapterConflictError, match="can no longer be loaded"):
        registry.register(local("a"))
    assert registry.get("a").state is AdapterState.READY


@pytest.mark.parametrize("name", ["auto", "AUTO", "base", "Base", "plain-base"])
def test_reserved_names_are_refused_in_any_case(make_registry: MakeRegistry, name: str) -> None:
    registry = make_registry(base_model_name="Plain-Base")
    with pytest.raises(InvalidRequestError) as caught:
        registry.register(local(name, "a"))
    assert (caught.value.param, caught.value.code) == ("name", "reserved_name")


def test_a_refused_adapter_is_failed_with_every_reason_and_may_be_registered_again(
    make_registry: MakeRegistry, sources: Path, tmp_path: Path, routed: RoutedModel
) -> None:
    copied(sources / "a", tmp_path / "a")
    edit_config(tmp_path / "a", {"use_dora": True, "bias": "all"})
    heard: list[str] = []
    registry = make_registry(root=tmp_path, on_load=lambda outcome, _: heard.append(outcome))
    registry.register(local("a"))
    info = registry.wait("a", 30)
    assert (info.state, info.code) == (AdapterState.FAILED, "adapter_refused")
    assert {reason.code for reason in info.reasons} == {"dora", "bias"}
    assert json.dumps(info.to_dict())
    with pytest.raises(ModelNotFoundError):
        registry.lease("a")
    assert routed.bank.snapshot.slots == frozenset()
    edit_config(tmp_path / "a", {"use_dora": False, "bias": "none"})
    add(registry, "a")
    assert registry.get("a").generation == 2
    registry.close()
    assert heard == ["adapter_refused", "ready"]


def test_a_failed_adapter_can_be_removed_at_once(registry: AdapterRegistry) -> None:
    registry.register(local("missing"))
    assert [reason.code for reason in registry.wait("missing", 30).reasons] == ["missing_folder"]
    registry.retire("missing")
    with pytest.raises(AdapterNotFoundError):
        registry.get("missing")


def test_only_so_many_adapters_and_failures_are_kept(registry: AdapterRegistry) -> None:
    for index in range(8):
        registry.register(local(f"missing{index}"))
        registry.wait(f"missing{index}", 30)
    assert [info.name for info in registry.list()] == [f"missing{index}" for index in (4, 5, 6, 7)]
    add(registry, "a", "b", "c", "d")
    with pytest.raises(AdapterConflictError) as caught:
        registry.register(local("e", "a"))
    assert caught.value.code == "too_many_adapters"


def test_unknown_names_are_not_found(registry: AdapterRegistry) -> None:
    for call in (registry.get, registry.retire, registry.wait):
        with pytest.raises(AdapterNotFoundError):
            call("nobody")


def test_a_closed_registry_changes_nothing_but_lets_leases_go(registry: AdapterRegistry) -> None:
    """Another server may own its journal by then."""
    add(registry, "a", "b")
    lease = registry.lease("a")
    registry.retire("a")
    registry.close()
    lease.release()
    assert not registry.has_leases
    with pytest.raises(NotReadyError):
        registry.register(local("c"))
    with pytest.raises(NotReadyError):
        registry.register(local("b", "c"), expected=["*"])
    with pytest.raises(NotReadyError):
        registry.retire("b")
    assert registry.get("b").state is AdapterState.READY


# Retirement and leases


def test_retiring_refuses_new_requests_at_once_and_keeps_rows_until_the_last_lease(
    registry: AdapterRegistry, routed: RoutedModel
) -> None:
    add(registry, "a", "b")
    leases = [registry.lease("a"), registry.lease("auto", adapters={"a": 0.5, "b": 1.0})]
    assert registry.retire("a").state is AdapterState.RETIRING
    assert registry.retire("a").state is AdapterState.RETIRING
    for model, adapters in (("a", None), ("auto", {"a": 1.0})):
        with pytest.raises((ModelNotFoundError, InvalidRequestError)):
            registry.lease(model, adapters=adapters)
    with pytest.raises(AdapterConflictError, match="RETIRING"):
        registry.register(local("a"))
    leases.pop().release()
    assert not registry.wait_retired("a", 0.05)
    assert routed.bank.snapshot.slots == {1, 2}
    leases.pop().release()
    assert registry.wait_retired("a", 30)
    assert routed.bank.snapshot.slots == {2}
    assert not registry.has_leases


def test_a_slot_is_not_reused_while_a_request_still_holds_it(registry: AdapterRegistry) -> None:
    add(registry, "a")
    old = registry.lease("a")
    registry.retire("a")
    add(registry, "b")
    assert old.plan.slots == (1,)
    assert registry.roster.adapters["b"].slot == 2
    old.release()
    assert registry.wait_retired("a", 30)
    add(registry, "a")
    assert (registry.roster.adapters["a"].slot, registry.get("a").generation) == (1, 2)


def test_releasing_twice_counts_once(registry: AdapterRegistry) -> None:
    add(registry, "a")
    first, second = registry.lease("a"), registry.lease("a")
    first.release()
    first.release()
    assert registry.has_leases
    second.release()
    assert not registry.has_leases


def test_a_rejected_lease_holds_nothing(registry: AdapterRegistry) -> None:
    add(registry, "a")
    with pytest.raises(InvalidRequestError):
        registry.lease("auto", adapters={"a": 1.0, "nobody": 1.0})
    assert not registry.has_leases


# Publication


def test_nothing_is_visible_until_a_step_has_ended(make_registry: MakeRegistry, routed: RoutedModel) -> None:
    gate = threading.Event()
    thread = StepThread(lambda: gate.wait(30))
    try:
        registry = make_registry(run_between_steps=thread)
        registry.register(local("a"))
        assert registry.wait("a", 0.3).state is AdapterState.VALIDATING
        with pytest.raises(ModelNotFoundError):
            registry.lease("a")
        assert routed.bank.snapshot.slots == frozenset()
        gate.set()
        assert registry.wait("a", 30).state is AdapterState.READY
        assert routed.bank.snapshot.slots == {1}
    finally:
        gate.set()
        thread.stop()


def test_who_waits_hears_when_an_adapter_is_ready_or_gone(make_registry: MakeRegistry) -> None:
    gate = threading.Event()
    thread = StepThread(lambda: gate.wait(30))
    try:
        registry = make_registry(run_between_steps=thread)
        for name in "ab":
            registry.register(local(name))
        outcomes = [registry.settling(name) for name in "aab"]
        assert not any(outcome.done() or outcome.cancel() for outcome in outcomes)
        registry.retire("b")
        assert [outcome.done() for outcome in outcomes] == [False, False, True]
        gate.set()
        for outcome in outcomes:
            outcome.result(30)
        assert registry.get("a").is_settled
        assert registry.settling("a").done()
        with pytest.raises(AdapterNotFoundError):
            registry.settling("nobody")
    finally:
        gate.set()
        thread.stop()


def test_slots_follow_the_order_of_registration_whoever_loads_first(
    registry: AdapterRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates are added in the order of slots: after a restart sums must be those of before, to the last bit."""
    load, may_load = type(registry.loader).load, {name: threading.Event() for name in "ab"}

    def in_turn(loader: Any, spec: AdapterSpec, *arguments: Any, **options: Any) -> Any:
        assert may_load[spec.name].wait(30)
        return load(loader, spec, *arguments, **options)

    monkeypatch.setattr(type(registry.loader), "load", in_turn)
    for name in "ab":
        registry.register(local(name))
    for name in "ba":
        may_load[name].set()
        assert registry.wait(name, 30).state is AdapterState.READY
    assert {slot: name for slot, name in registry.roster.slot_names.items() if slot} == {1: "a", 2: "b"}


@pytest.mark.parametrize("part", ["with_adapter", "publish", "commit"])
def test_a_publication_that_fails_leaves_nothing_behind(
    part: str, registry: AdapterRegistry, routed: RoutedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(registry, "a")
    before = routed.bank.snapshot
    target: Any = registry._state if part == "commit" else routed.bank
    original = getattr(target, part)
    failures = iter([RuntimeError("on purpose")])

    def fail_once(*arguments: Any, **options: Any) -> Any:
        for failure in failures:
            raise failure
        return original(*arguments, **options)

    monkeypatch.setattr(target, part, fail_once)
    registry.register(local("b"))
    info = registry.wait("b", 30)
    assert (info.state, info.code) == (AdapterState.FAILED, "internal_error")
    assert routed.bank.snapshot is before
    assert set(registry.roster.adapters) == {"a"}
    add(registry, "b")
    assert registry.roster.adapters["b"].slot == 2


def test_an_engine_that_never_steps_does_not_hang_the_shutdown(make_registry: MakeRegistry) -> None:
    registry = make_registry(run_between_steps=lambda _: Future())
    registry.register(local("a"))
    registry.wait("a", 0.2)
    registry.close()
    assert not registry.roster.adapters


# Hub sources


def test_a_hub_adapter_is_pinned_to_its_commit_and_locked(
    make_registry: MakeRegistry, hub: FakeHub, sources: Path, tmp_path: Path
) -> None:
    commit = hub.push_folder("org/a", sources / "a")
    registry = make_registry(
        hub=HubSource(endpoint=hub.endpoint, cache_folder=tmp_path / "cache"), lockfile=tmp_path / "adapters.lock"
    )
    spec = AdapterSpec(name="a", source="org/a", revision="main")
    registry.register(spec)
    info = registry.wait("a", 30)
    assert (info.state, info.revision, info.progress) == (AdapterState.READY, commit, 1.0)
    entry = json.loads((tmp_path / "adapters.lock").read_text())["adapters"][0]
    assert (entry["commit"], entry["digest"]) == (commit, info.digest)
    assert registry.register(spec) == info
    assert registry.register(spec.model_copy(update={"revision": commit})) == info
    with pytest.raises(AdapterConflictError):
        registry.register(spec.model_copy(update={"revision": "other"}))


def test_a_locked_commit_survives_a_moved_branch_and_needs_no_network(
    sources: Path, tmp_path: Path, hub: FakeHub, tiny_llama: "Callable[..., LlamaForCausalLM]"
) -> None:
    revisions, num_requests = [], []
    for pushed in ("a", "b"):
        commit = hub.push_folder("org/a", sources / pushed)
        registry = AdapterRegistry(
            attach_routing(tiny_llama(), num_slots=3),
            base_model_name=BASE,
            settings=ServerSettings(max_adapters=2),
            run_between_steps=run_inline,
            hub=HubSource(endpoint=hub.endpoint, cache_folder=tmp_path / "cache"),
            lockfile=tmp_path / "adapters.lock",
        )
        registry.register(AdapterSpec(name="a", source="org/a"))
        revisions.append(registry.wait("a", 30).revision)
        num_requests.append(len(hub.requests))
        registry.close()
    assert revisions[0] == revisions[1] != commit
    assert num_requests[0] == num_requests[1] > 0


def test_retiring_a_hub_adapter_lets_its_branch_resolve_anew(
    make_registry: MakeRegistry, hub: FakeHub, sources: Path, tmp_path: Path
) -> None:
    hub.push_folder("org/a", sources / "a")
    registry = make_registry(
        hub=HubSource(endpoint=hub.endpoint, cache_folder=tmp_path / "cache"), lockfile=tmp_path / "adapters.lock"
    )
    spec = AdapterSpec(name="a", source="org/a")
    registry.register(spec)
    registry.wait("a", 30)
    newer = hub.push_folder("org/a", sources / "b")
    registry.retire("a")
    assert registry.wait_retired("a", 30)
    registry.close()
    assert json.loads((tmp_path / "adapters.lock").read_text())["adapters"] == []
    registry = make_registry(
        hub=HubSource(endpoint=hub.endpoint, cache_folder=tmp_path / "cache"), lockfile=tmp_path / "adapters.lock"
    )
    registry.register(spec)
    assert registry.wait("a", 30).revision == newer


def test_a_download_error_is_failed_with_its_code_and_a_retry_succeeds(
    make_registry: MakeRegistry, hub: FakeHub, sources: Path, tmp_path: Path
) -> None:
    hub.push_folder("org/a", sources / "a")
    hub.fail(Fault("/api/models", status=503))
    no_retries = RetryPolicy(num_retries=0)
    registry = make_registry(hub=HubSource(endpoint=hub.endpoint, cache_folder=tmp_path / "cache", retries=no_retries))
    registry.register(AdapterSpec(name="a", source="org/a"))
    info = registry.wait("a", 30)
    assert (info.state, info.code) == (AdapterState.FAILED, "adapter_download_failed")
    assert "HTTP 503" in str(info.reason)
    registry.register(AdapterSpec(name="a", source="org/a"))
    assert registry.wait("a", 30).state is AdapterState.READY


@pytest.mark.parametrize("status", [404, 503])
def test_a_source_that_is_neither_on_the_hub_nor_a_folder_is_told_to_be_neither(
    status: int, make_registry: MakeRegistry, hub: FakeHub, sources: Path, tmp_path: Path
) -> None:
    hub.fail(Fault("/api/models", status=status))
    no_retries = RetryPolicy(num_retries=0)
    registry = make_registry(hub=HubSource(endpoint=hub.endpoint, cache_folder=tmp_path / "cache", retries=no_retries))
    registry.register(AdapterSpec(name="a", source="lora/a", subfolder="b"))
    assert str(registry.wait("a", 30).reason).endswith(f". If a folder is meant: there is none at {sources}/lora/a")


def test_retiring_abandons_a_running_download(
    make_registry: MakeRegistry, hub: FakeHub, sources: Path, tmp_path: Path, routed: RoutedModel
) -> None:
    hub.push_folder("org/a", sources / "a")
    hub.fail(Fault("/cdn/", drip_s=0.05, piece_bytes=10, times=9))
    heard: list[str] = []
    registry = make_registry(
        hub=HubSource(endpoint=hub.endpoint, cache_folder=tmp_path / "cache"),
        on_load=lambda outcome, _: heard.append(outcome),
    )
    spec = AdapterSpec(name="a", source="org/a")
    registry.register(spec)
    assert registry.register(spec).state.is_loading
    while not registry.get("a").downloaded_bytes:
        threading.Event().wait(0.01)
    with pytest.raises(AdapterConflictError, match="wait until that has ended"):
        registry.register(AdapterSpec(name="a", source="org/other"))
    assert registry.retire("a").state is AdapterState.RETIRING
    assert registry.wait_retired("a", 30)
    registry.close()
    assert heard == ["cancelled"]
    assert routed.bank.snapshot.slots == frozenset()
    assert not list(tmp_path.rglob("*.partial"))


def test_what_has_come_of_a_download_stays_until_its_adapter_is_retired(
    make_registry: MakeRegistry, hub: FakeHub, sources: Path, tmp_path: Path
) -> None:
    hub.push_folder("org/a", sources / "a")
    hub.fail(Fault("/cdn/", cut_at=100, times=9))
    source = HubSource(endpoint=hub.endpoint, cache_folder=tmp_path, retries=RetryPolicy(0))
    spec = AdapterSpec(name="a", source="org/a")
    for ends in (True, False):
        registry = make_registry(hub=source)
        registry.register(spec)
        assert registry.wait("a", 30).state is AdapterState.FAILED
        if ends:
            registry.close()
        assert len(list(tmp_path.rglob("*.partial"))) == 1
    registry.retire("a")
    assert not list(tmp_path.rglob("*.partial"))


def test_a_lock_that_cannot_be_written_does_not_stop_an_adapter(
    make_registry: MakeRegistry, hub: FakeHub, sources: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.push_folder("org/a", sources / "a")
    registry = make_registry(
        hub=HubSource(endpoint=hub.endpoint, cache_folder=tmp_path / "cache"), lockfile=tmp_path / "no" / "folder.lock"
    )
    registry.register(AdapterSpec(name="a", source="org/a"))
    assert registry.wait("a", 30).state is AdapterState.READY
    assert "could not record org/a" in caplog.text


def test_links_of_a_local_adapter_must_not_leave_its_folder(
    make_registry: MakeRegistry, sources: Path, tmp_path: Path
) -> None:
    folder = copied(sources / "a", tmp_path / "a")
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(sources / "a" / WEIGHTS)
    registry = make_registry(root=tmp_path)
    registry.register(local("a"))
    assert [reason.code for reason in registry.wait("a", 30).reasons] == ["symlink_escape"]


# Router


def test_a_router_routes_the_adapters_it_knows(registry: AdapterRegistry, routed: RoutedModel, tmp_path: Path) -> None:
    add(registry, "a", "b", "c")
    assert registry.router_info() == {"loaded": False}
    facts = registry.swap_router(save_router(tmp_path, routed, digests(registry)[:2]))
    assert (facts["loaded"], facts["generation"], facts["top_k"], facts["granularity"]) == (True, 1, 2, "layer")
    assert [known["served_as"] for known in facts["adapters"]] == ["a", "b"]
    assert json.dumps(facts)
    assert {info.name: info.routed for info in registry.list()} == {"a": True, "b": True, "c": False}
    lease = registry.lease("auto")
    assert (lease.plan.allowed_slots, lease.plan.router_generation) == ((1, 2), 1)
    lease.release()


def test_an_adapter_that_the_router_knows_is_routed_as_soon_as_it_is_registered(
    registry: AdapterRegistry, routed: RoutedModel, tmp_path: Path
) -> None:
    add(registry, "a", "b")
    known = digests(registry)
    registry.retire("b")
    registry.wait_retired("b", 30)
    registry.swap_router(save_router(tmp_path, routed, known))
    running = registry.lease("auto")
    rows = routed.routers.generations[1].rows["layer.0"]
    add(registry, "b")
    assert registry.get("b").routed
    assert registry.lease("auto").plan.allowed_slots == (1, 2)
    assert running.plan.allowed_slots == (1,)
    assert torch.equal(routed.routers.generations[1].rows["layer.0"][1], rows[1])


def test_a_swapped_router_serves_new_requests_and_the_old_one_goes_with_its_last(
    registry: AdapterRegistry, routed: RoutedModel, tmp_path: Path
) -> None:
    add(registry, "a", "b")
    registry.swap_router(save_router(tmp_path / "1", routed, digests(registry), seed=1))
    old = registry.lease("auto")
    registry.swap_router(save_router(tmp_path / "2", routed, digests(registry), seed=2))
    new = registry.lease("auto")
    assert (old.plan.router_generation, new.plan.router_generation) == (1, 2)
    assert old.plan.fingerprint != new.plan.fingerprint
    assert set(routed.routers.generations) == {1, 2}
    old.release()
    new.release()
    registry._publisher.run(lambda: None)  # behind the collection in the lane
    assert set(routed.routers.generations) == {2}


def test_a_running_request_keeps_the_gate_rows_of_an_adapter_that_retires(
    registry: AdapterRegistry, routed: RoutedModel, tmp_path: Path
) -> None:
    add(registry, "a", "b")
    registry.register(local("twin", "a"))
    registry.wait("twin", 30)
    registry.swap_router(save_router(tmp_path, routed, digests(registry)[:2]))
    before = routed.routers.generations[1]
    running = registry.lease("auto")
    registry.retire("a")
    add(registry, "c")
    after = routed.routers.generations[1]
    assert running.plan.allowed_slots == (1, 2)
    assert after.slots == before.slots
    assert all(torch.equal(after.rows[key], rows) for key, rows in before.rows.items())
    assert "retiring" in str(registry.get("twin").reason)
    running.release()
    assert registry.wait_retired("a", 30)
    assert registry.get("twin").routed


def test_equal_weights_are_routed_once_and_the_twin_takes_over(
    registry: AdapterRegistry, routed: RoutedModel, tmp_path: Path
) -> None:
    add(registry, "a", "b")
    registry.register(local("twin", "a"))
    registry.wait("twin", 30)
    registry.swap_router(save_router(tmp_path, routed, digests(registry)[:2]))
    assert (registry.get("a").routed, registry.get("twin").routed) == (True, False)
    registry.retire("a")
    assert registry.wait_retired("a", 30)
    assert registry.get("twin").routed
    assert registry.lease("auto").plan.allowed_slots == (2, 3)


def test_adapters_that_must_not_be_routed_are_not(
    registry: AdapterRegistry, routed: RoutedModel, tmp_path: Path
) -> None:
    add(registry, "a")
    add(registry, "b", routed=False)
    registry.swap_router(save_router(tmp_path, routed, digests(registry)))
    assert registry.lease("auto").plan.allowed_slots == (1,)
    assert "routed: false" in str(registry.get("b").reason)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"base_model": "test/other"}, "another base"),
        ({"hidden_size": 64, "num_layers": 2}, "number of layers"),
        ({"rows": {"layer.9": torch.ones(1, 64)}}, "belongs to no layer"),
        ({"granularity": "projection", "rows": {"model.layers.0.mlp.down_proj": torch.ones(1, 64)}}, "reads 64 values"),
        ({"granularity": "projection", "rows": {"lm_head": torch.ones(1, 64)}}, "belongs to no projection"),
    ],
)
def test_routers_for_another_model_are_refused_by_name(
    registry: AdapterRegistry, routed: RoutedModel, tmp_path: Path, fields: dict[str, Any], problem: str
) -> None:
    add(registry, "a")
    folder = save_router(tmp_path, routed, digests(registry), **fields)
    with pytest.raises(RouterArtefactError, match=problem):
        registry.swap_router(folder)
    assert registry.router_info() == {"loaded": False}
    assert routed.routers.generations == {}


def test_gate_rows_for_other_weights_of_a_registered_name_are_refused(
    registry: AdapterRegistry, routed: RoutedModel, tmp_path: Path
) -> None:
    add(registry, "a", "b")
    registry.swap_router(save_router(tmp_path / "1", routed, digests(registry)))
    with pytest.raises(RouterArtefactError, match="'b' was trained for digest ffff"):
        registry.swap_router(save_router(tmp_path / "2", routed, [digests(registry)[0], ("b", "f" * 64)]))
    assert registry.router_info()["generation"] == 1


def test_auto_without_a_router_is_refused_and_base_is_not(registry: AdapterRegistry) -> None:
    add(registry, "a")
    with pytest.raises(InvalidRequestError) as caught:
        registry.lease("auto")
    assert caught.value.code == "router_unavailable"
    assert registry.lease(BASE).plan.policy is Policy.BASE


# Traffic


def test_traffic_shares_are_gate_mass_over_all_gate_mass(registry: AdapterRegistry) -> None:
    add(registry, "a", "b")
    registry.record_traffic([(0, 2.0), (1, 1.0)])
    registry.record_traffic([(1, 0.5), (2, 0.5), (4, 1.0)])
    assert {info.name: info.traffic_share for info in registry.list()} == {"a": 0.3, "b": 0.1}
    registry.retire("a")
    registry.wait_retired("a", 30)
    add(registry, "c")
    assert {info.name: info.traffic_share for info in registry.list()} == {"b": 0.1, "c": 0.0}
