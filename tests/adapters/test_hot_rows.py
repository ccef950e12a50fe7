"""Adapters that the router was not trained with: routed after their canary, refused with numbers, never in the way."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from server.adapters.calibration import Calibrator
from server.adapters.examples import encode_examples
from server.adapters.hub import HubSource
from server.adapters.hub_retry import RetryPolicy
from server.adapters.records import AdapterInfo
from server.adapters.registry import AdapterRegistry
from server.backend import build_backend
from server.config import AdapterSpec, ServerSettings
from server.errors import (
    AdapterConflictError,
    AdapterNotFoundError,
    InvalidRequestError,
    LoraMixerError,
)
from server.native.library import libraries
from server.routing.attach import RoutedModel, attach_routing
from server.routing.prompt_gate import PromptGate
from server.routing.prototypes import HotRow
from server.routing.router import RouterArtefact, load_artefact, save_artefact
from tests.adapters.calibrating import (
    ORDINARY,
    OWN,
    ByteRenderer,
    ordinary_prompt_gate,
    router_with_statistics,
)
from tests.adapters.fake_hub import FakeHub, Fault
from tests.adapters.folders import BASE, copied
from tests.adapters.harness import run_inline, save_router


@pytest.fixture(scope="session")
def folders(
    tmp_path_factory: pytest.TempPathFactory, llama: "LlamaForCausalLM", save_adapter: Callable[..., Path]
) -> Path:
    root = tmp_path_factory.mktemp("hot")
    for index, name in enumerate("abcd"):
        save_adapter(root / name, llama, index + 1, ["q_proj", "v_proj"], seed=index)
    return root


@pytest.fixture
def routed(tiny_llama: "Callable[..., LlamaForCausalLM]") -> RoutedModel:
    return attach_routing(tiny_llama(), num_slots=6)


Start = Callable[..., AdapterRegistry]


@pytest.fixture
def start(
    routed: RoutedModel, folders: Path, tmp_path: Path, tiny_llama: "Callable[..., LlamaForCausalLM]"
) -> Iterator[Start]:
    """A registry with a and b under a router that was trained with them."""
    made: list[AdapterRegistry] = []

    def build(
        *,
        has_statistics: bool = True,
        restores: bool = False,
        routed_model: RoutedModel | None = None,
        configured: Sequence[AdapterSpec] = (),
        has_router: bool = True,
        settings: ServerSettings | None = None,
        **options: Any,
    ) -> AdapterRegistry:
        """`restores`: with the router of before, and whatever the journal and `configured` hold."""
        registry = AdapterRegistry(
            routed_model or (attach_routing(tiny_llama(), num_slots=6) if restores else routed),
            base_model_name=BASE,
            settings=settings or ServerSettings(max_adapters=5),
            run_between_steps=run_inline,
            root=folders,
            encode_examples=functools.partial(encode_examples, tokenizer=ByteRenderer()),
            **options,
        )
        made.append(registry)
        if restores:
            names = registry.restore(configured)
            for name in names:
                registry.wait(name, 60)
            if has_router:
                registry.swap_router(tmp_path / "router")
            for name in names:
                registry.wait(name, 60)
            return registry
        known = [(name, str(add(registry, name).digest)) for name in "ab"]
        if has_statistics:
            save_artefact(router_with_statistics(routed, known), tmp_path / "router")
        else:
            save_router(tmp_path / "router", routed, known)
        registry.swap_router(tmp_path / "router")
        return registry

    yield build
    for registry in made:
        registry.close()


def slot_of(registry: AdapterRegistry, name: str) -> int:
    slot = registry.roster.adapters[name].slot
    assert slot is not None
    return slot


def add(registry: AdapterRegistry, name: str, examples: list[Any] | None = None, **fields: Any) -> AdapterInfo:
    registry.register(AdapterSpec(name=name, source=fields.pop("source", f"./{name}"), **fields), examples or [])
    return registry.wait(name, 60)


def test_an_adapter_with_examples_is_routed_and_its_calibration_is_shown(start: Start) -> None:
    registry = start()
    info = add(registry, "c", OWN)
    assert info.routed, info.reason
    calibration = info.to_dict()["calibration"]
    assert (calibration["state"], calibration["method"], calibration["num_examples"]) == ("passed", "examples", 6)
    assert calibration["own_win_rate"] >= 0.5
    assert json.dumps(info.to_dict())
    slot = slot_of(registry, "c")
    assert slot in registry.lease("auto").plan.allowed_slots


def test_other_rows_and_fingerprints_keep_every_bit(start: Start, routed: RoutedModel) -> None:
    registry = start()
    before = registry.roster.router
    pool = registry.lease("auto", adapters=["a", "b"]).plan
    assert before is not None
    assert add(registry, "c", OWN).routed
    after = registry.roster.router
    assert after is not None
    assert after.id == before.id
    newcomer = slot_of(registry, "c")
    others = [slot for slot in range(routed.num_slots) if slot != newcomer]
    for key, rows in before.rows.items():
        assert torch.equal(after.rows[key][others], rows[others])
        assert not after.biases[key][others].any()
    assert registry.lease("auto", adapters=["a", "b"]).plan == pool, "a pool without the newcomer keeps its cache"
    assert registry.lease("auto").plan.fingerprint != pool.fingerprint


def test_registrations_commute(start: Start) -> None:
    """The same rows whoever came first, in whatever slots."""
    registry = start()
    digests = []
    for order in ("cd", "dc"):
        for name in order:
            add(registry, name, OWN if name == "c" else OWN[::-1][:4])
        router = registry.roster.router
        assert router is not None
        digests.append({name: router.row_digest_of_slot.get(slot_of(registry, name)) for name in "cd"})
        for name in order:
            registry.retire(name)
            assert registry.wait_retired(name, 30)
    assert digests[0] == digests[1]
    assert None not in digests[0].values()


def give_prompt_gate(registry: AdapterRegistry, router: Path, gate: PromptGate) -> None:
    save_artefact(dataclasses.replace(load_artefact(router), prompt_gate=gate), router)
    registry.swap_router(router)


def spans_of(registry: AdapterRegistry, text: str) -> list[tuple[int, ...]]:
    """Slots that the beginning of a routed prompt goes to, in order."""
    prompt = ByteRenderer().render_chat([{"role": "user", "content": text}])
    return [span.plan.slots for span in registry.prompt_course(registry.lease("auto").plan, prompt).spans]


def test_a_newcomer_takes_part_in_the_prompt_gate(start: Start, tmp_path: Path) -> None:
    registry = start()
    give_prompt_gate(registry, tmp_path / "router", ordinary_prompt_gate())
    first = registry.roster.adapters["a"].slot
    assert spans_of(registry, "quick qualms quit") == [(first,)]
    assert spans_of(registry, "zzyx xyzzy xxyz") == []
    info = add(registry, "c", OWN)
    assert info.routed, info.reason
    router = registry.roster.router
    assert router is not None
    assert router.newcomers == {slot_of(registry, "c")}, "rougher scores must be surer"
    verdict = info.to_dict()["calibration"]["prompt_gate"]
    assert (verdict["state"], verdict["reason"]) == ("passed", None)
    assert verdict["own_share"] > 0.5
    assert spans_of(registry, "quick qualms quit") == [(first,)], "the others keep what the gate gives them"
    assert spans_of(registry, "zzyx xyzzy xxyz") == [(registry.roster.adapters["c"].slot,)]


def test_a_newcomer_that_the_prompt_gate_cannot_place_is_served_by_name_and_costs_nobody(
    start: Start, tmp_path: Path
) -> None:
    """A gate that kept silent for it would leave every task's questions to the router."""
    registry = start()
    gate = dataclasses.replace(ordinary_prompt_gate(), statistics=None)
    give_prompt_gate(registry, tmp_path / "router", gate)
    before = spans_of(registry, "quick qualms quit")
    assert before != []
    info = add(registry, "c", OWN)
    assert not info.routed
    assert "lora-mixer-train background" in str(info.reason)
    assert str(info.reason).endswith(": served by name only")
    facts = info.to_dict()["calibration"]
    assert (facts["state"], facts["prompt_gate"]["state"]) == ("refused", "refused")
    assert spans_of(registry, "quick qualms quit") == before
    assert registry.lease("c").plan.weights


def test_a_newcomer_whose_examples_are_other_adapters_business_is_refused_with_numbers(start: Start) -> None:
    registry = start()
    info = add(registry, "c", ORDINARY)
    assert not info.routed
    assert info.state == "READY"
    assert "%" in str(info.reason)
    assert str(info.reason).endswith(": served by name only")
    assert info.to_dict()["calibration"]["state"] == "refused"
    with pytest.raises(InvalidRequestError, match=r"is not routed: (its gate row|it would lower)"):
        registry.lease("auto", adapters=["c"])
    assert registry.lease("c").plan.weights


def test_calibrating_anew_leaves_running_requests_their_row(start: Start, routed: RoutedModel) -> None:
    registry = start()
    add(registry, "c", OWN[:3])
    running = registry.lease("auto")
    old = registry.roster.router
    assert old is not None
    registry.calibrate("c", [{"messages": [{"role": "user", "content": t}]} for t in OWN[3:]])
    info = registry.wait("c", 60)
    assert info.to_dict()["calibration"]["num_examples"] == 6
    new = registry.roster.router
    assert new is not None
    slot = slot_of(registry, "c")
    assert new.row_digest_of_slot[slot] != old.row_digest_of_slot[slot]
    assert new.id != running.plan.router_generation
    assert routed.routers.generations[old.id] is old, "the running request's generation stands as it was"
    running.release()


def test_of_calibrations_that_wait_the_last_one_counts(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the examples of all; one thread makes the rows of all adapters, and must not make one over and over."""
    registry = start()
    add(registry, "c", OWN[:2])
    may_go, counts = threading.Event(), []
    calibrate = Calibrator.calibrate

    def slow(self: Calibrator, slot: int, examples: Any, *rest: Any, **more: Any) -> Any:
        counts.append(len(examples))
        may_go.wait(20)
        return calibrate(self, slot, examples, *rest, **more)

    monkeypatch.setattr(Calibrator, "calibrate", slow)
    registry.calibrate("c", OWN[1:3])
    while not counts:
        time.sleep(0.002)
    for stop in (4, 5, 6):
        registry.calibrate("c", OWN[stop - 2 : stop])
    assert not registry.get("c").is_settled
    may_go.set()
    info = registry.wait("c", 60)
    assert counts == [3, 6]
    assert info.to_dict()["calibration"]["num_examples"] == 6
    assert info.routed


def test_registering_again_adds_the_examples_that_are_new(start: Start) -> None:
    registry = start()
    first = add(registry, "c", OWN[:3])
    assert add(registry, "c", OWN[:3]).calibration == first.calibration
    again = add(registry, "c", OWN[2:])
    assert again.generation == first.generation
    assert again.to_dict()["calibration"]["num_examples"] == 6
    assert again.routed, again.reason


def test_a_next_generation_is_calibrated_anew_and_takes_the_traffic_over(start: Start) -> None:
    registry = start()
    first = add(registry, "c", OWN)
    running = registry.lease("auto")
    registry.register(AdapterSpec(name="c", source="./d"), OWN[:4], expected=[first.etag])
    second = registry.wait("c", 60)
    assert second.generation == 2
    assert second.digest != first.digest
    assert second.to_dict()["calibration"]["num_examples"] == 4
    assert second.routed, second.reason
    slot = slot_of(registry, "c")
    assert slot in registry.lease("auto").plan.allowed_slots
    assert slot not in running.plan.allowed_slots, "a running request keeps the generation that it began with"
    running.release()


def row_of(routed: RoutedModel, artefact: RouterArtefact, slot: int) -> HotRow:
    """What the adapter in a slot would get from `OWN`."""
    examples = encode_examples(OWN, ByteRenderer())
    return Calibrator(routed, run_inline).calibrate(slot, examples, artefact, {}).row


def test_a_next_version_of_a_trained_adapter_inherits_its_row(
    start: Start, routed: RoutedModel, tmp_path: Path
) -> None:
    """Where the examples are its predecessor's task; the row is the trained one, and back again it is its own."""
    registry = start()
    artefact = load_artefact(tmp_path / "router")
    taught = row_of(routed, artefact, slot_of(registry, "b"))  # as if `b` had been trained for what the examples are
    rows = {key: torch.stack([values[0], taught.columns[key].row]) for key, values in artefact.rows.items()}
    save_artefact(dataclasses.replace(artefact, rows=rows), tmp_path / "router")
    registry.swap_router(tmp_path / "router")
    old = registry.get("b")
    registry.register(AdapterSpec(name="b", source="./d"), OWN, expected=[old.etag])
    info = registry.wait("b", 60)
    assert info.routed, info.reason
    facts = info.to_dict()["calibration"]
    assert (facts["state"], facts["method"], facts["num_examples"]) == ("passed", "inherited", 6)
    row = registry.roster.adapters["b"].calibration
    assert row is not None
    for key, values in rows.items():
        assert torch.equal(row.row.columns[key].row, values[1])
        assert row.row.columns[key].bias == 0
    registry.register(AdapterSpec(name="b", source="./b"), [], expected=[info.etag])
    again = registry.wait("b", 60)
    assert (again.digest, again.routed, again.calibration) == (old.digest, True, None)


def test_a_next_version_for_another_task_gets_a_row_of_its_own(start: Start) -> None:
    registry = start()
    registry.register(AdapterSpec(name="b", source="./d"), OWN, expected=[registry.get("b").etag])
    info = registry.wait("b", 60)
    assert info.to_dict()["calibration"]["method"] == "examples"
    assert info.routed, info.reason


def test_a_trained_row_is_not_inherited_while_its_adapter_is_registered(start: Start) -> None:
    """Under another name, as here: it needs its row itself."""
    registry = start()
    registry.retire("b")
    registry.wait_retired("b", 60)
    add(registry, "other", source="./b")
    info = add(registry, "b", OWN, source="./d")
    assert info.to_dict()["calibration"]["method"] == "examples"


def test_a_restart_keeps_the_wish_to_be_routed_and_makes_rows_from_examples_on_disk(
    start: Start, folders: Path, tmp_path: Path
) -> None:
    folder = copied(folders / "c", folders / "on-disk")
    (folder / "examples.jsonl").write_text("\n".join(json.dumps(text) for text in OWN) + "\n")
    journal = tmp_path / "adapters.state"
    registry = start(journal=journal)
    add(registry, "c", source="./on-disk")
    assert add(registry, "d").calibration is None
    before = registry.get("c").calibration
    registry.close()
    restored = start(journal=journal, restores=True)
    assert restored.get("c").calibration == before
    assert restored.get("c").routed, restored.get("c").reason
    assert restored.get("d").calibration is None, "nobody asked for a row from its weights, and a restart does not"


@pytest.mark.skipif(not libraries(), reason="no native library was built, or none fits this CPU")
def test_the_native_backend_makes_the_same_row(start: Start, tiny_llama: "Callable[..., LlamaForCausalLM]") -> None:
    """fp32, through the backend as a server builds it, whose torch weights are gone."""
    expected_of = start()
    expected = add(expected_of, "c", OWN).calibration
    rows = expected_of.roster.router
    routed = attach_routing(tiny_llama(), num_slots=6)
    settings = ServerSettings(max_adapters=5, kv_cache_mib=1, backend="native")
    backend = build_backend(routed, settings, 512)
    assert next(routed.model.parameters()).numel() == 0
    registry = start(routed_model=routed, states=backend.states, restores=True)
    for name in "ab":
        assert add(registry, name).routed
    info = add(registry, "c", OWN)
    assert info.routed, info.reason
    assert info.calibration == pytest.approx(expected, abs=0.05)
    found = registry.roster.router
    assert found is not None
    assert rows is not None
    for key, value in rows.rows.items():
        torch.testing.assert_close(found.rows[key], value, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(found.biases[key], rows.biases[key], rtol=1e-2, atol=1e-2)
    assert "give examples" in str(add(registry, "d", routed=True).reason)


def test_a_row_is_made_from_weights_only_when_routing_was_asked_for(start: Start) -> None:
    registry = start()
    assert add(registry, "c").reason == "no gate row in the router artefact: served by name only"
    asked = add(registry, "d", routed=True)
    assert asked.to_dict()["calibration"]["method"] == "weights"
    assert asked.to_dict()["calibration"]["own_win_rate"] is None


def test_examples_do_not_route_what_asked_not_to_be(start: Start) -> None:
    registry = start()
    info = add(registry, "c", OWN, routed=False)
    assert info.reason == "registered with routed: false: served by name only"
    assert info.to_dict()["calibration"]["state"] == "passed"


def test_a_router_without_statistics_says_what_to_do(start: Start) -> None:
    info = add(start(has_statistics=False), "c", OWN)
    assert not info.routed
    assert "lora-mixer-train background" in str(info.reason)


def test_examples_beside_an_adapter_are_found(start: Start, folders: Path) -> None:
    folder = copied(folders / "c", folders / "with-examples")
    (folder / "examples.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in OWN) + "\n")
    registry = start()
    info = add(registry, "c", source="./with-examples")
    assert info.to_dict()["calibration"]["num_examples"] == 6
    assert info.routed, info.reason


def test_damaged_examples_beside_an_adapter_are_named_and_do_no_harm(start: Start, folders: Path) -> None:
    folder = copied(folders / "d", folders / "bad-examples")
    (folder / "examples.jsonl").write_text('"fine"\n{broken\n')
    info = add(start(), "d", source="./bad-examples")
    assert info.state == "READY"
    assert "examples.jsonl, line 2 is not JSON" in str(info.reason)


# Caps


def test_the_default_cap_is_for_rows_made_without_training_and_calibrating_lets_in_again(
    start: Start, tmp_path: Path
) -> None:
    settings = ServerSettings(max_adapters=5, hot_max_gate_share=0.4, gate_share_window=100)
    registry = start(journal=tmp_path / "adapters.state", settings=settings)
    add(registry, "c", OWN[:4])
    assert {info.name: info.max_gate_share for info in registry.list()} == {"a": None, "b": None, "c": 0.4}
    slot = slot_of(registry, "c")
    for share in (39.0, 41.0):
        assert registry.get("c").routed
        registry.record_traffic([], [(slot, 2 * share), (slot_of(registry, "a"), 200 - 2 * share)])
    info = registry.get("c")
    assert not info.routed
    assert "max_gate_share of 0.4" in str(info.reason)
    registry.swap_router(tmp_path / "router")
    assert registry.wait("c", 60).exclusion is not None, "another row does not let it in; an operator does"
    registry._publisher.run(lambda: None)
    registry.close()
    registry = start(journal=tmp_path / "adapters.state", restores=True, settings=settings)
    assert registry.get("c").exclusion == info.exclusion
    registry.calibrate("c", ORDINARY * 2)
    refused = registry.wait("c", 60)
    assert refused.exclusion is not None, "a row that its canary refuses is no reason to let it in"
    registry.register(AdapterSpec(name="c", source="./c"), OWN[:4], expected=["*"])
    registry.retire("c")
    assert registry.wait_retired("c", 60)
    add(registry, "c", OWN[:4])
    slot = slot_of(registry, "c")
    registry.record_traffic([], [(slot, 500.0)])
    assert not registry.get("c").routed
    registry.calibrate("c", OWN[4:])
    assert registry.wait("c", 60).routed
    assert registry.get("c").exclusion is None


# Examples in a Hub repository


@pytest.fixture
def push(hub: FakeHub, folders: Path) -> Callable[[bytes], str]:
    """Commit adapter c with this content of `examples.jsonl` as org/c."""

    def commit(examples: bytes) -> str:
        files = {path.name: path.read_bytes() for path in (folders / "c").iterdir()}
        return hub.push("org/c", {**files, "examples.jsonl": examples})

    return commit


def hub_options(hub: FakeHub, tmp_path: Path) -> dict[str, Any]:
    source = HubSource(endpoint=hub.endpoint, cache_folder=tmp_path / "cache", retries=RetryPolicy(0))
    return {"hub": source, "lockfile": tmp_path / "adapters.lock", "journal": tmp_path / "adapters.state"}


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps(text) + "\n" for text in texts).encode()


def test_a_hub_adapter_is_routed_by_the_examples_of_its_repository_and_again_offline(
    start: Start, hub: FakeHub, push: Callable[[bytes], str], tmp_path: Path
) -> None:
    commit = push(lines(OWN))
    options = hub_options(hub, tmp_path)
    registry = start(**options)
    info = add(registry, "c", source="org/c")
    assert info.routed, info.reason
    assert info.to_dict()["calibration"]["num_examples"] == 6
    (entry,) = json.loads((tmp_path / "adapters.lock").read_text())["adapters"]
    assert entry["commit"] == commit
    assert entry["files"]["examples.jsonl"] == hashlib.sha256(lines(OWN)).hexdigest()
    push(lines(ORDINARY))  # the branch moves; the lock does not
    registry.close()
    hub.stop()
    restored = start(restores=True, **options)
    assert restored.get("c").calibration == info.calibration
    assert restored.get("c").routed


@pytest.mark.parametrize(
    ("examples", "problem"),
    [
        (b'"fine"\n{broken\n', "examples.jsonl, line 2 is not JSON"),
        (b"\xff\xfe", "examples.jsonl cannot be used"),
        (b'"only one"\n', "1 examples; give 2 to 64"),
        (b'"x"\n[]\n', r"examples[1] must be a prompt"),
        (b"[" * 100_000, "examples.jsonl, line 1 is not JSON"),
        (b"x" * (4 * 2**20 + 1), "the file has 4194305 bytes"),
    ],
)
def test_bad_examples_of_a_repository_are_named_and_do_no_harm(
    examples: bytes, problem: str, start: Start, hub: FakeHub, push: Callable[[bytes], str], tmp_path: Path
) -> None:
    push(examples)
    registry = start(**hub_options(hub, tmp_path))
    info = add(registry, "c", source="org/c")
    assert (info.state, info.routed) == ("READY", False)
    assert problem in str(info.reason)
    assert str(info.reason).endswith(": served by name only")
    assert registry.lease("c").plan.weights
    registry.calibrate("c", OWN)
    assert registry.wait("c", 60).routed, "examples in a request take their place"


def test_examples_that_fail_for_now_stay_in_the_lock(
    start: Start, hub: FakeHub, push: Callable[[bytes], str], tmp_path: Path
) -> None:
    push(lines(OWN))
    options = hub_options(hub, tmp_path)
    first = start(**options)
    before = add(first, "c", source="org/c").calibration
    first.close()
    locked = (tmp_path / "adapters.lock").read_bytes()
    shutil.rmtree(tmp_path / "cache")
    hub.fail(Fault("examples.jsonl", status=503))
    second = start(restores=True, **options)
    assert second.get("c").state == "READY"
    assert "examples.jsonl could not be downloaded" in str(second.get("c").reason)
    second.close()
    assert (tmp_path / "adapters.lock").read_bytes() == locked
    third = start(restores=True, **options)
    assert third.get("c").calibration == before


# Examples that came over HTTP, across restarts


def kept(tmp_path: Path) -> list[str]:
    """Files of the store beside the journal."""
    folder = tmp_path / "adapters.state.examples"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_examples_sent_over_http_make_the_same_row_after_a_restart(start: Start, tmp_path: Path) -> None:
    journal = tmp_path / "adapters.state"
    registry = start(journal=journal)
    add(registry, "c", OWN[:4])
    registry.calibrate("c", OWN[4:])
    before = registry.wait("c", 60)
    assert before.to_dict()["calibration"]["num_examples"] == 6
    assert kept(tmp_path) == ["c.1.jsonl"]
    registry.close()
    for _ in range(2):
        registry = start(journal=journal, restores=True)
        assert registry.get("c").calibration == before.calibration
        assert registry.get("c").routed == before.routed
        add(registry, "c", OWN[1:3])  # idempotent
        assert registry.get("c").calibration == before.calibration
        registry.close()
    assert kept(tmp_path) == ["c.1.jsonl"]


def test_a_restart_under_another_router_makes_the_row_that_this_one_needs(
    start: Start, routed: RoutedModel, tmp_path: Path
) -> None:
    journal = tmp_path / "adapters.state"
    registry = start(journal=journal)
    first = add(registry, "c", OWN).calibration
    assert registry.roster.router is not None
    known = [(adapter.name, adapter.digest) for adapter in registry.roster.router.artefact.adapters]
    other = router_with_statistics(routed, known, seed=5)  # of the base model: before anything is retired
    save_artefact(other, tmp_path / "other")
    registry.swap_router(tmp_path / "other")
    expected = registry.wait("c", 60).calibration
    assert expected != first
    registry.close()
    save_artefact(other, tmp_path / "router")
    restored = start(journal=journal, restores=True)
    assert restored.get("c").calibration == expected


def test_more_examples_after_a_restart_without_a_router_add_to_the_kept_ones(start: Start, tmp_path: Path) -> None:
    journal = tmp_path / "adapters.state"
    registry = start(journal=journal)
    add(registry, "c", OWN[:4])
    registry.close()
    waiting = start(journal=journal, restores=True, has_router=False)
    waiting.calibrate("c", OWN[4:])
    assert waiting.wait("c", 60).calibration is None
    waiting.close()
    restored = start(journal=journal, restores=True)
    assert restored.get("c").to_dict()["calibration"]["num_examples"] == 6


def test_retiring_deletes_the_examples_at_once_and_a_next_generation_brings_its_own(
    start: Start, tmp_path: Path
) -> None:
    registry = start(journal=tmp_path / "adapters.state")
    add(registry, "c", OWN)
    running = registry.lease("c")
    registry.register(AdapterSpec(name="c", source="./d"), OWN[:4], expected=["*"])
    assert kept(tmp_path)[-1] == "c.2.jsonl"
    registry.wait("c", 60)
    assert kept(tmp_path) == ["c.2.jsonl"]
    registry.register(AdapterSpec(name="c", source="./c"), expected=["*"])
    registry.wait("c", 60)
    assert kept(tmp_path) == []
    registry.calibrate("c", OWN)
    assert kept(tmp_path) == ["c.3.jsonl"]
    held = registry.lease("c")
    registry.retire("c")
    assert kept(tmp_path) == [], "not only when the last request ends"
    with pytest.raises((AdapterConflictError, AdapterNotFoundError)):
        registry.calibrate("c", OWN)
    running.release()
    held.release()
    assert kept(tmp_path) == []


def test_refused_adapters_and_replacements_leave_no_examples(start: Start, folders: Path, tmp_path: Path) -> None:
    broken = copied(folders / "d", folders / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"broken")
    registry = start(journal=tmp_path / "adapters.state")
    assert add(registry, "d", OWN, source="./broken").state == "FAILED"
    assert add(registry, "c", OWN, source="./broken").state == "FAILED"
    add(registry, "c", OWN)
    registry.register(AdapterSpec(name="c", source="./broken"), OWN[:2], expected=["*"])
    assert registry.wait("c", 60).replacement is not None
    registry.close()  # a failure is told before it is cleared away
    assert kept(tmp_path) == ["c.2.jsonl"]


def test_a_configured_adapter_keeps_its_examples_while_its_content_stays(
    start: Start, folders: Path, tmp_path: Path
) -> None:
    content = copied(folders / "c", folders / "configured")
    spec = AdapterSpec(name="c", source="./configured")
    journal = tmp_path / "adapters.state"
    start(journal=journal).close()

    def restart() -> AdapterRegistry:
        return start(journal=journal, restores=True, configured=[spec])

    registry = restart()
    registry.calibrate("c", OWN)
    before = registry.wait("c", 60).calibration
    registry.close()
    registry = restart()
    assert registry.get("c").calibration == before
    registry.close()
    shutil.rmtree(content)
    copied(folders / "d", content)
    registry = restart()
    assert registry.get("c").state == "READY"
    assert registry.get("c").calibration is None
    assert kept(tmp_path) == []
    registry.calibrate("c", OWN)
    registry.retire("c")
    assert kept(tmp_path) == []


def test_examples_that_cannot_be_kept_are_not_acknowledged(start: Start, tmp_path: Path) -> None:
    registry = start(journal=tmp_path / "adapters.state")
    add(registry, "c", OWN[:2])
    before = registry.get("c")
    folder = tmp_path / "adapters.state.examples"
    moved = folder.rename(tmp_path / "elsewhere")
    folder.write_text("in the way")
    changes: list[Callable[[], AdapterInfo]] = [
        lambda: registry.calibrate("c", OWN),
        lambda: registry.register(AdapterSpec(name="c", source="./c"), OWN),
        lambda: registry.register(AdapterSpec(name="d", source="./d"), OWN),
        lambda: registry.register(AdapterSpec(name="c", source="./d"), OWN, expected=["*"]),
    ]
    for change in changes:
        with pytest.raises(LoraMixerError, match="nothing was changed"):
            change()
        assert registry.get("c") == before
        assert {info.name for info in registry.list()} == {"a", "b", "c"}
    folder.unlink()
    moved.rename(folder)


def test_damaged_kept_examples_cost_the_row_only(start: Start, tmp_path: Path) -> None:
    journal = tmp_path / "adapters.state"
    registry = start(journal=journal)
    add(registry, "c", OWN)
    registry.close()
    (tmp_path / "adapters.state.examples/c.1.jsonl").write_text("{broken")
    restored = start(journal=journal, restores=True)
    assert restored.get("c").state == "READY"
    assert "c.1.jsonl, line 1 is not JSON" in str(restored.get("c").reason)
    restored.calibrate("c", OWN)
    assert restored.wait("c", 60).routed


def test_a_retirement_amid_a_calibration_leaves_no_examples(start: Start, tmp_path: Path) -> None:
    """The call that adds examples and the one that retires meet in every order."""
    registry = start(journal=tmp_path / "adapters.state")

    def calibrate() -> None:
        with contextlib.suppress(AdapterConflictError, AdapterNotFoundError):
            for _ in range(20):
                registry.calibrate("c", OWN[:2])

    for round_ in range(5):
        add(registry, "c", routed=False)
        caller = threading.Thread(target=calibrate)
        caller.start()
        time.sleep(0.002 * round_)
        registry.retire("c")
        caller.join(60)
        assert kept(tmp_path) == []
        assert registry.wait_retired("c", 60)


def test_another_router_gets_rows_of_its_own(start: Start, routed: RoutedModel, tmp_path: Path) -> None:
    registry = start()
    add(registry, "c", OWN)
    first = registry.roster.router
    assert first is not None
    known = [(adapter.name, adapter.digest) for adapter in first.artefact.adapters]
    save_artefact(router_with_statistics(routed, known, seed=5), tmp_path / "other")
    registry.swap_router(tmp_path / "other")
    assert registry.wait("c", 60).routed
    second = registry.roster.router
    assert second is not None
    slot = slot_of(registry, "c")
    assert second.row_digest_of_slot[slot] != first.row_digest_of_slot[slot]


def test_a_trained_adapter_is_not_calibrated(start: Start) -> None:
    registry = start()
    with pytest.raises(AdapterConflictError, match="needs no examples"):
        registry.calibrate("a", OWN)


def test_bad_examples_are_refused_before_anything_starts(start: Start) -> None:
    registry = start()
    with pytest.raises(InvalidRequestError, match=r"examples\[1\] is an empty prompt"):
        registry.register(AdapterSpec(name="c", source="./c"), ["fine", " "])
    assert "c" not in {info.name for info in registry.list()}


def test_a_restart_serves_a_next_version_under_the_router_of_before(start: Start, tmp_path: Path) -> None:
    """The artefact knows other weights under its name: the running server served them, and so does the next."""
    journal = tmp_path / "adapters.state"
    registry = start(journal=journal)
    registry.register(AdapterSpec(name="b", source="./d"), [], expected=[registry.get("b").etag])
    info = registry.wait("b", 60)
    assert "belongs to other weights" in str(info.reason)
    registry.swap_router(tmp_path / "router")
    registry.close()
    restored = start(journal=journal, restores=True)
    again = restored.get("b")
    assert (again.digest, again.state, again.reason) == (info.digest, info.state, info.reason)
    assert restored.get("a").routed
