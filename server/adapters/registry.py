"""The registry: every adapter from its registration to the last request that uses it, and the router.

Threads. Loader threads download and check; the publisher's lane stages bank and router changes and publishes them
between two steps; callers take the state's mutex for a moment. At no instant is anything half registered.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from server.adapters.hub import HubSource
from server.adapters.leases import AdapterLease
from server.adapters.loading import AdapterLoader
from server.adapters.lockfile import Lockfile, LockKey
from server.adapters.publisher import Publisher, RunBetweenSteps
from server.adapters.records import AdapterInfo, AdapterState, Record
from server.adapters.residency import CancelledLoadError, Residency
from server.adapters.roster import AUTO_MODEL, BASE_ALIAS, Roster
from server.adapters.router_swap import load_checked_artefact, router_facts
from server.adapters.sources import place
from server.adapters.state import RegistryState
from server.adapters.weights import AdapterLimits
from server.config import AdapterSpec, ServerSettings
from server.errors import AdapterConflictError, InvalidRequestError, LoraMixerError, NotReadyError
from server.routing.attach import RoutedModel

logger = logging.getLogger(__name__)

NUM_LOADERS = 2
"""Adapters downloaded and checked at a time; more would only share the same network and memory."""

AdapterInfos = list[AdapterInfo]


def _ignore_load(_outcome: str, _seconds: float) -> None:
    """For registries that nobody measures."""


class AdapterRegistry:
    """All adapters of one server. Every method may be called from any thread."""

    def __init__(
        self,
        routed: RoutedModel,
        *,
        base_model_name: str,
        settings: ServerSettings,
        run_between_steps: RunBetweenSteps,
        hub: HubSource | None = None,
        lockfile: Path | None = None,
        root: Path = Path(),
        on_load: Callable[[str, float], object] = _ignore_load,
    ) -> None:
        """`root` is the folder that relative sources are relative to.

        `run_between_steps` runs a function on the model's thread between two steps, or inline while there is no such
        thread. `on_load` hears of every finished registration: outcome (`ready`, `cancelled` or the failure's code)
        and seconds. Raises ConfigError when the lockfile is damaged.
        """
        self.loader = AdapterLoader(
            projections=routed.projections,
            base_model_name=base_model_name,
            limits=AdapterLimits(settings.max_adapter_rank, settings.max_adapter_bytes),
            hub=hub or HubSource(max_bytes=settings.max_adapter_bytes),
            lockfile=Lockfile(lockfile),
            root=root,
        )
        self._base_model_name = base_model_name
        self._max_adapters = min(settings.max_adapters, routed.num_slots - 1)
        self._routed = routed
        self._state = RegistryState(base_model_name)
        self._publisher = Publisher(routed, run_between_steps)
        self._residency = Residency(routed, self._state, self._publisher, self._forget_source)
        self._loaders = ThreadPoolExecutor(NUM_LOADERS, thread_name_prefix="adapter-loader")
        self._on_load = on_load
        self._generations: dict[str, int] = {}
        self._is_closing = False

    # Requests

    @property
    def roster(self) -> Roster:
        """The current snapshot."""
        return self._state.roster

    @property
    def has_leases(self) -> bool:
        """Whether any request holds a slot or a router."""
        return self._state.has_leases

    def lease(
        self, model: str, *, adapters: Sequence[str] | Mapping[str, float] | None = None, top_k: int | None = None
    ) -> AdapterLease:
        """Gate plan of a request and a hold on all that it may activate. Raises what `Roster.resolve` raises."""
        plan, slot_names = self._state.lease(model, adapters, top_k)
        return AdapterLease(plan, slot_names, model, self._release)

    def record_traffic(self, gate_mass: Iterable[tuple[int, float]]) -> None:
        """Add one step's (slot, gate mass) pairs to the traffic shares."""
        self._state.record_traffic(gate_mass)

    def _release(self, lease: AdapterLease) -> None:
        if self._state.release(lease):
            self._publisher.enqueue(self._residency.collect)

    # Registration

    def register(self, spec: AdapterSpec) -> AdapterInfo:
        """Start to load an adapter; `get` and `wait` tell how it goes on.

        Idempotent: the same spec while it loads, or equal content under a READY name, gives the existing adapter (for
        a READY local folder this call reads the folder to compare). A FAILED name starts anew. Raises
        AdapterConflictError, InvalidRequestError for a reserved name or contradictory spec, NotReadyError at shutdown.
        """
        if spec.name.lower() in {AUTO_MODEL, BASE_ALIAS, self._base_model_name.lower()}:
            message = f"{spec.name!r} is reserved for routing and the base model; choose another name"
            raise InvalidRequestError(message, param="name", code="reserved_name")
        with self._state.mutex:
            record = self._state.records.get(spec.name)
            if record is None or record.state is AdapterState.FAILED:
                return self._start(spec)
            state, known = record.state, record.adapter
        if state is AdapterState.READY and known is not None:
            self._refuse_other_content(spec, record.spec, known.digest, known.revision)
        elif not state.is_loading or not self._asks_for_the_same(spec, record.spec, commit=None):
            raise AdapterConflictError(f"adapter {spec.name!r} is {state}; wait until that has ended", param="name")
        return self.get(spec.name)

    def retire(self, name: str) -> AdapterInfo:
        """Stop serving an adapter: refused to new requests at once, gone when the last request that uses it ends.

        Raises AdapterNotFoundError.
        """
        with self._state.mutex:
            record = self._state.record(name)
            if record.state is AdapterState.FAILED:
                del self._state.records[name]
            elif record.state.is_loading:
                record.cancelled.set()
            record.state = AdapterState.RETIRING
            self._state.commit(self._state.router)
            info = self._state.info(record)
        self._publisher.enqueue(self._residency.collect)
        return info

    def get(self, name: str) -> AdapterInfo:
        """Raises AdapterNotFoundError."""
        with self._state.mutex:
            return self._state.info(self._state.record(name))

    def list(self) -> AdapterInfos:
        """Every adapter in the order of registration, failed and retiring ones included."""
        with self._state.mutex:
            return [self._state.info(record) for record in self._state.records.values()]

    def wait(self, name: str, timeout_s: float | None = None) -> AdapterInfo:
        """Block until the adapter is no longer loading, or the time is up. Raises AdapterNotFoundError."""
        return self._state.wait_while_loading(name, timeout_s)

    def wait_retired(self, name: str, timeout_s: float | None = None) -> bool:
        """Block until the name is free, or the time is up; whether it is free."""
        return self._state.wait_until_gone(name, timeout_s)

    def close(self) -> None:
        """Abandon loads and stop the threads. Leases may still be released afterwards."""
        with self._state.mutex:
            self._is_closing = True
            for record in self._state.records.values():
                record.cancelled.set()
        self._publisher.close()
        self._loaders.shutdown(wait=True, cancel_futures=True)

    # Router

    def router_info(self) -> dict[str, Any]:
        """Facts of the loaded router, JSON-able; `loaded` is false without one."""
        with self._state.mutex:
            return router_facts(self._state.roster, self._state.router_folder)

    def swap_router(self, folder: Path) -> dict[str, Any]:
        """Load an artefact and make it the router of new requests; running ones keep theirs. Blocks until it serves.

        Raises RouterArtefactError when it is damaged or made for another base, other projections or other weights.
        """
        artefact = load_checked_artefact(folder, self._routed, self._base_model_name)
        self._publisher.run(lambda: self._residency.install_router(artefact, folder))
        self._publisher.enqueue(self._residency.collect)
        return self.router_info()

    # Loading

    def _start(self, spec: AdapterSpec) -> AdapterInfo:
        """New record and its load. With the mutex held."""
        if self._is_closing:
            raise NotReadyError("the server is shutting down")
        records = self._state.records
        failed = [name for name, record in records.items() if record.state is AdapterState.FAILED]
        if len(records) - len(failed) >= self._max_adapters:
            message = f"{self._max_adapters} adapters are registered, the most allowed; retire one first"
            raise AdapterConflictError(message, param="name", code="too_many_adapters")
        # Failures are kept to be read, the oldest only as long as there is room.
        for name in {spec.name, *failed[: max(0, len(failed) - self._max_adapters + 1)]}:
            records.pop(name, None)
        generation = self._generations[spec.name] = self._generations.get(spec.name, 0) + 1
        record = records[spec.name] = Record(spec, generation)
        self._loaders.submit(self._load, record)
        return self._state.info(record)

    def _load(self, record: Record) -> None:
        """On a loader's thread, from DOWNLOADING to READY or FAILED."""
        start_s = time.monotonic()
        outcome = "ready"
        try:
            adapter = self.loader.load(
                record.spec,
                progress=lambda done, total: self._report(record, done / max(1, total)),
                on_validating=lambda: self._report(record, 1.0, AdapterState.VALIDATING),
            )
            self._publisher.run(lambda: self._residency.admit(record, adapter))
        except CancelledLoadError:
            outcome = "cancelled"
            self._end(record, None)
        except LoraMixerError as error:
            outcome = error.code or "failed"
            logger.warning("adapter %s was not registered: %s", record.spec.name, error)
            self._end(record, error)
        except Exception as error:
            outcome = "internal_error"
            logger.exception("adapter %s could not be registered", record.spec.name)
            self._end(record, LoraMixerError(f"internal error: {type(error).__name__}", code=outcome))
        self._on_load(outcome, time.monotonic() - start_s)

    def _report(self, record: Record, progress: float, state: AdapterState | None = None) -> None:
        if record.cancelled.is_set():
            raise CancelledLoadError
        with self._state.mutex:
            record.progress = progress
            if state is not None and record.state.is_loading:
                record.state = state

    def _end(self, record: Record, failure: LoraMixerError | None) -> None:
        """A load that came to nothing: FAILED with its reason, or gone if it was retired meanwhile."""
        with self._state.mutex:
            record.slot = record.adapter = None
            if failure is not None and record.state is not AdapterState.RETIRING:
                record.state, record.failure = AdapterState.FAILED, failure
            elif self._state.records.get(record.spec.name) is record:
                del self._state.records[record.spec.name]
            self._state.commit(self._state.router)

    def _refuse_other_content(self, spec: AdapterSpec, known: AdapterSpec, digest: str, revision: str | None) -> None:
        """Raises AdapterConflictError unless `spec` means the very adapter that is READY under its name."""
        is_same = self._asks_for_the_same(spec, known, revision)
        if is_same and revision is None:  # a local folder may have changed since
            try:
                is_same = self.loader.load(spec).digest == digest
            except LoraMixerError as error:
                message = f"adapter {spec.name!r} is READY, but its source can no longer be loaded: {error.message}"
                raise AdapterConflictError(message, param="name") from error
        if not is_same:
            message = (
                f"the name {spec.name!r} is taken by other content or settings (source {known.source!r}, "
                f"routed {known.routed}, digest {digest[:12]}); retire it first"
            )
            raise AdapterConflictError(message, param="name")

    def _asks_for_the_same(self, spec: AdapterSpec, known: AdapterSpec, commit: str | None) -> bool:
        """Same place, revision (or the commit it resolved to) and settings; no description agrees with any."""
        root = self.loader.root
        is_same_revision = spec.revision == known.revision or (commit is not None and spec.revision == commit)
        is_same_place = place(spec, root) == place(known, root)
        is_same_setting = spec.routed == known.routed and spec.description in ("", known.description)
        return is_same_place and is_same_revision and is_same_setting

    def _forget_source(self, record: Record) -> None:
        """Drop a retired source's lock, so that it resolves anew, unless another registration stands on it."""
        key = LockKey.of(record.spec)
        with self._state.mutex:
            is_shared = any(LockKey.of(other.spec) == key for other in self._state.records.values())
        if not is_shared:
            self.loader.forget(record.spec)
