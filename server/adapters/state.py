"""All mutable state of the registry under one mutex: records, leases, the current roster and router, traffic.

Methods are short and never wait for anything but the mutex, so the model's thread may call them.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from server.adapters.exclusions import Exclusion
from server.adapters.gate_shares import GateShares
from server.adapters.leases import AdapterLease, LeaseBook
from server.adapters.records import AdapterInfo, AdapterState, Record
from server.adapters.roster import ResidentAdapter, Roster, build_roster
from server.adapters.traffic import TrafficWatch
from server.errors import AdapterNotFoundError
from server.routing.policy import GatePlan
from server.routing.router_bank import RouterGeneration

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Garbage:
    """What no request can reach any more."""

    records: tuple[Record, ...]
    """Retired ones whose rows are still in the bank."""
    routers: tuple[int, ...]
    """Ids of generations that were replaced."""

    def __bool__(self) -> bool:
        return bool(self.records or self.routers)


class RegistryState:
    """Take `mutex` around everything marked so; the other methods take it themselves."""

    def __init__(
        self,
        base_model_name: str,
        *,
        alarm_factor: float,
        share_window: int,
        hot_max_gate_share: float | None,
        on_excluded: Callable[[Record], object],
    ) -> None:
        """`on_excluded` hears of an adapter that has just left the routed pool: on the model's thread, mutex held."""
        self.records: dict[str, Record] = {}
        """By name, in order of registration. With the mutex."""
        self.replacements: dict[str, Record] = {}
        """By name: next generations that load, or have failed to. With the mutex."""
        self.superseded: list[Record] = []
        """Earlier generations that requests still use. With the mutex."""
        self.router: RouterGeneration | None = None
        """Router of new requests. With the mutex; changed by `commit` on the publisher's lane only."""
        self.router_folder = ""
        self._base_model_name = base_model_name
        self._roster = Roster(base_model_name)
        self._leases = LeaseBook()
        self._loaded_routers: frozenset[int] = frozenset()
        self._total_gate_mass = 0.0
        self._traffic = TrafficWatch(alarm_factor)
        self._shares = GateShares(share_window)
        self._share_window = share_window
        self._hot_max_gate_share = hot_max_gate_share
        self._on_excluded = on_excluded
        self._changed = threading.Condition()

    @property
    def mutex(self) -> AbstractContextManager[object]:
        return self._changed

    @property
    def roster(self) -> Roster:
        """The current snapshot; needs no mutex."""
        return self._roster

    def lease(
        self, model: str, adapters: Sequence[str] | Mapping[str, float] | None, top_k: int | None
    ) -> tuple[GatePlan, Mapping[int, str]]:
        """Resolve against the current roster and hold what the plan may activate."""
        while True:
            roster = self._roster
            resolution = roster.resolve(model, adapters, top_k)
            with self._changed:
                if roster is self._roster:  # otherwise a slot of the plan may be gone: resolve again
                    self._leases.acquire(resolution.plan)
                    return resolution

    def release(self, lease: AdapterLease) -> bool:
        """Whether this left garbage behind."""
        with self._changed:
            return self._leases.release(lease.plan) and bool(self.garbage())

    def record_traffic(
        self, gate_mass: Iterable[tuple[int, float]], routed_mass: Iterable[tuple[int, float]] = ()
    ) -> None:
        with self._changed:
            record_of_slot = {record.slot: record for record in self.all_records()}
            for slot, mass in gate_mass:
                self._total_gate_mass += mass
                if (record := record_of_slot.get(slot)) is not None:
                    record.gate_mass += mass
                    self._traffic.add(slot, mass)
            if self._traffic.is_due:
                self._judge_traffic()
            for slot, mass in routed_mass:
                self._shares.add(slot, mass)
            if self._shares.is_due:
                self._judge_shares()

    def wait_while_loading(self, name: str, timeout_s: float | None) -> AdapterInfo:
        """Until it and its next generation are loaded and calibrated. Raises AdapterNotFoundError, at once or when it
        is gone before that.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.info(self.record(name)).is_settled, timeout_s)
            return self.info(self.record(name))

    def wait_until_gone(self, name: str, timeout_s: float | None) -> bool:
        """Whether the name is free within the time."""
        with self._changed:
            return self._changed.wait_for(lambda: name not in self.records, timeout_s)

    # With the mutex held

    def record(self, name: str) -> Record:
        """Raises AdapterNotFoundError."""
        if (record := self.records.get(name)) is None:
            raise AdapterNotFoundError(f"no adapter is registered as {name[:200]!r}", param="name")
        return record

    def all_records(self) -> tuple[Record, ...]:
        """Every generation that may have a slot."""
        return (*self.records.values(), *self.superseded)

    def succeed(self, record: Record) -> None:
        """Put a loaded next generation in its name's place; the one before retires with its last request."""
        before = self.records[record.spec.name]
        before.state = AdapterState.RETIRING
        self.superseded.append(before)
        self.records[record.spec.name] = record
        del self.replacements[record.spec.name]

    def remove(self, record: Record) -> None:
        """Forget a record wherever it stands."""
        name = record.spec.name
        if self.records.get(name) is record:
            del self.records[name]
            self.replacements.pop(name, None)
        elif self.replacements.get(name) is record:
            del self.replacements[name]
        elif record in self.superseded:
            self.superseded.remove(record)

    def ready(self) -> tuple[ResidentAdapter, ...]:
        """Everything that may be leased, in order of registration."""
        return _residents(record for record in self.records.values() if record.state is AdapterState.READY)

    def residents(self) -> tuple[ResidentAdapter, ...]:
        """Everything that has rows in the bank, retiring adapters that requests still use included."""
        return _residents(self.all_records())

    def garbage(self) -> Garbage:
        dead = (
            record
            for record in self.all_records()
            if record.state is AdapterState.RETIRING
            and record.slot is not None
            and not self._leases.holds_slot(record.slot)
        )
        current = None if self.router is None else self.router.id
        unheld = (router for router in self._loaded_routers if not self._leases.holds_router(router))
        return Garbage(tuple(dead), tuple(router for router in unheld if router != current))

    def _judge_traffic(self) -> None:
        slots = {adapter.slot: adapter.name for adapter in self._roster.adapters.values() if adapter.is_routed}
        for slot in self._traffic.judge(slots):
            logger.warning("adapter %s captures far more of the recent traffic than its even share", slots[slot])
        for record in self.all_records():
            record.has_alarm = record.slot in self._traffic.alarmed

    def _judge_shares(self) -> None:
        """Take out of the routed pool who has more than its cap: new requests get another roster, running ones keep
        theirs.
        """
        routed = [self.records[name] for name, adapter in self._roster.adapters.items() if adapter.is_routed]
        capped = {record.slot: (record, cap) for record in routed if (cap := self.cap_of(record)) is not None}
        caps = {slot: cap for slot, (_, cap) in capped.items() if slot is not None}
        if (worst := self._shares.judge(caps)) is None:
            return
        record, cap = capped[worst[0]]
        assert record.adapter is not None
        record.exclusion = Exclusion(record.generation, record.adapter.digest, worst[1], cap, self._share_window)
        logger.error("adapter %s is not routed to any more: %s", record.spec.name, record.exclusion.reason)
        self.commit(self.router)
        self._on_excluded(record)

    def readmit(self, record: Record) -> None:
        """Let an adapter into the routed pool again; what it has taken so far counts no more."""
        record.exclusion = None
        if record.slot is not None:
            self._shares.forget(record.slot)
        self.commit(self.router)

    def cap_of(self, record: Record) -> float | None:
        """Its `max_gate_share`, if it has one."""
        if record.spec.max_gate_share is None and record.calibration is not None:
            return self._hot_max_gate_share
        return record.spec.max_gate_share

    def has_cap(self, record: Record, cap: float) -> bool:
        """Whether its cap is this one, also before its gate row is made."""
        return cap == (record.spec.max_gate_share or self._hot_max_gate_share)

    def commit(self, router: RouterGeneration | None) -> None:
        """Make what `records` say visible to new requests, under this router, and wake who waits."""
        self._roster = build_roster(self._base_model_name, self.ready(), router)
        self.router = router
        if router is not None:
            self._loaded_routers |= {router.id}
        self._changed.notify_all()

    def forget_traffic(self, slot: int) -> None:
        """The slot's adapter is gone: what it captured says nothing about the next one."""
        self._traffic.forget(slot)
        self._shares.forget(slot)

    def drop_routers(self, routers: Iterable[int]) -> None:
        self._loaded_routers -= frozenset(routers)

    def info(self, record: Record) -> AdapterInfo:
        entry = self._roster.adapters.get(record.spec.name)
        reason = entry.unrouted_reason if entry is not None else None
        replacement = self.replacements.get(record.spec.name)
        return record.info(
            unrouted_reason=reason,
            total_gate_mass=self._total_gate_mass,
            max_gate_share=self.cap_of(record),
            replacement=replacement,
        )

    @property
    def has_leases(self) -> bool:
        return not self._leases.is_empty


def _residents(records: Iterable[Record]) -> tuple[ResidentAdapter, ...]:
    return tuple(resident for record in records if (resident := record.resident) is not None)
