"""Rosters: immutable snapshots of which adapters are served, in which slots, and which of them the router may choose.

A roster turns what a request asks for into a gate plan. It is replaced as a whole, never changed, and knows no threads.
What is derived from all adapters is derived once, when first asked for: rosters change while requests run.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

from server.adapters.calibration import Calibration
from server.adapters.exclusions import Exclusion
from server.errors import InvalidRequestError, ModelNotFoundError
from server.routing.policy import (
    BASE_ALIAS,
    BASE_DIGEST,
    BASE_PLAN,
    BASE_SLOT,
    GatePlan,
    Policy,
    fixed_plan,
    routed_plan,
)
from server.routing.prototypes import HotRow
from server.routing.router import RouterArtefact
from server.routing.router_bank import RouterGeneration

AUTO_MODEL = "auto"
"""The `model` that routes."""

MAX_LISTED = 20
"""Names in the message of an error."""

MAX_WEIGHT = 2.0
"""Largest fixed weight; beyond, an adapter is extrapolated further than anyone has tried."""


@dataclass(frozen=True)
class ServedAdapter:
    """A READY adapter: resident, or warm, which is on disk and takes its place in the bank when a request wants it."""

    name: str
    slot: int | None
    """None: warm."""
    digest: str
    wants_routing: bool
    calibration: Calibration | None = None
    """Its gate row made without training, and the canary's verdict on it."""
    calibration_problem: str | None = None
    """Why there is no such row, if one was asked for."""
    exclusion: Exclusion | None = None
    """Why it may not be routed to although there is a row."""


@dataclass(frozen=True)
class ResidentAdapter(ServedAdapter):
    """An adapter whose rows are in the bank."""

    slot: int


class NotResidentError(Exception):
    """What a request may have needs adapters in the bank that are not there."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__(f"not resident: {', '.join(names)}")
        self.names = names
        """Every adapter that the request needs, sorted, the resident ones among them."""


class Resolution(NamedTuple):
    """What a request gets."""

    plan: GatePlan
    slot_names: Mapping[int, str]
    """Name of every slot the plan can activate, and of the base's."""


@dataclass(frozen=True)
class Roster:
    """Which adapters are served right now."""

    base_model_name: str
    adapters: Mapping[str, ServedAdapter] = field(default_factory=dict)
    router: RouterGeneration | None = None

    def resolve(
        self, model: str, adapters: Sequence[str] | Mapping[str, float] | None = None, top_k: int | None = None
    ) -> Resolution:
        """Gate plan of a request.

        Raises ModelNotFoundError(param="model") for a model that is not served; InvalidRequestError with param
        `adapters` or `top_k_adapters` for a pool, weights or count that cannot be had, and with param `model` and
        code `router_unavailable` when `auto` has nothing to route to; NotResidentError when all is well but for
        adapters that are warm.
        """
        if model == AUTO_MODEL:
            if isinstance(adapters, Mapping):
                _refuse_extension(top_k, "top_k_adapters", "fixed weights are not routed")
                return self._with_names(self._weighted(adapters))
            return self._with_names(self._routed(adapters, top_k))
        is_base = model == self.base_model_name
        if not is_base and model not in self.adapters:
            served = _listed([AUTO_MODEL, self.base_model_name, *self.adapters])
            raise ModelNotFoundError(f"the model {model[:200]!r} does not exist; served are {served}", param="model")
        _refuse_extension(adapters, "adapters", f"it needs model {AUTO_MODEL!r}")
        _refuse_extension(top_k, "top_k_adapters", f"it needs model {AUTO_MODEL!r}")
        if is_base:
            return self._with_names(BASE_PLAN)
        return self._with_names(self._fixed(Policy.PINNED, {model: 1.0}))

    @cached_property
    def routed(self) -> Mapping[int, str]:
        """slot -> digest of every adapter that `auto` may choose."""
        members = (adapter for adapter in self.adapters.values() if self.is_routed(adapter))
        return {adapter.slot: adapter.digest for adapter in members if adapter.slot is not None}

    @cached_property
    def slot_names(self) -> Mapping[int, str]:
        """Name of the adapter in each slot that has one."""
        return {adapter.slot: name for name, adapter in self.adapters.items() if adapter.slot is not None}

    def is_routed(self, adapter: ServedAdapter) -> bool:
        """Whether `auto` may choose it: it wants that, is not excluded, and the router has a gate row in its slot."""
        has_row = self.router is not None and adapter.slot in self.router.slots
        return has_row and adapter.wants_routing and adapter.exclusion is None

    def unrouted_reason(self, name: str) -> str | None:
        """Why `auto` does not choose a served adapter; None when it does, or when nobody is served under the name."""
        adapter = self.adapters.get(name)
        if adapter is None or self.is_routed(adapter):
            return None
        return _unrouted_reason(adapter, self.router, self._row_owners)

    @cached_property
    def _row_owners(self) -> Mapping[str, str]:
        """digest -> name of adapters with a gate row. An excluded one keeps it, so that nobody with the same weights
        gets it instead."""
        slots = frozenset() if self.router is None else self.router.slots
        return {adapter.digest: name for name, adapter in self.adapters.items() if adapter.slot in slots}

    def _routed(self, pool: Sequence[str] | None, top_k: int | None) -> GatePlan:
        router = self.router
        if router is None or not self.routed:
            problem = "no router is loaded" if router is None else "no adapter is routed"
            message = f"{problem}, so {AUTO_MODEL!r} has nothing to choose from; name an adapter or the base model as "
            raise InvalidRequestError(
                message + "`model`, or load a router and the adapters that it was trained for",
                param="model",
                code="router_unavailable",
            )
        allowed = self._pool(router, pool)
        if top_k is not None and not 1 <= top_k <= len(allowed):
            message = f"top_k_adapters is {top_k}; it must be between 1 and {len(allowed)}, the size of the pool"
            raise InvalidRequestError(message, param="top_k_adapters")
        chosen = router.artefact.top_k if top_k is None else top_k
        return routed_plan(allowed, router.row_digest_of_slot, router.id, router.artefact.settings, chosen)

    def _pool(self, router: RouterGeneration, names: Sequence[str] | None) -> dict[int, str]:
        """slot -> digest of what may be chosen. The null expert takes part unless a pool is named without `base`."""
        has_null_expert = BASE_SLOT in router.slots
        null_expert = {BASE_SLOT: BASE_DIGEST} if has_null_expert and (names is None or BASE_ALIAS in names) else {}
        if names is None:
            return {**null_expert, **self.routed}
        if not names or len(set(names)) < len(names):
            problem = "names an adapter twice" if names else "is empty"
            raise InvalidRequestError(f"the pool of adapters {problem}", param="adapters", code="invalid_pool")
        chosen = {}
        for adapter in [self._member(name) for name in names if not (null_expert and name == BASE_ALIAS)]:
            if adapter.slot is None or not self.is_routed(adapter):
                message = f"adapter {adapter.name!r} is not routed: {self.unrouted_reason(adapter.name)}"
                raise InvalidRequestError(message, param="adapters", code="adapter_not_routed")
            chosen[adapter.slot] = adapter.digest
        return {**null_expert, **chosen}

    def _weighted(self, weights: Mapping[str, float]) -> GatePlan:
        if not weights:
            raise InvalidRequestError("the mapping of adapters is empty", param="adapters", code="invalid_pool")
        for name, weight in weights.items():
            if not (math.isfinite(weight) and 0 <= weight <= MAX_WEIGHT):
                message = f"the weight of adapter {name[:200]!r} must be between 0 and {MAX_WEIGHT:g}"
                raise InvalidRequestError(message, param="adapters", code="invalid_weight")
        for name in weights:
            self._member(name)
        return self._fixed(Policy.WEIGHTED, {name: weight for name, weight in weights.items() if weight})

    def _fixed(self, policy: Policy, weights: Mapping[str, float]) -> GatePlan:
        """Raises NotResidentError. Every name is known, and no weight is zero: such adapters need not be there."""
        by_slot, digests = {}, {}
        for name, weight in weights.items():
            adapter = self.adapters[name]
            if adapter.slot is None:
                raise NotResidentError(tuple(sorted(weights)))
            by_slot[adapter.slot], digests[adapter.slot] = weight, adapter.digest
        return fixed_plan(policy, by_slot, digests)

    def _member(self, name: str) -> ServedAdapter:
        if (adapter := self.adapters.get(name)) is None:
            message = f"adapter {name[:200]!r} is not served; served are {_listed(self.adapters) or 'none'}"
            raise InvalidRequestError(message, param="adapters", code="adapter_not_found")
        return adapter

    def _with_names(self, plan: GatePlan) -> Resolution:
        names = {slot: self.slot_names[slot] for slot in plan.slots if slot != BASE_SLOT}
        return Resolution(plan, MappingProxyType({BASE_SLOT: BASE_ALIAS, **names}))


def routed_slots(resident: Iterable[ResidentAdapter]) -> dict[str, int]:
    """digest -> slot for every adapter that wants routing; of equal adapters the first one."""
    slots: dict[str, int] = {}
    for adapter in resident:
        if adapter.wants_routing:
            slots.setdefault(adapter.digest, adapter.slot)
    return slots


def hot_rows(resident: Iterable[ResidentAdapter], artefact: RouterArtefact) -> dict[int, HotRow]:
    """slot -> row of adapters that the router was not trained with and whose row for it has passed the canary."""
    known = set(artefact.digests)
    rows = {}
    for adapter in resident:
        hot = adapter.calibration
        is_sound = hot is not None and hot.artefact is artefact and not hot.problems
        if hot is not None and is_sound and adapter.wants_routing and adapter.digest not in known:
            rows[adapter.slot] = hot.row
            known.add(adapter.digest)
    return rows


def build_roster(base_model_name: str, served: Iterable[ServedAdapter], router: RouterGeneration | None) -> Roster:
    """Roster of these adapters."""
    return Roster(base_model_name, MappingProxyType({adapter.name: adapter for adapter in served}), router)


def _unrouted_reason(adapter: ServedAdapter, router: RouterGeneration | None, with_row: Mapping[str, str]) -> str:
    """`with_row` has the names of adapters that have a gate row, by digest."""
    if not adapter.wants_routing:
        return "registered with routed: false: served by name only"
    if router is None:
        return "no router is loaded: served by name only"
    if adapter.exclusion is not None and adapter.slot in router.slots:
        return f"{adapter.exclusion.reason}: served by name only"
    if (twin := with_row.get(adapter.digest)) is not None:
        return f"the same weights are routed as {twin!r}: served by name only"
    if adapter.digest in router.artefact.digests:
        if adapter.slot is None:
            return "it waits for room in memory (server.adapter_memory_mib): served by name only until it has that"
        return "the same weights are routed under a name that is retiring: served by name only until it is gone"
    if adapter.calibration_problem is not None:
        return f"{adapter.calibration_problem}: served by name only"
    if adapter.calibration is not None and (problems := adapter.calibration.problems):
        return f"{' and '.join(problems)}: served by name only"
    if (known := router.artefact.digest_of.get(adapter.name)) is not None:
        return (
            f"the router artefact's gate row for {adapter.name!r} belongs to other weights "
            f"(digest {known[:12]}, here {adapter.digest[:12]}): served by name only"
        )
    return "no gate row in the router artefact: served by name only"


def _listed(names: Iterable[str]) -> str:
    """The names, or the first of very many."""
    known = list(names)
    rest = f" and {len(known) - MAX_LISTED} more" if len(known) > MAX_LISTED else ""
    return ", ".join(known[:MAX_LISTED]) + rest


def _refuse_extension(value: object, param: str, why: str) -> None:
    if value is not None:
        raise InvalidRequestError(f"{param} cannot be used here: {why}", param=param)
