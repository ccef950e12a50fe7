"""Leases: what keeps a request's slots and router generation alive until its last token."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from server.routing.policy import BASE_SLOT, GatePlan


@dataclass(eq=False)
class AdapterLease:
    """A request's hold on the roster it was admitted under. Release it exactly once; again is harmless."""

    plan: GatePlan
    slot_names: Mapping[int, str]
    """Name of every slot the plan can activate, and `base` for the base slot."""
    model: str
    """The model's name as served."""
    _on_release: Callable[["AdapterLease"], None] = field(repr=False)
    _is_released: bool = field(default=False, repr=False)

    def release(self) -> None:
        """Give the slots back. Cheap, never blocks on a step, callable from any thread."""
        if not self._is_released:
            self._is_released = True
            self._on_release(self)


class LeaseBook:
    """Counts of leases per slot and per router generation. Every call holds the registry's mutex."""

    def __init__(self) -> None:
        self._slots: Counter[int] = Counter()
        self._routers: Counter[int] = Counter()

    def acquire(self, plan: GatePlan) -> None:
        self._change(plan, 1)

    def release(self, plan: GatePlan) -> bool:
        """Whether some slot or generation is free of leases now that was not before."""
        return self._change(plan, -1)

    def holds_slot(self, slot: int) -> bool:
        return slot in self._slots

    def holds_router(self, generation: int) -> bool:
        return generation in self._routers

    @property
    def is_empty(self) -> bool:
        return not self._slots and not self._routers

    def _change(self, plan: GatePlan, difference: int) -> bool:
        held = [(self._slots, slot) for slot in plan.slots if slot != BASE_SLOT]
        if plan.router_generation is not None:
            held.append((self._routers, plan.router_generation))
        has_freed = False
        for counter, key in held:
            counter[key] += difference
            assert counter[key] >= 0, f"lease count of {key} fell below zero"
            if counter[key] == 0:
                del counter[key]
                has_freed = True
        return has_freed
