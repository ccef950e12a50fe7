"""The registry: every adapter from its registration to the last request that uses it, and the router.

Threads. Loader threads download and check; the publisher's lane stages bank and router changes and publishes them
between two steps; callers take the state's mutex for a moment. At no instant is anything half registered.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from server.adapters.calibration import Calibrator
from server.adapters.examples import EncodeExamples
from server.adapters.hot_rows import HotRows, refuse_examples
from server.adapters.hub import HubSource
from server.adapters.journal import Journal
from server.adapters.leases import AdapterLease
from server.adapters.leasing import LeaseDesk
from server.adapters.loading import AdapterLoader
from server.adapters.lockfile import Lockfile, LockKey
from server.adapters.occupancy import stays, wanted_by
from server.adapters.publisher import Publisher, RunBetweenSteps
from server.adapters.records import AdapterInfo, AdapterState, Record
from server.adapters.registration import Registrations
from server.adapters.residency import Residency
from server.adapters.roster import Roster
from server.adapters.router_swap import check_digests, load_checked_artefact, router_facts
from server.adapters.seating import NobodyCounts, ResidencyObserver, Seating
from server.adapters.share_guard import ShareGuard
from server.adapters.state import RegistryState
from server.adapters.weights import AdapterLimits
from server.config import AdapterSpec, ServerSettings
from server.errors import AdapterMemoryError, RouterArtefactError
from server.routing.attach import RoutedModel
from server.routing.plan_course import NO_COURSE, PlanCourse
from server.routing.policy import GatePlan
from server.routing.recording import ExampleStates

AdapterInfos = list[AdapterInfo]

SWAP_WAIT_S = 600.0
"""Longest that the swap of a router waits for its adapters: many may have to be read, and requests to end."""


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
        journal: Path | None = None,
        root: Path = Path(),
        on_load: Callable[[str, float], object] = _ignore_load,
        observer: ResidencyObserver | None = None,
        states: ExampleStates | None = None,
        encode_examples: EncodeExamples = refuse_examples,
    ) -> None:
        """`root` is the folder that relative sources are relative to.

        `run_between_steps` runs a function on the model's thread between two steps, or inline while there is no such
        thread. `on_load` hears of every finished registration: outcome (`ready`, `cancelled` or the failure's code)
        and seconds, `observer` of what moves between disk and memory. `journal` keeps registrations across restarts;
        `states` is where gate rows get theirs, by default the torch model. Raises ConfigError when lockfile or journal
        is damaged.
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
        self._routed = routed
        self._has_prompt_gate = settings.prompt_gate
        self._state = RegistryState(
            base_model_name,
            alarm_factor=settings.traffic_alarm_factor,
            share_window=settings.gate_share_window,
            hot_max_gate_share=settings.hot_max_gate_share,
            on_excluded=lambda record: self._publisher.enqueue(lambda: guard.keep(record)),
        )
        self._publisher = Publisher(routed, run_between_steps)
        max_bytes = None if settings.adapter_memory_mib is None else round(settings.adapter_memory_mib * 2**20)
        self._residency = Residency(routed, self._state, self._publisher, self._forget_source, max_bytes=max_bytes)
        self._is_tidying = False
        self._seating = Seating(
            self._state,
            self._residency,
            self.loader,
            observer or NobodyCounts(),
            max_waiting=settings.max_waiting_requests,
            serve_soon=self._tidy_soon,
            release=self._release,
        )
        self.desk = LeaseDesk(self._state, self._seating, wait_s=settings.adapter_wait_s)
        records = Journal(journal)
        guard = ShareGuard(self._state, records.exclusions)
        publish_rows = functools.partial(self._publisher.run, self._residency.refresh_router)
        calibrator = Calibrator(routed, run_between_steps, states, reads_prompts=settings.prompt_gate)
        self._hot_rows = HotRows(
            self._state, calibrator, publish_rows, encode_examples, records.examples, guard.readmit, self.desk.hold
        )
        self._registrations = Registrations(
            self.loader,
            self._state,
            self._publisher,
            self._residency,
            records,
            guard,
            base_model_name=base_model_name,
            max_adapters=settings.max_adapters,
            max_loading=settings.max_loading_adapters,
            on_ready=self._on_ready,
            on_retired=self._forget_source,
            on_load=on_load,
            tidy_soon=self._tidy_soon,
        )

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
        """Gate plan of a request and a hold on all that it may activate. Blocks while that is not in memory: for worker
        threads. Raises what `LeaseDesk.lease_when_resident` raises.
        """
        return self.desk.lease(model, adapters, top_k)[0]

    def prompt_course(self, plan: GatePlan, token_ids: Sequence[int]) -> PlanCourse:
        """Plans of the tokens of a prompt whose request holds `plan`: see `RouterBank.prompt_course`."""
        return self._routed.routers.prompt_course(plan, token_ids) if self._has_prompt_gate else NO_COURSE

    def record_traffic(
        self, gate_mass: Iterable[tuple[int, float]], routed_mass: Iterable[tuple[int, float]] = ()
    ) -> None:
        """Add one step's (slot, gate mass) pairs to the traffic shares; `routed_mass` is what the router gave where it
        had a choice, and counts towards `max_gate_share`.
        """
        self._state.record_traffic(gate_mass, routed_mass)

    def _release(self, lease: AdapterLease) -> None:
        with self._state.mutex:
            is_due = self._state.release(lease) and (len(self._seating.line) > 0 or bool(self._state.garbage()))
        if is_due:
            self._tidy_soon()

    def _tidy_soon(self) -> None:
        """Once is enough for all who ask before it begins."""
        with self._state.mutex:
            is_queued, self._is_tidying = self._is_tidying, True
        if not is_queued:
            self._publisher.enqueue(self._tidy)

    def _tidy(self) -> None:
        """Take out what nobody can use any more, and give the room to who waits for it."""
        with self._state.mutex:
            self._is_tidying = False
        self._residency.collect()
        self._seating.serve()
        self._residency.collect()  # what was retired while it came in

    def _on_ready(self, record: Record) -> None:
        """An adapter that is to stay in memory and found no room gets in line for it, like a request."""
        with self._state.mutex:
            is_missing = record.slot is None and record.state is AdapterState.READY and stays(self._state, record)
        if is_missing:
            self.desk.bring_in(record.spec.name, lambda: self._hot_rows.start(record))
        else:
            self._hot_rows.start(record)

    # Registration

    def restore(
        self, configured: Sequence[AdapterSpec], *, admit: Callable[[AdapterSpec], object] = lambda _: None
    ) -> tuple[str, ...]:
        """Start to load what a server of this configuration served last: its adapters, less those that were retired
        while it ran, and those that were registered while it ran, unless `admit` raises LoraMixerError. Their names.
        """
        return tuple(self._registrations.restore(configured, admit))

    def register(
        self, spec: AdapterSpec, examples: Sequence[Any] = (), *, expected: Collection[str] | None = None
    ) -> AdapterInfo:
        """Start to load an adapter; `get` and `wait` tell how it goes on. `examples` are those of `encode_examples`.

        Idempotent: the same spec while it loads, or equal content under a READY name, gives the existing adapter (for
        a READY local folder this call reads the folder to compare), which is let into the routed pool again if it had
        to leave it. A FAILED name starts anew. `expected` holds etags, or `*`: the name must have an adapter with one
        of them, which other content then replaces as its next generation; running requests keep theirs. Raises
        AdapterConflictError, PreconditionFailedError, TooManyRegistrationsError, InvalidRequestError for a reserved
        name or contradictory spec, NotReadyError at shutdown, LoraMixerError when the journal cannot be written; then
        nothing has changed.
        """
        encoded = self._hot_rows.encode(examples)
        info = self._registrations.register(spec, expected, encoded)
        if not encoded:
            return info
        self._hot_rows.merge(spec.name, encoded)  # the adapter may have been there already
        return self.get(spec.name)

    def retire(self, name: str, *, expected: Collection[str] | None = None) -> AdapterInfo:
        """Stop serving an adapter: refused to new requests at once, gone when the last request that uses it ends.

        Raises AdapterNotFoundError, and PreconditionFailedError, NotReadyError and LoraMixerError as `register`.
        """
        return self._registrations.retire(name, expected)

    def get(self, name: str) -> AdapterInfo:
        """Raises AdapterNotFoundError."""
        with self._state.mutex:
            return self._state.info(self._state.record(name))

    def list(self) -> AdapterInfos:
        """Every adapter in the order of registration, failed and retiring ones included."""
        return self._state.infos()

    def wait(self, name: str, timeout_s: float | None = None) -> AdapterInfo:
        """Block until nothing that was started for it is under way, or the time is up. Raises AdapterNotFoundError."""
        wait([self.settling(name)], timeout_s)
        return self.get(name)

    def settling(self, name: str) -> "Future[None]":
        """See `RegistryState.settling`: for who must not block."""
        return self._state.settling(name)

    def wait_retired(self, name: str, timeout_s: float | None = None) -> bool:
        """Block until the name is free, or the time is up; whether it is free."""
        return self._state.wait_until_gone(name, timeout_s)

    def calibrate(self, name: str, examples: Sequence[Any]) -> AdapterInfo:
        """Make its gate row anew with more examples, and let it into the routed pool again if it passes; `wait` tells
        when. Raises as `HotRows.add_examples`.
        """
        self._hot_rows.add_examples(name, examples)
        return self.get(name)

    def close(self) -> None:
        """Abandon loads and stop the threads. Leases may still be released afterwards."""
        self.desk.refuse_waiting()
        self._registrations.close()
        self._hot_rows.close()
        self._seating.close()

    def router_info(self) -> dict[str, Any]:
        """Facts of the loaded router, JSON-able; `loaded` is false without one."""
        with self._state.mutex:
            return router_facts(self._state.roster, self._state.router_folder)

    def swap_router(self, folder: Path) -> dict[str, Any]:
        """Load an artefact and make it the router of new requests; running ones keep theirs. Blocks until it serves.

        Its adapters are brought into memory first, and routed newcomers get rows for it. Raises RouterArtefactError
        when they do not fit there, or it is damaged or made for another base, other projections or other weights.
        """
        artefact = load_checked_artefact(folder, self._routed, self._base_model_name)
        check_digests(artefact, self._state)  # before it takes long; what comes meanwhile, at the end
        with contextlib.ExitStack() as holds:
            if wanted := wanted_by(self._state, artefact):
                try:
                    holds.callback(self.desk.hold(wanted, wait_s=SWAP_WAIT_S).release)
                except AdapterMemoryError as error:
                    message = f"the router's adapters do not fit into memory: {error.message}"
                    raise RouterArtefactError(message, code=error.code) from error
            install = self._residency.install_router
            self._hot_rows.swap(artefact, lambda rows: self._publisher.run(lambda: install(artefact, folder, rows)))
        self._tidy_soon()
        return self.router_info()

    def _forget_source(self, record: Record) -> None:
        """Drop a retired source's lock, so that it resolves anew, unless another registration stands on it."""
        key = LockKey.of(record.spec)
        with self._state.mutex:
            alive = [r for r in self._state.all_records() if r is not record and r.state is not AdapterState.RETIRING]
        if not any(LockKey.of(other.spec) == key for other in alive):
            self.loader.forget(record.spec)
