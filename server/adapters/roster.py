"""Rosters: immutable snapshots of which adapters stand in which slots, and which of them the router may choose.

A roster turns what a request asks for into a gate plan. It is replaced as a whole, never changed, and knows no threads.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from server.adapters.calibration import Calibration
from server.adapters.exclusions import Exclusion
from server.errors import InvalidRequestError, ModelNotFoundError
from server.routing.policy import BASE_DIGEST, BASE_PLAN, BASE_SLOT, GatePlan, Policy, fixed_plan, routed_plan
from server.routing.prototypes import HotRow
from server.routing.router import RouterArtefact
from server.routing.router_bank import RouterGeneration

AUTO_MODEL = "auto"
"""The `model` that routes."""

BASE_ALIAS = "base"
"""Name of the null expert in a routed pool and in traces."""

MAX_WEIGHT = 2.0
"""Largest fixed weight; beyond, an adapter is extrapolated further than anyone has tried."""


@dataclass(frozen=True)
class ResidentAdapter:
    """An adapter whose rows are in the bank."""

    name: str
    slot: int
    digest: str
    wants_routing: bool
    calibration: Calibration | None = None
    """Its gate row made without training, and the canary's verdict on it."""
    calibration_problem: str | None = None
    """Why there is no such row, if one was asked for."""
    exclusion: Exclusion | None = None
    """Why it may not be routed to although there is a row."""


@dataclass(frozen=True)
class RosterAdapter:
    """A resident adapter with the router's verdict on it."""

    name: str
    slot: int
    digest: str
    unrouted_reason: str | None
    """Why `auto` does not choose it; None when it does."""

    @property
    def is_routed(self) -> bool:
        return self.unrouted_reason is None


class Resolution(NamedTuple):
    """What a request gets."""

    plan: GatePlan
    slot_names: Mapping[int, str]
    """Name of every slot the plan can activate, and of the base's."""


@dataclass(frozen=True)
class Roster:
    """Which adapters are served right now."""

    base_model_name: str
    adapters: Mapping[str, RosterAdapter] = field(default_factory=dict)
    router: RouterGeneration | None = None

    def resolve(
        self, model: str, adapters: Sequence[str] | Mapping[str, float] | None = None, top_k: int | None = None
    ) -> Resolution:
        """Gate plan of a request.

        Raises ModelNotFoundError(param="model") for a model that is not served; InvalidRequestError with param
        `adapters` or `top_k_adapters` for a pool, weights or count that cannot be had, and with param `model` and
        code `router_unavailable` when `auto` has nothing to route to.
        """
        if model == AUTO_MODEL:
            if isinstance(adapters, Mapping):
                _refuse_extension(top_k, "top_k_adapters", "fixed weights are not routed")
                return self._with_names(self._weighted(adapters))
            return self._with_names(self._routed(adapters, top_k))
        is_base = model == self.base_model_name
        if not is_base and model not in self.adapters:
            served = ", ".join([AUTO_MODEL, self.base_model_name, *self.adapters])
            raise ModelNotFoundError(f"the model {model[:200]!r} does not exist; served are {served}", param="model")
        _refuse_extension(adapters, "adapters", f"it needs model {AUTO_MODEL!r}")
        _refuse_extension(top_k, "top_k_adapters", f"it needs model {AUTO_MODEL!r}")
        if is_base:
            return self._with_names(BASE_PLAN)
        adapter = self.adapters[model]
        return self._with_names(fixed_plan(Policy.PINNED, {adapter.slot: 1.0}, {adapter.slot: adapter.digest}))

    def _routed(self, pool: Sequence[str] | None, top_k: int | None) -> GatePlan:
        router = self.router
        if router is None or not any(adapter.is_routed for adapter in self.adapters.values()):
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
            routed = [adapter for adapter in self.adapters.values() if adapter.is_routed]
            return {**null_expert, **{adapter.slot: adapter.digest for adapter in routed}}
        if not names or len(set(names)) < len(names):
            problem = "names an adapter twice" if names else "is empty"
            raise InvalidRequestError(f"the pool of adapters {problem}", param="adapters", code="invalid_pool")
        chosen = [self._member(name) for name in names if not (null_expert and name == BASE_ALIAS)]
        for adapter in chosen:
            if not adapter.is_routed:
                message = f"adapter {adapter.name!r} is not routed: {adapter.unrouted_reason}"
                raise InvalidRequestError(message, param="adapters", code="adapter_not_routed")
        return {**null_expert, **{adapter.slot: adapter.digest for adapter in chosen}}

    def _weighted(self, weights: Mapping[str, float]) -> GatePlan:
        if not weights:
            raise InvalidRequestError("the mapping of adapters is empty", param="adapters", code="invalid_pool")
        for name, weight in weights.items():
            if not (math.isfinite(weight) and 0 <= weight <= MAX_WEIGHT):
                message = f"the weight of adapter {name[:200]!r} must be between 0 and {MAX_WEIGHT:g}"
                raise InvalidRequestError(message, param="adapters", code="invalid_weight")
        members = {name: self._member(name) for name in weights}
        return fixed_plan(
            Policy.WEIGHTED,
            {members[name].slot: weight for name, weight in weights.items()},
            {adapter.slot: adapter.digest for adapter in members.values()},
        )

    def _member(self, name: str) -> RosterAdapter:
        if (adapter := self.adapters.get(name)) is None:
            message = f"adapter {name[:200]!r} is not served; served are {', '.join(self.adapters) or 'none'}"
            raise InvalidRequestError(message, param="adapters", code="adapter_not_found")
        return adapter

    def _with_names(self, plan: GatePlan) -> Resolution:
        slots = plan.slots
        names = {adapter.slot: name for name, adapter in self.adapters.items() if adapter.slot in slots}
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
    known = {adapter.digest for adapter in artefact.adapters}
    rows = {}
    for adapter in resident:
        hot = adapter.calibration
        is_sound = hot is not None and hot.artefact is artefact and not hot.report.problems
        if hot is not None and is_sound and adapter.wants_routing and adapter.digest not in known:
            rows[adapter.slot] = hot.row
            known.add(adapter.digest)
    return rows


def build_roster(base_model_name: str, ready: Iterable[ResidentAdapter], router: RouterGeneration | None) -> Roster:
    """Roster of the resident adapters; routed is who wants to be, is not excluded, and has a gate row in its slot.

    An excluded one keeps its row, so that nobody with the same weights gets it instead.
    """
    resident = tuple(ready)
    adapters = {
        adapter.name: RosterAdapter(
            adapter.name, adapter.slot, adapter.digest, _unrouted_reason(adapter, resident, router)
        )
        for adapter in resident
    }
    return Roster(base_model_name, MappingProxyType(adapters), router)


def _unrouted_reason(
    adapter: ResidentAdapter, resident: Sequence[ResidentAdapter], router: RouterGeneration | None
) -> str | None:
    if not adapter.wants_routing:
        return "registered with routed: false: served by name only"
    if router is None:
        return "no router is loaded: served by name only"
    if adapter.slot in router.slots:
        return None if adapter.exclusion is None else f"{adapter.exclusion.reason}: served by name only"
    for other in resident:
        if other.digest == adapter.digest and other.slot in router.slots:
            return f"the same weights are routed as {other.name!r}: served by name only"
    for known in router.artefact.adapters:
        if known.digest == adapter.digest:
            return "the same weights are routed under a name that is retiring: served by name only until it is gone"
        if known.name == adapter.name and known.digest != adapter.digest:
            return (
                f"the router artefact's gate row for {adapter.name!r} belongs to other weights "
                f"(digest {known.digest[:12]}, here {adapter.digest[:12]}): served by name only"
            )
    if adapter.calibration_problem is not None:
        return f"{adapter.calibration_problem}: served by name only"
    if adapter.calibration is not None and (problems := adapter.calibration.report.problems):
        return f"{' and '.join(problems)}: served by name only"
    return "no gate row in the router artefact: served by name only"


def _refuse_extension(value: object, param: str, why: str) -> None:
    if value is not None:
        raise InvalidRequestError(f"{param} cannot be used here: {why}", param=param)
