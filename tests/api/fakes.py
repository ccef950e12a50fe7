"""A stand-in for the registry, and the real engine and app around the fakes."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import httpx
import uvicorn

from server.adapters.examples import encode_examples
from server.adapters.records import AdapterInfo, AdapterState
from server.api.services import Services
from server.app import create_app
from server.config import AdapterSpec, Secrets, ServerConfig, ServerSettings
from server.engine.async_engine import AsyncEngine
from server.engine.block_pool import BlockPool
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.errors import (
    AdapterConflictError,
    AdapterNotFoundError,
    InvalidRequestError,
    LoraMixerError,
    ModelNotFoundError,
    RouterArtefactError,
)
from server.metrics import Metrics
from server.routing.plan_course import NO_COURSE, PlanCourse, PlanSpan
from server.routing.policy import BASE_PLAN, GatePlan, Policy, fixed_plan, routed_plan
from tests.api.fake_model import ByteTokenizer, ScriptedRunner

if TYPE_CHECKING:
    from server.adapters.registry import AdapterRegistry
    from server.model.tokenizer import ChatTokenizer

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass
class FakeLease:
    """Counts its releases."""

    plan: GatePlan
    slot_names: Mapping[int, str]
    model: str
    num_releases: int = 0

    def release(self) -> None:
        self.num_releases += 1


def ready_info(name: str, **fields: Any) -> AdapterInfo:
    """A READY and routed adapter."""
    facts: dict[str, Any] = {"state": AdapterState.READY, "source": "org/adapter", "digest": "d" * 64, "rank": 8}
    return AdapterInfo(
        name, **{**facts, "targets": ("q_proj",), "routed": True, "resident": True, "bytes": 1024, **fields}
    )


class FakeRegistry:
    """Adapters by name in slots 1, 2, ..., all routed by a router of generation 3 with k = 2; remembers its leases."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.infos = {name: ready_info(name) for name in ("gsm8k", "mbpp", "sst2")}
        self.leases: list[FakeLease] = []
        self.registered: list[AdapterSpec] = []
        self.examples: list[Any] = []
        """Of all registrations and calibrations."""
        self.settles_as: AdapterInfo | None = None
        """What a registration becomes when it is waited for; None: READY."""
        self.router_folders: list[Path] = []
        self.is_closed = False
        self.refuses_waiting = False
        self.waiting: Callable[[], Awaitable[object]] | None = None
        """What a request waits for before it gets its leases; None: they are there."""
        self.num_waiting = 0
        self.expected: Collection[str] | None = None
        """Etags that the last change was made under."""
        self.fails_with: LoraMixerError | None = None
        self.has_prompt_gate = False
        self.readers: set[str] = set()
        """Threads that asked for spans."""

    @property
    def num_open_leases(self) -> int:
        assert all(lease.num_releases <= 1 for lease in self.leases), "a lease was released twice"
        return sum(lease.num_releases == 0 for lease in self.leases)

    def prompt_course(self, plan: GatePlan, token_ids: Sequence[int]) -> PlanCourse:
        """The first two tokens of a routed prompt to mbpp and the third to the base model, if it `has_prompt_gate`."""
        self.readers.add(threading.current_thread().name)
        if not self.has_prompt_gate or plan.policy is not Policy.ROUTED or len(token_ids) < 4:
            return NO_COURSE
        return PlanCourse((PlanSpan(2, fixed_plan(Policy.PINNED, {2: 1.0}, {2: "mbpp"})), PlanSpan(3, BASE_PLAN)))

    @property
    def desk(self) -> "FakeRegistry":
        return self

    def lease_now(
        self, model: str, adapters: Sequence[str] | Mapping[str, float] | None, top_k: int | None, count: int
    ) -> list[FakeLease] | None:
        plan = self._plan(model, adapters, top_k)
        if self.waiting is not None:
            return None
        names = {slot: name for slot, name in enumerate(self.infos, start=1) if slot in plan.slots}
        leases = [FakeLease(plan, {0: "base", **names}, model) for _ in range(count)]
        self.leases += leases
        return leases

    async def lease_when_resident(
        self,
        model: str,
        adapters: Sequence[str] | Mapping[str, float] | None = None,
        top_k: int | None = None,
        count: int = 1,
    ) -> list[FakeLease]:
        self.num_waiting += 1
        try:
            if self.waiting is not None:
                await self.waiting()
        finally:
            self.num_waiting -= 1
        self.waiting = None
        return self.lease_now(model, adapters, top_k, count) or []

    def refuse_waiting(self) -> None:
        self.refuses_waiting = True

    def _plan(self, model: str, adapters: Sequence[str] | Mapping[str, float] | None, top_k: int | None) -> GatePlan:
        slots = {name: slot for slot, name in enumerate(self.infos, start=1)}
        digests = {slot: name for name, slot in slots.items()}
        if unknown := [name for name in adapters or () if name not in slots]:
            raise InvalidRequestError(f"no adapter {unknown[0]!r}", param="adapters", code="adapter_not_found")
        if model == BASE_NAME:
            return BASE_PLAN
        if model in slots:
            return fixed_plan(Policy.PINNED, {slots[model]: 1.0}, digests)
        if model != "auto":
            raise ModelNotFoundError(f"The model {model!r} does not exist.", param="model")
        if isinstance(adapters, Mapping):
            return fixed_plan(Policy.WEIGHTED, {slots[name]: weight for name, weight in adapters.items()}, digests)
        allowed = {slots[name]: name for name in adapters or slots}
        return routed_plan(allowed, dict(allowed), 3, "layer", top_k or 2)

    def list(self) -> list[AdapterInfo]:
        return [*self.infos.values()]

    def get(self, name: str) -> AdapterInfo:
        if name not in self.infos:
            raise AdapterNotFoundError(f"no adapter {name!r}", param="name")
        return self.infos[name]

    def register(
        self, spec: AdapterSpec, examples: Sequence[Any] = (), *, expected: Collection[str] | None = None
    ) -> AdapterInfo:
        self.expected = expected
        if self.fails_with is not None:
            raise self.fails_with
        if spec.name in self.infos and self.infos[spec.name].source != spec.source:
            raise AdapterConflictError(f"{spec.name!r} is taken by other content", param="name")
        if examples:
            encode_examples(examples, ByteTokenizer())
        self.registered.append(spec)
        self.examples.extend(examples)
        if spec.name in self.infos and self.infos[spec.name].replacement is not None:
            return self.infos[spec.name]
        self.infos[spec.name] = AdapterInfo(spec.name, AdapterState.DOWNLOADING, spec.source)
        return self.infos[spec.name]

    def settling(self, name: str) -> "Future[None]":
        settled = self.settles_as or ready_info(name)
        self.infos[name] = dataclasses.replace(settled, name=name, source=self.infos[name].source)
        future: Future[None] = Future()
        if settled.is_settled:
            future.set_result(None)
        return future

    def calibrate(self, name: str, examples: Sequence[Any]) -> AdapterInfo:
        encode_examples(examples, ByteTokenizer())
        self.infos[name] = dataclasses.replace(self.get(name), calibration={"state": "running"})
        self.examples.extend(examples)
        return self.infos[name]

    def retire(self, name: str, *, expected: Collection[str] | None = None) -> AdapterInfo:
        self.expected = expected
        self.infos[name] = dataclasses.replace(self.get(name), state=AdapterState.RETIRING)
        return self.infos[name]

    def router_info(self) -> dict[str, Any]:
        return {"generation": 3, "granularity": "layer", "k": 2}

    def swap_router(self, folder: Path) -> dict[str, Any]:
        if not (folder / "router.json").exists():
            raise RouterArtefactError(f"{folder.name} holds no router.json")
        self.router_folders.append(folder)
        return {**self.router_info(), "generation": 4}

    def record_traffic(self, gate_mass: Any, routed_mass: Any) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True


class Harness:
    """Fakes around the real engine, and the services and app made of them."""

    def __init__(
        self, *, root: Path = Path(), secrets: Secrets | None = None, num_blocks: int = 257, **settings: Any
    ) -> None:
        self.tokenizer = ByteTokenizer()
        self.runner = ScriptedRunner(self.tokenizer)
        self.registry = FakeRegistry()
        self.metrics = Metrics()
        limits = SchedulerLimits(max_num_seqs=16, max_num_batched_tokens=256, max_model_len=512)
        self.config = ServerConfig(root=root, server=ServerSettings(**settings))
        self.engine = AsyncEngine(
            Engine(Scheduler(limits, BlockPool(num_blocks, 16)), self.runner),
            eos_token_ids=frozenset((ByteTokenizer.end_id,)),
            max_waiting_requests=self.config.server.max_waiting_requests,
            on_step=lambda stats: self.metrics.observe_step(stats, {1: "gsm8k", 2: "mbpp"}),
        )
        self.services = Services(
            config=self.config,
            secrets=secrets or Secrets(),
            engine=self.engine,
            registry=cast("AdapterRegistry", self.registry),
            tokenizer=cast("ChatTokenizer", self.tokenizer),
            metrics=self.metrics,
            max_model_len=limits.max_model_len,
            vocab_size=self.tokenizer.vocab_size,
            created_s=1_700_000_000,
        )
        self.app = create_app(self.services)
        self.server: uvicorn.Server | None = None

    def reset(self) -> None:
        """Undo what a test scripted."""
        self.runner.reset()
        self.registry.reset()

    def metric(self, name: str, labels: Mapping[str, str] | None = None) -> float | None:
        """Current value of a series."""
        return self.metrics.registry.get_sample_value(f"lora_mixer_{name}", dict(labels or {}))

    def settle(self, timeout_s: float = 5.0) -> None:
        """Wait until nothing runs, waits or is leased any more."""
        deadline_s = time.monotonic() + timeout_s
        while self.engine.num_running or self.engine.num_waiting or self.registry.num_open_leases:
            assert time.monotonic() < deadline_s, "requests did not end"
            time.sleep(0.005)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Meanwhile the engine takes no step, so that what is submitted stays queued."""
        released = threading.Event()
        self.engine.call_between_steps(released.wait)
        try:
            yield
        finally:
            released.set()

    @contextlib.contextmanager
    def serve(self, *, waits: bool = True) -> Iterator[httpx.Client]:
        """The app on a loopback port, ready unless `waits` is False; a client for it."""
        server = uvicorn.Server(
            uvicorn.Config(self.app, port=0, log_level="warning", ws="none", timeout_graceful_shutdown=5)
        )
        thread = threading.Thread(target=server.run, name="uvicorn")
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                time.sleep(0.005)
            self.server = server
            port = server.servers[0].sockets[0].getsockname()[1]
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
                while waits and client.get("/ready").status_code != 200:
                    time.sleep(0.005)
                yield client
        finally:
            server.should_exit = True
            thread.join()
