"""How one request gets its gates: a small immutable plan. Knows slots and digests, no tensors and no names."""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

BASE_SLOT = 0
"""Slot of the base model, the null expert: its delta is zero."""

BASE_ALIAS = "base"
"""Name of the null expert among adapters: in a router's record, a routed pool and traces. No adapter may have it."""

BASE_DIGEST = "base"
"""Stands in for a digest where the base model is meant (fingerprints, a router's null-expert row)."""


class Policy(StrEnum):
    """Where a request's gates come from."""

    ROUTED = "routed"
    PINNED = "pinned"
    WEIGHTED = "weighted"
    BASE = "base"


@dataclass(frozen=True)
class GatePlan:
    """Effective gates of one request; a pure value that outlives registry changes.

    Fixed policies (`pinned`, `weighted`, `base`) fill `weights` (slot -> weight, `base` is empty) and leave the
    routed fields empty. `routed` fills `allowed_slots` (may hold `BASE_SLOT` when the router has a null expert),
    `router_generation` (which router of the `RouterBank`) and `top_k`.
    `fingerprint` identifies the effective gates by content, never by slot or name: two requests with equal
    fingerprints and equal tokens have equal K/V, so it keys the prefix cache.
    """

    policy: Policy
    fingerprint: bytes
    weights: tuple[tuple[int, float], ...] = ()
    allowed_slots: tuple[int, ...] = ()
    router_generation: int | None = None
    top_k: int = 0

    def __hash__(self) -> int:
        """Of bytes, which keep theirs: steps look plans up row by row, and a tuple of a large pool is hashed anew."""
        return hash(self.fingerprint)

    @property
    def slots(self) -> tuple[int, ...]:
        """Every slot this plan can activate."""
        return tuple(slot for slot, _ in self.weights) or self.allowed_slots


BASE_PLAN = GatePlan(policy=Policy.BASE, fingerprint=hashlib.sha256(b"base").digest())
"""The plan of every `base` request."""


def fixed_plan(policy: Policy, weights: Mapping[int, float], digest_of_slot: Mapping[int, str]) -> GatePlan:
    """Plan with fixed weights; zero weights and the base slot drop out, so `{}` equals the base plan.

    A pinned request and a weighted one with the single weight 1.0 share a fingerprint: their K/V are equal.
    """
    kept = tuple(
        sorted((slot, float(weight)) for slot, weight in weights.items() if weight != 0.0 and slot != BASE_SLOT)
    )
    if not kept:
        return GatePlan(policy=policy, fingerprint=BASE_PLAN.fingerprint)
    content = sorted(f"{digest_of_slot[slot]}={weight!r}" for slot, weight in kept)
    return GatePlan(policy=policy, fingerprint=_digest("fixed", content), weights=kept)


def routed_plan(
    allowed: Mapping[int, str], row_digest_of_slot: Mapping[int, str], router_generation: int, settings: str, top_k: int
) -> GatePlan:
    """Plan of a routed request.

    `allowed` maps slot -> adapter digest, `row_digest_of_slot` maps slot -> digest of its gate rows, `settings`
    names every other router setting that changes gates (temperature, gate mode, granularity).
    """
    top_k = min(top_k, len(allowed))
    content = [
        f"{settings} k={top_k}",
        *sorted(f"{digest}:{row_digest_of_slot[slot]}" for slot, digest in allowed.items()),
    ]
    return GatePlan(
        policy=Policy.ROUTED,
        fingerprint=_digest("routed", content),
        allowed_slots=tuple(sorted(allowed)),
        router_generation=router_generation,
        top_k=top_k,
    )


def without(plan: GatePlan, slots: Collection[int], digest_of_slot: Mapping[int, str]) -> GatePlan:
    """A routed plan less some of its slots, at least one of which stays."""
    allowed = tuple(slot for slot in plan.allowed_slots if slot not in slots)
    assert allowed, "somebody has to answer"
    content = [plan.fingerprint.hex(), *sorted(digest_of_slot[slot] for slot in slots)]
    return replace(
        plan, fingerprint=_digest("without", content), allowed_slots=allowed, top_k=min(plan.top_k, len(allowed))
    )


def _digest(kind: str, parts: Iterable[str]) -> bytes:
    return hashlib.sha256("\n".join([kind, *parts]).encode()).digest()
