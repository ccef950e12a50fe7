"""Moving adapters and routers in and out of the bank. Runs on the publisher's lane, so one change at a time.

Rows are published before the roster that names them, and removed when no lease is left on them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from server.adapters.publisher import Publisher
from server.adapters.records import AdapterState, Record
from server.adapters.roster import ResidentAdapter, hot_rows, routed_slots
from server.adapters.router_swap import check_digests
from server.adapters.state import RegistryState
from server.adapters.weights import Adapter
from server.errors import AdapterConflictError
from server.routing.attach import RoutedModel
from server.routing.policy import BASE_SLOT
from server.routing.router import RouterArtefact
from server.routing.router_bank import RouterGeneration


class CancelledLoadError(Exception):
    """The adapter was retired while it was loading."""


class Residency:
    """Bank and routers of one model, kept in step with the registry's state."""

    def __init__(
        self,
        routed: RoutedModel,
        state: RegistryState,
        publisher: Publisher,
        on_removed: Callable[[Record], object],
    ) -> None:
        self._routed = routed
        self._state = state
        self._publisher = publisher
        self._on_removed = on_removed
        self._num_routers = 0

    def admit(self, record: Record, adapter: Adapter) -> None:
        """Give a checked adapter a slot, its rows and its place in the roster. Raises CancelledLoadError."""
        state = self._state
        with state.mutex:
            if record.cancelled.is_set():
                raise CancelledLoadError
            slot = self._free_slot()
            newcomer = ResidentAdapter(adapter.name, slot, adapter.digest, record.spec.routed)
            residents = (*state.residents(), newcomer)
        bank = self._routed.bank.with_adapter(slot, adapter.weights)
        router = self._staged_router(residents)

        def commit() -> None:
            with state.mutex:
                record.slot = slot
                record.adapter = dataclasses.replace(adapter, weights={})
                if record.state.is_loading:  # otherwise it was retired meanwhile: `collect` takes the rows out again
                    record.state = AdapterState.READY
                    if state.replacements.get(record.spec.name) is record:
                        state.succeed(record)
                state.commit(router)

        self._publisher.publish(bank=bank, router=router, commit=commit)

    def collect(self) -> None:
        """Take out what retired or was replaced and has no lease left; route an equal adapter in place of one."""
        state = self._state
        with state.mutex:
            garbage = state.garbage()
            freed = {record.slot for record in garbage.records}
            residents = [adapter for adapter in state.residents() if adapter.slot not in freed]
            current = state.router
        router = self._staged_router(residents)
        if not garbage and router is current:
            return
        bank = self._routed.bank.without_slots(slot for slot in freed if slot is not None) if freed else None

        def commit() -> None:
            with state.mutex:
                for record in garbage.records:
                    assert record.slot is not None
                    state.forget_traffic(record.slot)
                    record.slot = None
                    state.remove(record)
                state.drop_routers(garbage.routers)
                state.commit(router)

        self._publisher.publish(bank=bank, router=router, drop_routers=garbage.routers, commit=commit)
        for record in garbage.records:
            self._on_removed(record)

    def install_router(self, artefact: RouterArtefact, folder: Path) -> None:
        """Make an artefact the router of new requests; running ones keep theirs. Raises RouterArtefactError."""
        state = self._state
        with state.mutex:
            ready, residents = state.ready(), state.residents()
        check_digests(artefact, ready)
        self._num_routers += 1
        router = self._routed.routers.stage(self._num_routers, artefact, routed_slots(residents))

        def commit() -> None:
            with state.mutex:
                state.router_folder = str(folder)
                state.commit(router)

        self._publisher.publish(router=router, commit=commit)

    def _free_slot(self) -> int:
        """Lowest slot that neither a registration nor the bank uses. Raises AdapterConflictError. With the mutex."""
        taken = {other.slot for other in self._state.all_records()} | self._routed.bank.snapshot.slots
        for slot in range(BASE_SLOT + 1, self._routed.num_slots):
            if slot not in taken:
                return slot
        raise AdapterConflictError("every slot of the bank is taken; retire an adapter", code="too_many_adapters")

    def refresh_router(self) -> None:
        """Publish the rows that calibrations have made, changed or given up."""
        state = self._state
        with state.mutex:
            residents, current = state.residents(), state.router
        router = self._staged_router(residents)

        def commit() -> None:
            with state.mutex:
                state.commit(router)

        if router is not current:
            self._publisher.publish(router=router, commit=commit)

    def _staged_router(self, residents: Sequence[ResidentAdapter]) -> RouterGeneration | None:
        """The current generation with a row for exactly these adapters; itself if that is so already.

        A retiring adapter keeps its row until its slot is free: requests that may choose it are still running. A row
        that changes or goes while its slot stays makes a new generation, so that those requests keep the old one.
        Slots compare as well as digests would, for a slot changes hands only after a change of this lane took it out.
        """
        router = self._state.router
        if router is None:
            return None
        known = {adapter.digest for adapter in router.artefact.adapters}
        trained = {slot for digest, slot in routed_slots(residents).items() if digest in known}
        hot = hot_rows(residents, router.artefact)
        staying = {adapter.slot for adapter in residents} & router.slots
        has_changed = any(router.row_digest_of_slot[slot] != hot[slot].digest for slot in staying & set(hot))
        has_changed |= bool(staying - trained - set(hot))
        if trained | set(hot) == router.slots - {BASE_SLOT} and not has_changed:
            return router
        self._num_routers += has_changed
        generation = self._num_routers if has_changed else router.id
        return self._routed.routers.stage(generation, router.artefact, routed_slots(residents), hot)
