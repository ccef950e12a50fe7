"""Moving adapters and routers in and out of the bank. Runs on the publisher's lane, so one change at a time.

Rows are published before the roster that names them, and removed when no lease is left on them.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from server.adapters.occupancy import has_row, room_of
from server.adapters.publisher import Publisher
from server.adapters.records import AdapterState, Record, RowVerdict
from server.adapters.room import Room
from server.adapters.roster import ResidentAdapter, hot_rows, routed_slots
from server.adapters.router_swap import check_digests
from server.adapters.state import RegistryState
from server.adapters.weights import Adapter
from server.errors import AdapterRefusedError, RefusalReason
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
        *,
        max_bytes: int | None = None,
    ) -> None:
        """`max_bytes` is what the adapters in the bank may cost together."""
        self._routed = routed
        self._state = state
        self._publisher = publisher
        self._on_removed = on_removed
        self._max_bytes = max_bytes
        self._num_routers = 0

    def room(self, leaving: Record | None = None) -> Room:
        """See `room_of`. With the mutex."""
        return room_of(self._state, self._max_bytes, self._routed.num_slots - 1, leaving)

    def explain_full(self, sizes: Sequence[int], room: Room) -> str:
        """Why adapters of these sizes can never be in the bank together."""
        if self._max_bytes is not None and room.staying_bytes + sum(sizes) > self._max_bytes:
            return (
                f"{_mib(sum(sizes))} of memory are needed beside {_mib(room.staying_bytes)} of pinned and routed "
                f"adapters, which never leave it, but server.adapter_memory_mib allows {_mib(self._max_bytes)}; raise "
                "it, or pin or route to fewer adapters"
            )
        return (
            f"{len(sizes)} places in memory are needed beside those of {room.num_staying} pinned and routed adapters, "
            f"which never leave it, but server.max_resident_adapters allows {self._routed.num_slots - 1}; raise it, or "
            "pin or route to fewer adapters"
        )

    def admit(self, record: Record, adapter: Adapter, confirm: Callable[[], object]) -> None:
        """Make a checked adapter READY: in the bank if it is to stay there or if there is room, else warm.

        `confirm` is called once nothing else can be in the way of that, and before any request sees it. Raises
        CancelledLoadError, AdapterRefusedError when it could never be in the bank, and what `confirm` raises.
        """
        state = self._state
        size = self._routed.bank.bytes_of(adapter.weights)
        with state.mutex:
            if record.cancelled.is_set():
                raise CancelledLoadError
            is_next = state.replacements.get(record.spec.name) is record
            before = state.records[record.spec.name] if is_next else None
            record.memory_bytes = size
            victims = self._place(record, adapter, before)
        newcomers = [] if victims is None else [(record, adapter)]
        self.exchange(
            victims or (), newcomers, lambda: self._make_ready(record, adapter), changed=(record,), confirm=confirm
        )
        if before is not None and before.state is AdapterState.RETIRING and before.slot is None:
            self._on_removed(before)

    def _place(self, record: Record, adapter: Adapter, before: Record | None) -> list[Record] | None:
        """Who makes room for a newcomer; None: it has to be warm. With the mutex."""
        state, size = self._state, record.memory_bytes
        room = self.room(leaving=before)
        if not room.can_hold([size]):
            reason = RefusalReason("adapter_memory_full", self.explain_full([size], room), "memory of the server")
            raise AdapterRefusedError(record.spec.name, [reason])
        router, spec = state.router, record.spec
        stays = spec.pinned or (router is not None and spec.routed and has_row(record, adapter.digest, router.artefact))
        taken = room.take([size])
        if taken is None or taken.leased:
            return None
        victims = [state.seated[slot] for slot in taken.idle]
        if not stays and (state.is_room_wanted or any(victim is not before for victim in victims)):
            return None  # nobody has asked for it yet
        state.closed |= set(taken.idle)
        return victims

    def _make_ready(self, record: Record, adapter: Adapter) -> None:
        state = self._state
        record.adapter = dataclasses.replace(adapter, weights={})
        if record.state.is_loading:
            record.state = AdapterState.READY
            if state.replacements.get(record.spec.name) is record:
                state.succeed(record)
        elif record.slot is None:  # retired meanwhile; with a slot, `collect` takes its rows out again
            state.remove(record)

    def exchange(
        self,
        victims: Sequence[Record],
        newcomers: Sequence[tuple[Record, Adapter]],
        settle: Callable[[], object] = lambda: None,
        changed: Sequence[Record] = (),
        confirm: Callable[[], object] = lambda: None,
    ) -> None:
        """Put newcomers in the bank in place of victims, which have no leases and get none; `settle` runs with the
        mutex held, just before new requests see the change, and may change what `changed` lists. `confirm` is called
        when all is prepared; if it raises, nothing has changed.
        """
        state, bank = self._state, self._routed.bank
        freed = frozenset(victim.slot for victim in victims if victim.slot is not None)
        with state.mutex:
            residents = [adapter for adapter in state.residents() if adapter.slot not in freed]
            coming = [record.number for record in state.records.values() if record.state.is_loading]
        staged = bank.without_slots(freed) if freed else bank.snapshot
        placed = []
        for record, adapter in newcomers:
            # The lowest free one, leaving theirs to those that were registered before and come later: updates are added
            # in the order of slots, and a sum of another order differs in its last bits.
            free = sorted(set(range(BASE_SLOT + 1, bank.num_slots)) - staged.slots)
            slot = free[min(sum(number < record.number for number in coming), len(free) - 1)]
            staged = bank.with_adapter(slot, adapter.weights, onto=staged)
            residents.append(
                ResidentAdapter(record.spec.name, slot, adapter.digest, record.spec.routed, record.calibration)
            )
            placed.append((record, slot))
        router = self._staged_router(residents, freed)
        confirm()

        def commit() -> None:
            with state.mutex:
                for victim in victims:
                    state.unseat(victim)
                    if victim.state is AdapterState.RETIRING:
                        state.remove(victim)
                for record, slot in placed:
                    state.seat(record, slot)
                settle()
                state.commit(router, *victims, *(record for record, _ in placed), *changed)

        self._publisher.publish(bank=staged, router=router, commit=commit)

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
                    state.unseat(record)
                    state.remove(record)
                state.drop_routers(garbage.routers)
                state.commit(router, *garbage.records)

        self._publisher.publish(bank=bank, router=router, drop_routers=garbage.routers, commit=commit)
        for record in garbage.records:
            self._on_removed(record)

    def install_router(self, artefact: RouterArtefact, folder: Path, verdicts: Mapping[Record, RowVerdict]) -> None:
        """Make an artefact the router of new requests, with the rows that `verdicts` hold for it; running ones keep
        theirs. Raises RouterArtefactError.
        """
        state = self._state
        with state.mutex:
            rows = {record.slot: verdict.calibration for record, verdict in verdicts.items()}
            residents = [
                dataclasses.replace(adapter, calibration=rows.get(adapter.slot)) for adapter in state.residents()
            ]
        check_digests(artefact, state)
        self._num_routers += 1
        hot = hot_rows(residents, artefact)
        router = self._routed.routers.stage(self._num_routers, artefact, routed_slots(residents), hot)

        def commit() -> None:
            with state.mutex:
                state.router_folder = str(folder)
                for record, verdict in verdicts.items():
                    record.calibration, record.calibration_problem = verdict
                state.commit(router, *verdicts)

        self._publisher.publish(router=router, commit=commit)

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

    def _staged_router(
        self, residents: Sequence[ResidentAdapter], freed: frozenset[int] = frozenset()
    ) -> RouterGeneration | None:
        """The current generation with a row for exactly these adapters; itself if that is so already.

        A retiring adapter keeps its row until its slot is free: requests that may choose it are still running. A row
        that changes or goes while its slot stays makes a new generation, so that those requests keep the old one.
        Slots compare as well as digests would, but for slots in `freed`, which may have changed hands: no request uses
        them, so that their rows may change within a generation.
        """
        router = self._state.router
        if router is None:
            return None
        trained = {slot for digest, slot in routed_slots(residents).items() if digest in router.artefact.digests}
        hot = hot_rows(residents, router.artefact)
        staying = {adapter.slot for adapter in residents} & router.slots
        has_changed = any(router.row_digest_of_slot[slot] != hot[slot].digest for slot in staying & set(hot))
        has_changed |= bool(staying - trained - set(hot))
        if trained | set(hot) == router.slots - {BASE_SLOT} and not has_changed and not freed & router.slots:
            return router
        self._num_routers += has_changed
        generation = self._num_routers if has_changed else router.id
        return self._routed.routers.stage(generation, router.artefact, routed_slots(residents), hot)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.3g} MiB"
