"""All mutable state of the registry under one mutex: records, leases, the current roster and router, traffic.

Methods are short and never wait for anything but the mutex, so the model's thread may call them.
"""

import copy
import itertools
import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType

from server.adapters.exclusions import Exclusion
from server.adapters.gate_shares import GateShares
from server.adapters.leases import AdapterLease, LeaseBook
from server.adapters.records import AdapterInfo, AdapterState, Record
from server.adapters.roster import ResidentAdapter, Roster, ServedAdapter
from server.adapters.traffic import TrafficWatch
from server.errors import AdapterNotFoundError, ModelNotFoundError
from server.routing.policy import GatePlan, Policy
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
        self.seated: dict[int, Record] = {}
        """By slot: everything that has rows in the bank. With the mutex."""
        self.closed: set[int] = set()
        """Slots that take no further requests for now, since somebody waits for their room. With the mutex."""
        self.is_room_wanted = False
        """Whether requests wait for room, so that none is given to what nobody has asked for. With the mutex."""
        self.router: RouterGeneration | None = None
        """Router of new requests. With the mutex; changed by `commit` on the publisher's lane only."""
        self.router_folder = ""
        self._base_model_name = base_model_name
        self._roster = Roster(base_model_name)
        self._served: dict[str, ServedAdapter] = {}
        self._leases = LeaseBook()
        self._uses = itertools.count(1)
        self._loaded_routers: frozenset[int] = frozenset()
        self._total_gate_mass = 0.0
        self._traffic = TrafficWatch(alarm_factor)
        self._shares = GateShares(share_window)
        self._share_window = share_window
        self._hot_max_gate_share = hot_max_gate_share
        self._on_excluded = on_excluded
        self._settling: dict[str, Future[None]] = {}
        """By name: what somebody waits for; see `settling`."""
        self._changed = threading.Condition()

    @property
    def mutex(self) -> AbstractContextManager[object]:
        return self._changed

    @property
    def roster(self) -> Roster:
        """The current snapshot; needs no mutex."""
        return self._roster

    def acquire(self, plan: GatePlan, count: int) -> None:
        """Hold `count` times what a plan of the current roster may activate. With the mutex."""
        for _ in range(count):
            self._leases.acquire(plan)
        if plan.policy is not Policy.ROUTED:  # what is routed to stays in the bank however rarely it is used
            for slot in plan.slots:
                self.seated[slot].last_use = next(self._uses)

    def release(self, lease: AdapterLease) -> bool:
        """Whether something has no lease left that had one."""
        with self._changed:
            return self._leases.release(lease.plan)

    def record_traffic(
        self, gate_mass: Iterable[tuple[int, float]], routed_mass: Iterable[tuple[int, float]] = ()
    ) -> None:
        """(slot, sum of gate weights) of a step. They are finite: gates of what overflows are zero in both graphs."""
        with self._changed:
            for slot, mass in gate_mass:
                self._total_gate_mass += mass
                if (record := self.seated.get(slot)) is not None:
                    record.gate_mass += mass
                    self._traffic.add(slot, mass)
            if self._traffic.is_due:
                self._judge_traffic()
            for slot, mass in routed_mass:
                self._shares.add(slot, mass)
            if self._shares.is_due:
                self._judge_shares()

    def infos(self) -> list[AdapterInfo]:
        """Of every adapter, in order of registration, all of one moment. Of a thousand that takes tens of milliseconds:
        only copies are made with the mutex held, for which the model's thread may wait."""
        with self._changed:
            roster, total = self._roster, self._total_gate_mass
            known = [(copy.copy(record), copy.copy(self.replacements.get(n))) for n, record in self.records.items()]
        return [self._info(record, replacement, roster, total) for record, replacement in known]

    def settling(self, name: str) -> "Future[None]":
        """Done once the adapter `is_settled`, or is gone; cannot be cancelled. Raises AdapterNotFoundError."""
        with self._changed:
            future: Future[None] = Future()
            future.set_running_or_notify_cancel()
            if self.info(self.record(name)).is_settled:
                future.set_result(None)
                return future
            return self._settling.setdefault(name, future)

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

    def ready(self, name: str) -> Record:
        """Raises ModelNotFoundError."""
        record = self.records.get(name)
        if record is None or record.state is not AdapterState.READY:
            raise ModelNotFoundError(f"the adapter {name!r} is not served any more", param="model")
        return record

    def all_records(self) -> tuple[Record, ...]:
        """Every generation that is served or may be in use."""
        return (*self.records.values(), *self.superseded)

    def succeed(self, record: Record) -> None:
        """Put a checked next generation in its name's place; the one before retires with its last request."""
        before = self.records[record.spec.name]
        before.state = AdapterState.RETIRING
        record.number = before.number
        if before.slot is not None:
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

    def seat(self, record: Record, slot: int) -> None:
        """Its rows are in the bank."""
        record.slot, record.last_use = slot, next(self._uses)
        self.seated[slot] = record

    def unseat(self, record: Record) -> None:
        """Its rows are in the bank no more. What its slot captured says nothing about the next adapter there."""
        if record.slot is not None:
            self._traffic.forget(record.slot)
            self._shares.forget(record.slot)
            del self.seated[record.slot]
            record.slot = None

    def residents(self) -> tuple[ResidentAdapter, ...]:
        """Everything that has rows in the bank, retiring adapters that requests still use included, in order of
        registration: of equal adapters the first is routed.
        """
        records = sorted(self.seated.values(), key=lambda record: (record in self.superseded, record.number))
        return tuple(resident for record in records if (resident := record.resident) is not None)

    def holds_slot(self, slot: int) -> bool:
        """Whether a lease does."""
        return self._leases.holds_slot(slot)

    def garbage(self) -> Garbage:
        dead = (
            record
            for slot, record in self.seated.items()
            if record.state is AdapterState.RETIRING and not self._leases.holds_slot(slot)
        )
        current = None if self.router is None else self.router.id
        unheld = (router for router in self._loaded_routers if not self._leases.holds_router(router))
        return Garbage(tuple(dead), tuple(router for router in unheld if router != current))

    def _judge_traffic(self) -> None:
        roster = self._roster
        slots = {slot: roster.slot_names[slot] for slot in roster.routed}
        for slot in self._traffic.judge(slots):
            logger.warning("adapter %s captures far more of the recent traffic than its even share", slots[slot])
        for slot, record in self.seated.items():
            record.has_alarm = slot in self._traffic.alarmed

    def _judge_shares(self) -> None:
        """Take out of the routed pool who has more than its cap: new requests get another roster, running ones keep
        theirs.
        """
        routed = [self.records[self._roster.slot_names[slot]] for slot in self._roster.routed]
        capped = {record.slot: (record, cap) for record in routed if (cap := self.cap_of(record)) is not None}
        caps = {slot: cap for slot, (_, cap) in capped.items() if slot is not None}
        if (worst := self._shares.judge(caps)) is None:
            return
        record, cap = capped[worst[0]]
        assert record.adapter is not None
        record.exclusion = Exclusion(record.generation, record.adapter.digest, worst[1], cap, self._share_window)
        logger.error("adapter %s is not routed to any more: %s", record.spec.name, record.exclusion.reason)
        self.commit(self.router, record)
        self._on_excluded(record)

    def readmit(self, record: Record) -> None:
        """Let an adapter into the routed pool again; what it has taken so far counts no more."""
        record.exclusion = None
        if record.slot is not None:
            self._shares.forget(record.slot)
        self.commit(self.router, record)

    def cap_of(self, record: Record) -> float | None:
        """Its `max_gate_share`, if it has one."""
        if record.spec.max_gate_share is None and record.calibration is not None:
            return self._hot_max_gate_share
        return record.spec.max_gate_share

    def has_cap(self, record: Record, cap: float) -> bool:
        """Whether its cap is this one, also before its gate row is made."""
        return cap == (record.spec.max_gate_share or self._hot_max_gate_share)

    def commit(self, router: RouterGeneration | None, *changed: Record) -> None:
        """Make visible to new requests what became of `changed`, and this router, and wake who waits.

        Work for the changed ones only, apart from one copy: the model's thread may wait for it.
        """
        for name in {record.spec.name for record in changed}:
            current = self.records.get(name)
            if current is not None and (served := current.served) is not None:
                self._served[name] = served
            else:
                self._served.pop(name, None)
        self._roster = Roster(self._base_model_name, MappingProxyType(dict(self._served)), router)
        self.router = router
        if router is not None:
            self._loaded_routers |= {router.id}
        for name in self._settling.keys() & {record.spec.name for record in changed}:
            if name not in self.records or self.info(self.records[name]).is_settled:
                self._settling.pop(name).set_result(None)
        self._changed.notify_all()

    def drop_routers(self, routers: Iterable[int]) -> None:
        self._loaded_routers -= frozenset(routers)

    def info(self, record: Record) -> AdapterInfo:
        return self._info(record, self.replacements.get(record.spec.name), self._roster, self._total_gate_mass)

    def _info(self, record: Record, replacement: Record | None, roster: Roster, total_gate_mass: float) -> AdapterInfo:
        return record.info(
            unrouted_reason=roster.unrouted_reason(record.spec.name),
            total_gate_mass=total_gate_mass,
            max_gate_share=self.cap_of(record),
            replacement=replacement,
        )

    @property
    def has_leases(self) -> bool:
        return not self._leases.is_empty
