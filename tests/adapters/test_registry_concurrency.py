"""Many threads at once: whatever they do, nothing is half registered, leaked or stuck."""

import random
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from server.adapters.leases import AdapterLease
from server.adapters.records import AdapterState
from server.adapters.registry import AdapterRegistry
from server.config import AdapterSpec, ServerSettings
from server.errors import LoraMixerError
from server.routing.attach import RoutedModel, attach_routing
from tests.adapters.folders import BASE, copied, edit_config
from tests.adapters.harness import StepThread, save_router

NAMES = "abcdef"


def check_reachable(registry: AdapterRegistry, routed: RoutedModel) -> None:
    """On the model's thread: all that a new request could be given is there."""
    roster = registry.roster
    resident = routed.bank.snapshot.slots
    slots = [adapter.slot for adapter in roster.adapters.values()]
    assert len(slots) == len(set(slots))
    assert set(slots) <= resident
    if roster.router is not None:
        loaded = routed.routers.generations[roster.router.id]
        assert {adapter.slot for adapter in roster.adapters.values() if roster.is_routed(adapter)} <= loaded.slots


def check_held(lease: AdapterLease, routed: RoutedModel) -> None:
    """On any thread, while the lease is held: its slots have rows and its router is loaded."""
    assert {slot for slot in lease.plan.slots if slot} <= routed.bank.snapshot.slots
    if lease.plan.router_generation is not None:
        loaded = routed.routers.generations[lease.plan.router_generation]
        assert set(lease.plan.allowed_slots) <= loaded.slots


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_registrations_retirements_and_leases_leave_nothing_behind(
    seed: int, tiny_llama: "Callable[..., LlamaForCausalLM]", save_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_llama()
    for index, name in enumerate(NAMES):
        save_adapter(tmp_path / name, model, index + 1, ["q_proj", "v_proj"], seed=index)
    edit_config(copied(tmp_path / "a", tmp_path / "broken"), {"use_dora": True})
    routed = attach_routing(model, num_slots=5)
    problems: list[BaseException] = []

    def observe() -> None:
        try:
            check_reachable(registry, routed)
        except BaseException as error:
            problems.append(error)

    engine = StepThread(observe)
    registry = AdapterRegistry(
        routed,
        base_model_name=BASE,
        settings=ServerSettings(max_adapters=4),
        run_between_steps=engine,
        root=tmp_path,
    )
    known = {}
    for name in NAMES:
        registry.register(AdapterSpec(name=name, source=f"./{name}"))
        known[name] = str(registry.wait(name, 30).digest)
        registry.retire(name)
        assert registry.wait_retired(name, 30)
    routers = [save_router(tmp_path / f"router{n}", routed, list(known.items())[n:], seed=n) for n in range(3)]

    def change(rng: random.Random) -> None:
        for _ in range(25):
            name = rng.choice(NAMES)
            with suppress(LoraMixerError):  # conflicts and absences are part of the game
                match rng.randrange(6):
                    case 0 | 1 | 2:
                        registry.register(AdapterSpec(name=name, source=f"./{name}"))
                    case 3:
                        registry.register(AdapterSpec(name=name, source="./broken"))
                    case 4:
                        registry.retire(name)
                    case 5:
                        registry.swap_router(rng.choice(routers))
            registry.list()
            threading.Event().wait(0.005)

    def use(rng: random.Random) -> None:
        held: list[AdapterLease] = []
        for _ in range(150):
            with suppress(LoraMixerError):
                model_name = rng.choice(["auto", "auto", BASE, *NAMES])
                held.append(registry.lease(model_name))
            for lease in held:
                check_held(lease, routed)
            registry.record_traffic([(slot, 1.0) for lease in held for slot in lease.plan.slots])
            if held and rng.random() < 0.7:
                held.pop(rng.randrange(len(held))).release()
            threading.Event().wait(0.001)
        for lease in held:
            lease.release()

    def guarded(work: Callable[[random.Random], None], rng: random.Random) -> None:
        try:
            work(rng)
        except BaseException as error:
            problems.append(error)

    threads = [
        threading.Thread(target=guarded, daemon=True, args=(work, random.Random(f"{seed} {work.__name__} {index}")))
        for work in (change, use)
        for index in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for info in registry.list():
        if info.state is not AdapterState.RETIRING:
            with suppress(LoraMixerError):
                registry.retire(info.name)
        registry.wait_retired(info.name, 30)
    registry._publisher.run(lambda: None)  # behind the last collection in the lane
    registry.close()
    engine.stop()
    assert problems == []
    assert not registry.has_leases
    assert registry.list() == []
    assert routed.bank.snapshot.slots == frozenset()
    assert len(routed.routers.generations) <= 1


def test_one_bad_adapter_among_many_harms_no_other(
    tiny_llama: "Callable[..., LlamaForCausalLM]", save_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_llama()
    for index, name in enumerate(NAMES[:4]):
        save_adapter(tmp_path / name, model, 2, ["q_proj"], seed=index)
    edit_config(tmp_path / "c", {"r": 3})
    engine = StepThread()
    registry = AdapterRegistry(
        attach_routing(model, num_slots=5),
        base_model_name=BASE,
        settings=ServerSettings(max_adapters=4),
        run_between_steps=engine,
        root=tmp_path,
    )
    for name in NAMES[:4]:
        registry.register(AdapterSpec(name=name, source=f"./{name}"))
    states = {name: registry.wait(name, 30).state for name in NAMES[:4]}
    registry.close()
    engine.stop()
    assert states == {**dict.fromkeys("abd", AdapterState.READY), "c": AdapterState.FAILED}
