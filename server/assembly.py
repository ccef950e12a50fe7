"""Builds the parts of a server from its configuration, in order: base model, routed layers, cache, engine, registry.

Part of the composition root (`app.py` puts HTTP around the result; `lora-mixer bench` uses it without HTTP).
"""

import ctypes
import functools
import gc
import logging
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import torch

from server.adapters.examples import encode_examples
from server.adapters.hub import HubSource
from server.adapters.lockfile import Lockfile
from server.adapters.records import AdapterState
from server.adapters.registry import AdapterRegistry
from server.adapters.roster import Roster
from server.api.paths import checked_source
from server.api.services import Services
from server.backend import Backend, build_backend
from server.base_lock import at_locked_commit, lock_commit
from server.config import BaseModelConfig, Secrets, ServerConfig, cache_folder
from server.engine.async_engine import AsyncEngine
from server.engine.block_pool import BlockPool
from server.engine.engine import Engine
from server.engine.model_runner import ModelRunner
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.step_stats import StepStats
from server.errors import AdapterMemoryError, ConfigError, RouterArtefactError
from server.machine import within_quota
from server.metrics import Metrics
from server.model.loader import LoadedModel, load_base_model
from server.routing.attach import RoutedModel, attach_routing
from server.routing.router import load_artefact
from server.routing.router_bank import check_base

logger = logging.getLogger(__name__)

LOCKFILE_NAME = "adapters.lock"
"""Stands beside adapters.yaml; which commit, files and digest every Hub source resolved to."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class ModelParts:
    """The base model with everything the engine needs around it."""

    loaded: LoadedModel
    routed: RoutedModel
    backend: Backend

    @property
    def max_model_len(self) -> int:
        return self.backend.max_model_len


def build_model(config: ServerConfig) -> ModelParts:
    """Load the base model, attach routing, and put a graph with its K/V cache around it.

    Raises ModelLoadError or ConfigError.
    """
    settings = config.server
    torch.set_num_threads(settings.num_threads or within_quota(torch.get_num_threads()))
    started_s = time.monotonic()
    _warn_of_default_model(config.base_model)
    lock = Lockfile(config.root / LOCKFILE_NAME)
    base_model = at_locked_commit(config.base_model, lock, config.root)
    loaded = load_base_model(base_model, device=settings.device, cache_folder=cache_folder(), root=config.root)
    lock_commit(config.base_model, lock, config.root, loaded.revision)
    routed = attach_routing(loaded.model, num_slots=(settings.max_resident_adapters or settings.max_adapters) + 1)
    backend = build_backend(routed, settings, loaded.max_model_len, loaded.quantized)
    loaded.quantized.clear()  # packed now
    logger.info(
        "base model %s in %s on %s (%s backend), %d tokens of K/V cache, loaded in %.1f s",
        loaded.name,
        config.base_model.dtype,
        routed.bank.device,
        backend.name,
        (backend.num_blocks - 1) * settings.block_size,
        time.monotonic() - started_s,
    )
    return ModelParts(loaded, routed, backend)


def _warn_of_default_model(base_model: BaseModelConfig) -> None:
    """A configuration that is empty by mistake serves the demo's model, and half of one serves it as another."""
    missing = [f"base_model.{key}" for key in ("name", "source") if key not in base_model.model_fields_set]
    if missing:
        keys, name, source = " and no ".join(missing), base_model.name, base_model.source
        logger.warning("the config has no %s; taking the default: %s from %s", keys, name, source)


def build_engine(config: ServerConfig, parts: ModelParts) -> Engine:
    """Scheduler, block pool and runner around a model."""
    settings = config.server
    limits = SchedulerLimits(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=parts.max_model_len,
        prefix_caching=settings.prefix_caching,
        # With torch a product's sums depend on its number of rows, and with them, now and then, a token.
        speculative_tokens=settings.speculative_tokens if parts.backend.name == "native" else 0,
    )
    pool = BlockPool(parts.backend.num_blocks, settings.block_size)
    return Engine(Scheduler(limits, pool), ModelRunner(parts.backend.graph, block_size=settings.block_size))


def build_services(config: ServerConfig, secrets: Secrets) -> Services:
    """Everything behind the HTTP routes, with the configured adapters and router in place; nothing runs yet.

    An adapter that cannot be served is listed as FAILED with its reasons. Raises ModelLoadError, ConfigError or
    RouterArtefactError when there is nothing to serve with.
    """
    # Before the model: a wrong artefact should not cost a model load to find out.
    artefact = None if config.router_folder is None else load_artefact(config.router_folder)
    parts = build_model(config)
    if artefact is not None:
        check_base(
            artefact,
            base_model=config.base_model.name,
            hidden_size=parts.routed.hidden_size,
            num_layers=parts.routed.num_layers,
        )
    metrics = Metrics()
    gate = _EngineGate()
    registry = AdapterRegistry(
        parts.routed,
        base_model_name=config.base_model.name,
        settings=config.server,
        run_between_steps=gate.run,
        hub=HubSource.from_settings(config.server, secrets),
        lockfile=config.root / LOCKFILE_NAME,
        journal=config.registry_file,
        root=config.root,
        on_load=metrics.count_load,
        observer=metrics,
        states=parts.backend.states,
        encode_examples=functools.partial(
            encode_examples, tokenizer=parts.loaded.tokenizer, vocab_size=parts.loaded.vocab_size
        ),
    )
    try:
        _load_adapters(registry, config, [known.name for known in artefact.adapters] if artefact is not None else ())
    except BaseException:
        registry.close()
        raise
    engine = AsyncEngine(
        build_engine(config, parts),
        eos_token_ids=parts.loaded.eos_token_ids,
        max_waiting_requests=config.server.max_waiting_requests,
        max_waiting_tokens=config.server.max_waiting_tokens,
        on_step=_StepObserver(metrics, registry),
    )
    gate.engine = engine
    return Services(
        config=config,
        secrets=secrets,
        engine=engine,
        registry=registry,
        tokenizer=parts.loaded.tokenizer,
        metrics=metrics,
        max_model_len=parts.max_model_len,
        vocab_size=parts.loaded.vocab_size,
        created_s=int(time.time()),
    )


def settle() -> None:
    """Tidy up after loading, in a process that keeps what is loaded until its end.

    A full garbage collection walks every object there is, which between two steps was 3 % of decoding at batch 32: take
    what is loaded out of its sight. And give the memory that loading has freed back to the system.
    """
    gc.collect()
    gc.freeze()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # glibc's
        trim(0)


class _EngineGate:
    """Runs functions between two steps: on the engine thread once there is one, at once before that."""

    def __init__(self) -> None:
        self.engine: AsyncEngine | None = None

    def run(self, function: Callable[[], T]) -> "Future[T]":
        """See `AsyncEngine.call_between_steps`."""
        if self.engine is not None:
            return self.engine.call_between_steps(function)
        future: Future[T] = Future()
        try:
            future.set_result(function())
        except Exception as error:  # Whatever it is, it belongs to whoever waits for the future.
            future.set_exception(error)
        return future


class _StepObserver:
    """Hands one step's figures to metrics and traffic shares. Called on the engine thread, so it does little."""

    def __init__(self, metrics: Metrics, registry: AdapterRegistry) -> None:
        self._metrics = metrics
        self._registry = registry
        self._roster: Roster | None = None
        self._slot_names: dict[int, str] = {}

    def __call__(self, stats: StepStats) -> None:
        if self._roster is not self._registry.roster:
            self._roster = self._registry.roster
            # Names of retired slots stay until the slot is taken again: running requests may still use them.
            self._slot_names |= self._roster.slot_names
        self._metrics.observe_step(stats, self._slot_names)
        if stats.routing.gate_mass:
            self._registry.record_traffic(stats.routing.gate_mass, stats.routing.routed_mass)


def _load_adapters(registry: AdapterRegistry, config: ServerConfig, router_names: Collection[str]) -> None:
    """Load the adapters of configuration and journal, wait for all, then install the router over the ready ones.

    `router_names` are those that the router has rows for. Raises ConfigError when what must stay does not fit.
    """
    names = registry.restore(config.adapters, admit=lambda spec: checked_source(config, spec))
    # The registry has logged why one failed, and /v1/adapters keeps saying so.
    infos = [registry.wait(name) for name in names]
    failed = sum(info.state is AdapterState.FAILED for info in infos)
    for info in infos:
        has_room = all(reason.code != AdapterMemoryError.default_code for reason in info.reasons)
        if info.pinned and not has_room:
            message = f"the pinned adapters do not fit into memory: {info.name}: {info.reason}"
            raise ConfigError(message, param="server.adapter_memory_mib")
        # One that came after the pinned ones had filled the memory; had it come first, the swap below would say so.
        if not has_room and info.name in router_names:
            message = f"the router's adapters do not fit into memory: {info.name}: {info.reason}"
            raise ConfigError(message, param="server.adapter_memory_mib")
    if config.router_folder is not None:
        try:
            registry.swap_router(config.router_folder)
        except RouterArtefactError as error:
            if error.code == AdapterMemoryError.default_code:
                raise ConfigError(error.message, param="server.adapter_memory_mib") from error
            raise
        for name in names:  # until gate rows are made: nothing may compute beside the engine once that runs
            registry.wait(name)
    for info in registry.list():
        if info.state is AdapterState.READY and not info.routed:
            logger.warning("adapter %s is served by name only: %s", info.name, info.reason)
    level = logging.ERROR if failed else logging.INFO
    logger.log(level, "%d adapters ready, %d failed", len(names) - failed, failed)
