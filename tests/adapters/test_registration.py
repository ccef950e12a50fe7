"""Generations, guards, limits and restarts of registrations."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from server.adapters.hub import HubSource
from server.adapters.lockfile import LockKey
from server.adapters.records import AdapterState
from server.adapters.registration import NUM_DOWNLOADERS
from server.adapters.registry import AdapterRegistry
from server.adapters.weights import Adapter
from server.config import AdapterSpec, ServerSettings
from server.errors import (
    AdapterConflictError,
    AdapterNotFoundError,
    LoraMixerError,
    PreconditionFailedError,
    TooManyRegistrationsError,
)
from server.naming import are_confusable
from server.routing.attach import RoutedModel, attach_routing
from tests.adapters.fake_hub import FakeHub, Fault
from tests.adapters.folders import copied, edit_config
from tests.adapters.harness import add, local, save_router

MakeRegistry = Callable[..., AdapterRegistry]


@pytest.fixture
def restart(
    make_registry: MakeRegistry, tiny_llama: "Callable[..., LlamaForCausalLM]", tmp_path: Path
) -> Callable[..., AdapterRegistry]:
    """`restart()`: the server of before is gone, a new one with the same journal has loaded what it should."""
    alive: list[AdapterRegistry] = []

    def start(*configured: AdapterSpec, num_slots: int = 5, **options: object) -> AdapterRegistry:
        for registry in alive:
            registry.close()
        alive[:] = [make_registry(routed_model=attach_routing(tiny_llama(), num_slots=num_slots),
                                  journal=tmp_path / "adapters.state", **options)]  # fmt: skip
        for name in alive[0].restore(configured):
            alive[0].wait(name, 30)
        return alive[0]

    return start


def shown(registry: AdapterRegistry) -> dict[str, tuple[str, int, str | None]]:
    return {info.name: (info.state.value, info.generation, info.digest) for info in registry.list()}


# Generations


def test_other_content_replaces_the_adapter_and_running_requests_keep_theirs(
    registry: AdapterRegistry, routed: RoutedModel
) -> None:
    add(registry, "a", "b")
    before = registry.get("a")
    running = registry.lease("a")
    assert registry.register(local("a", "c"), expected=[before.etag]).replacement is not None
    after = registry.wait("a", 30)
    assert (after.state, after.generation, after.replacement) == (AdapterState.READY, 2, None)
    assert after.digest != before.digest
    assert after.etag != before.etag
    assert registry.lease("a").plan.slots != running.plan.slots
    assert set(running.plan.slots) <= routed.bank.snapshot.slots
    assert [info.name for info in registry.list()] == ["a", "b"]
    running.release()
    registry._publisher.run(lambda: None)  # behind the collection in the lane
    assert running.plan.slots[0] not in routed.bank.snapshot.slots


@pytest.mark.parametrize("is_configured", [False, True])
def test_a_replacement_that_finds_no_room_is_not_what_a_restart_serves(
    restart: Callable[..., AdapterRegistry], is_configured: bool
) -> None:
    configured = (local("a"),) if is_configured else ()
    registry = restart(*configured)
    if not is_configured:
        add(registry, "a")
    budget = 1.5 * registry.get("a").memory_bytes / 2**20  # a has rank 1, d four times that
    settings = ServerSettings(max_adapters=4, adapter_memory_mib=budget)
    registry = restart(*configured, settings=settings)
    before = shown(registry)
    registry.register(local("a", "d"), expected=["*"])
    replacement = registry.wait("a", 30).replacement
    assert replacement is not None
    assert [reason.code for reason in replacement.reasons] == ["adapter_memory_full"]
    assert shown(restart(*configured, settings=settings)) == before
    assert [state for state, _, _ in before.values()] == ["READY"]


@pytest.mark.parametrize("is_configured", [False, True])
def test_a_replacement_that_cannot_be_published_is_not_what_a_restart_serves(
    restart: Callable[..., AdapterRegistry], is_configured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured = (local("a"),) if is_configured else ()
    registry = restart(*configured)
    if not is_configured:
        add(registry, "a")
    before = shown(registry)
    with monkeypatch.context() as patch:
        patch.setattr(registry._residency, "_staged_router", lambda *_: 1 / 0)
        registry.register(local("a", "b"), expected=["*"])
        replacement = registry.wait("a", 30).replacement
    assert replacement is not None
    assert replacement.state is AdapterState.FAILED
    assert shown(restart(*configured)) == before


def test_a_disk_that_fills_up_while_an_adapter_loads_is_told_as_that(
    restart: Callable[..., AdapterRegistry], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = restart()
    usual = os.pwrite

    def until_confirmed(descriptor: int, line: bytes, position: int) -> int:
        return usual(descriptor, line[: 9 if b'"digest": "' in line else None], position)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", until_confirmed)
        registry.register(local("a"))
        info = registry.wait("a", 30)
    assert (info.state, info.code) == (AdapterState.FAILED, "registry_not_writable")
    assert "(No space left on device), so generation 1 of 'a' cannot serve; free space" in str(info.reason)
    assert restart().get("a").state is AdapterState.READY


def test_a_replacement_that_fails_leaves_the_adapter_as_it_was(
    make_registry: MakeRegistry, sources: Path, tmp_path: Path
) -> None:
    for name in "ab":
        copied(sources / name, tmp_path / name)
    edit_config(tmp_path / "b", {"use_dora": True})
    registry = make_registry(root=tmp_path)
    add(registry, "a")
    before = registry.get("a")
    registry.register(local("a", "b"), expected=["*"])
    info = registry.wait("a", 30)
    assert (info.state, info.digest, info.etag) == (AdapterState.READY, before.digest, before.etag)
    assert info.replacement is not None
    assert (info.replacement.state, info.replacement.generation) == (AdapterState.FAILED, 2)
    assert [reason.code for reason in info.replacement.reasons] == ["dora"]
    assert json.dumps(info.to_dict())
    registry.lease("a").release()
    assert registry.register(local("a")).replacement is None
    edit_config(tmp_path / "b", {"use_dora": False})
    registry.register(local("a", "b"), expected=[before.etag])
    assert registry.wait("a", 30).generation == 3


def test_a_routed_adapter_leaves_its_row_to_nobody(
    registry: AdapterRegistry, routed: RoutedModel, tmp_path: Path
) -> None:
    add(registry, "a", "b")
    registry.swap_router(save_router(tmp_path, routed, [(i.name, str(i.digest)) for i in registry.list()]))
    running = registry.lease("auto")
    registry.register(local("a", "c"), expected=["*"])
    info = registry.wait("a", 30)
    assert not info.routed
    assert "belongs to other weights" in str(info.reason)
    assert registry.lease("auto").plan.allowed_slots == (2,)
    assert running.plan.allowed_slots == (1, 2)


def test_guards_compare_what_is_there_with_what_the_caller_saw(registry: AdapterRegistry) -> None:
    for expected in (["*"], ['"1-abc"']):
        with pytest.raises(PreconditionFailedError, match="none to replace"):
            registry.register(local("a"), expected=expected)
    add(registry, "a")
    etag = registry.get("a").etag
    with pytest.raises(PreconditionFailedError, match="look at it again"):
        registry.register(local("a", "b"), expected=['"1-0"'])
    with pytest.raises(PreconditionFailedError, match="look at it again"):
        registry.retire("a", expected=['"1-0"', "W/" + etag])
    assert registry.get("a").etag == etag
    registry.retire("a", expected=['"9-x"', etag])
    assert registry.wait_retired("a", 30)
    with pytest.raises(AdapterNotFoundError):
        registry.retire("a", expected=[etag])
    add(registry, "a")
    assert registry.get("a").etag != etag, "the same content under a later generation is not what the caller saw"


def test_of_many_callers_with_one_etag_one_wins(make_registry: MakeRegistry) -> None:
    registry = make_registry()
    add(registry, "a")
    etag = registry.get("a").etag
    outcomes: list[str] = []

    def replace(source: str) -> None:
        try:
            registry.register(local("a", source), expected=[etag])
            outcomes.append(registry.wait("a", 30).state)
        except LoraMixerError as error:
            outcomes.append(str(error.code))

    threads = [threading.Thread(target=replace, args=(source,)) for source in "bcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert outcomes.count("READY") == 1, outcomes
    assert set(outcomes) <= {"READY", "adapter_conflict", "precondition_failed"}
    assert registry.get("a").generation == 2


# Limits and names


def test_only_so_many_registrations_run_at_once(
    make_registry: MakeRegistry, hub: FakeHub, sources: Path, tmp_path: Path
) -> None:
    hub.push_folder("org/a", sources / "a")
    hub.fail(Fault("/api/models", delay_s=1.0, times=9))
    registry = make_registry(
        hub=HubSource(endpoint=hub.endpoint, cache_folder=tmp_path / "cache"),
        settings=ServerSettings(max_adapters=4, max_loading_adapters=2),
    )
    for name in "xy":
        registry.register(AdapterSpec(name=name, source="org/a"))
    with pytest.raises(TooManyRegistrationsError, match="2 adapters are loading"):
        registry.register(AdapterSpec(name="z", source="org/a"))
    assert registry.register(AdapterSpec(name="x", source="org/a")).state.is_loading
    assert registry.wait("x", 30).state is registry.wait("y", 30).state is AdapterState.READY
    add(registry, "a")


@pytest.fixture
def dripping(
    make_registry: MakeRegistry, hub: FakeHub, sources: Path, tmp_path: Path
) -> Callable[..., AdapterRegistry]:
    """`dripping(names)`: a registry that waits for a Hub that drips headers, with a registration under each name."""
    hub.push_folder("org/slow", sources / "a")
    hub.push_folder("org/sound", sources / "b")
    hub.fail(Fault("org/slow", header_drip_s=0.1, times=99))

    def start(names: Iterable[str], download_timeout_s: float = 60.0) -> AdapterRegistry:
        registry = make_registry(
            hub=HubSource(
                endpoint=hub.endpoint, cache_folder=tmp_path / "cache", download_timeout_s=download_timeout_s
            ),
            settings=ServerSettings(max_adapters=16),
        )
        for name in names:
            registry.register(AdapterSpec(name=name, source="org/slow"))
        while hub.count("GET", "org/slow") < min(len(registry.list()), NUM_DOWNLOADERS):
            time.sleep(0.01)
        return registry

    return start


def test_a_hub_that_drips_holds_up_nobody_else(dripping: Callable[..., AdapterRegistry]) -> None:
    registry = dripping("xyz")
    add(registry, "a")
    registry.register(AdapterSpec(name="b", source="org/sound"))
    assert registry.wait("b", 10).state is AdapterState.READY
    assert all(registry.get(name).state is AdapterState.DOWNLOADING for name in "xyz")


def test_local_folders_do_not_wait_for_downloads_however_many(dripping: Callable[..., AdapterRegistry]) -> None:
    registry = dripping([f"slow-{index}" for index in range(NUM_DOWNLOADERS + 1)])
    add(registry, "a", "c")


def test_a_hub_that_drips_fails_its_adapter_in_time(dripping: Callable[..., AdapterRegistry]) -> None:
    registry = dripping("x", download_timeout_s=0.5)
    info = registry.wait("x", 10)
    assert (info.state, info.code) == (AdapterState.FAILED, "adapter_download_failed")
    assert "took longer than 0.5 s" in str(info.reason)


def test_retiring_and_closing_do_not_wait_for_the_hub(dripping: Callable[..., AdapterRegistry]) -> None:
    registry = dripping("xyz")
    registry.retire("x")
    assert registry.wait_retired("x", 5)
    start_s = time.monotonic()
    registry.close()
    assert time.monotonic() - start_s < 5


def test_one_that_is_retired_before_its_load_begins_frees_its_name(dripping: Callable[..., AdapterRegistry]) -> None:
    registry = dripping([f"slow-{index}" for index in range(NUM_DOWNLOADERS + 1)])
    last = f"slow-{NUM_DOWNLOADERS}"
    registry.retire(last)
    assert registry.wait_retired(last, 0)
    again = registry.register(AdapterSpec(name=last, source="org/slow"))
    assert (again.state, again.generation) == (AdapterState.DOWNLOADING, 2)


@pytest.mark.parametrize(
    ("name", "other", "is_alike"),
    [
        ("math", "Math", True),
        ("AI", "Al", True),
        ("model-1", "model_l", True),
        ("v0", "vO", True),
        ("math", "maths", False),
        ("v1.0", "v10", False),
        ("ai", "al", False),
        ("churn-1", "churn-7", False),
    ],
)
def test_names_that_look_alike_are_told(name: str, other: str, is_alike: bool) -> None:
    assert are_confusable(name, other) is are_confusable(other, name) is is_alike


def test_a_name_that_looks_like_a_registered_one_is_refused(registry: AdapterRegistry) -> None:
    add(registry, "a")
    with pytest.raises(AdapterConflictError, match="looks like 'a'") as caught:
        registry.register(local("A", "b"))
    assert caught.value.code == "confusable_name"
    registry.retire("a")
    assert registry.wait_retired("a", 30)
    registry.register(local("A", "b"))
    assert registry.wait("A", 30).state is AdapterState.READY


# Restarts


def test_a_restart_serves_what_was_acknowledged(restart: Callable[..., AdapterRegistry]) -> None:
    configured = (local("a"), local("b"))
    registry = restart(*configured)
    add(registry, "c")
    registry.retire("b")
    registry.register(local("a", "d"), expected=["*"])
    registry.wait("a", 30)
    assert registry.wait_retired("b", 30)
    before = shown(registry)
    assert set(before) == {"a", "c"}
    for _ in range(2):
        registry = restart(*configured)
        assert shown(registry) == before
    registry.retire("c")
    assert set(shown(restart(*configured))) == {"a"}


def test_content_that_changed_while_the_server_was_down_is_not_served_in_silence(
    restart: Callable[..., AdapterRegistry], sources: Path, tmp_path: Path
) -> None:
    copied(sources / "a", tmp_path / "mine")
    registry = restart(root=tmp_path)
    add(registry, "mine")
    edit_config(tmp_path / "mine", {"lora_alpha": 99})
    for _ in range(2):
        registry = restart(root=tmp_path)
        info = registry.get("mine")
        assert (info.state, [reason.code for reason in info.reasons]) == (AdapterState.FAILED, ["content_changed"])
    add(registry, "mine")
    assert shown(restart(root=tmp_path))["mine"] == ("READY", 2, registry.get("mine").digest)


def test_a_refused_registration_is_not_tried_again_but_a_failed_download_is(
    restart: Callable[..., AdapterRegistry], sources: Path, tmp_path: Path, hub: FakeHub
) -> None:
    edit_config(copied(sources / "a", tmp_path / "bad"), {"use_dora": True})
    source = HubSource(endpoint=hub.endpoint, cache_folder=tmp_path / "cache")
    registry = restart(root=tmp_path, hub=source)
    registry.register(local("bad"))
    registry.register(AdapterSpec(name="late", source="org/late"))
    assert {registry.wait(name, 30).state for name in ("bad", "late")} == {AdapterState.FAILED}
    hub.push_folder("org/late", sources / "b")
    assert {name: state for name, (state, _, _) in shown(restart(root=tmp_path, hub=source)).items()} == {
        "late": "READY"
    }


def test_a_journal_that_cannot_be_written_refuses_changes_and_changes_nothing(
    restart: Callable[..., AdapterRegistry], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = restart()
    add(registry, "a")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("server.adapters.journal.os.pwrite", full_disk)
    with pytest.raises(LoraMixerError, match="No space left"):
        registry.register(local("b"))
    with pytest.raises(LoraMixerError, match="No space left"):
        registry.retire("a")
    assert {name: state for name, (state, _, _) in shown(registry).items()} == {"a": "READY"}
    registry.lease("a").release()


def test_sources_that_may_no_longer_be_loaded_are_not_restored(restart: Callable[..., AdapterRegistry]) -> None:
    registry = restart()
    add(registry, "a")
    registry.close()

    def refuse(spec: AdapterSpec) -> None:
        raise LoraMixerError(f"{spec.source} lies outside")

    registry = restart()
    assert registry.restore((), admit=refuse) == ()


def test_a_retired_source_is_unlocked_before_its_last_request_ends(
    make_registry: MakeRegistry, hub: FakeHub, sources: Path, tmp_path: Path
) -> None:
    hub.push_folder("org/a", sources / "a")
    lockfile = tmp_path / "adapters.lock"
    registry = make_registry(hub=HubSource(endpoint=hub.endpoint, cache_folder=tmp_path / "cache"), lockfile=lockfile)
    registry.register(AdapterSpec(name="x", source="org/a"))
    registry.register(AdapterSpec(name="y", source="org/a"))
    assert registry.wait("x", 30).state is registry.wait("y", 30).state is AdapterState.READY
    running = registry.lease("x")
    registry.retire("x")
    assert len(json.loads(lockfile.read_text())["adapters"]) == 1, "y stands on it"
    registry.retire("y")
    assert json.loads(lockfile.read_text())["adapters"] == []
    running.release()


def test_names_of_one_source_serve_one_commit_although_its_branch_moves_in_between(
    make_registry: MakeRegistry, hub: FakeHub, sources: Path, tmp_path: Path
) -> None:
    hub.push_folder("org/a", sources / "a")
    loader = make_registry(hub=HubSource(endpoint=hub.endpoint, cache_folder=tmp_path / "cache")).loader
    first, second = (AdapterSpec(name=name, source="org/a") for name in "xy")
    others: list[Adapter] = []

    def move_and_load_the_other() -> contextlib.AbstractContextManager[object]:
        if not others:
            hub.push_folder("org/a", sources / "b")
            others.append(loader.load(second))
        return contextlib.nullcontext()

    adapter = loader.load(first, validating=move_and_load_the_other)
    assert (adapter.revision, adapter.digest) == (others[0].revision, others[0].digest)
    locked = loader.lockfile.get(LockKey.of(first))
    assert locked is not None
    assert (locked.commit, locked.digest) == (adapter.revision, adapter.digest)


# Traffic


def test_an_adapter_that_captures_traffic_raises_its_alarm(
    registry: AdapterRegistry, routed: RoutedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add(registry, "a", "b", "c")
    registry.swap_router(save_router(tmp_path, routed, [(i.name, str(i.digest)) for i in registry.list()]))
    for _ in range(20):
        registry.record_traffic([(1, 200.0), (2, 150.0), (3, 50.0)])
    assert not any(info.traffic_alarm for info in registry.list())
    for _ in range(60):
        registry.record_traffic([(1, 200.0), (2, 5.0), (3, 5.0)])
    assert [info.name for info in registry.list() if info.traffic_alarm] == ["a"]
    assert caplog.text.count("captures far more") == 1
    for _ in range(60):
        registry.record_traffic([(1, 70.0), (2, 70.0), (3, 70.0)])
    assert not any(info.traffic_alarm for info in registry.list())
