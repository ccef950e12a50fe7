"""Fingerprints of gate plans: equal exactly when the effective gates are."""

from server.routing.policy import BASE_PLAN, GatePlan, Policy, fixed_plan, routed_plan, without

DIGESTS = {1: "aa", 2: "bb"}


def routed(
    allowed: dict[int, str], rows: dict[int, str], *, generation: int = 1, settings: str = "s", top_k: int = 2
) -> GatePlan:
    return routed_plan(allowed, rows, generation, settings, top_k)


def test_pinned_equals_the_same_adapter_weighted_one() -> None:
    pinned = fixed_plan(Policy.PINNED, {1: 1.0}, DIGESTS)
    assert pinned.fingerprint == fixed_plan(Policy.WEIGHTED, {1: 1, 2: 0.0}, DIGESTS).fingerprint
    assert pinned.weights == ((1, 1.0),)


def test_zero_weights_are_the_base() -> None:
    plan = fixed_plan(Policy.WEIGHTED, {1: 0.0}, DIGESTS)
    assert plan.fingerprint == BASE_PLAN.fingerprint
    assert plan.slots == ()


def test_fixed_fingerprints_follow_digests_and_weights_not_slots() -> None:
    plan = fixed_plan(Policy.WEIGHTED, {1: 0.5, 2: 0.7}, DIGESTS)
    moved = fixed_plan(Policy.WEIGHTED, {4: 0.7, 5: 0.5}, {4: "bb", 5: "aa"})
    assert plan.fingerprint == moved.fingerprint
    assert plan.fingerprint != fixed_plan(Policy.WEIGHTED, {1: 0.5, 2: 0.70001}, DIGESTS).fingerprint


def test_routed_fingerprints_follow_pool_rows_and_settings_not_generation() -> None:
    plan = routed({1: "aa", 2: "bb"}, {1: "r1", 2: "r2"})
    assert plan.fingerprint == routed({3: "bb", 4: "aa"}, {3: "r2", 4: "r1"}, generation=7).fingerprint
    others = [
        routed({1: "aa"}, {1: "r1"}),
        routed({1: "aa", 2: "cc"}, {1: "r1", 2: "r2"}),
        routed({1: "aa", 2: "bb"}, {1: "r1", 2: "changed"}),
        routed({1: "aa", 2: "bb"}, {1: "r1", 2: "r2"}, settings="other"),
        routed({1: "aa", 2: "bb"}, {1: "r1", 2: "r2"}, top_k=1),
    ]
    assert len({plan.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_an_adapter_outside_the_pool_does_not_change_the_fingerprint() -> None:
    small = routed({1: "aa"}, {1: "r1"})
    with_other_rows = routed({1: "aa"}, {1: "r1", 2: "r2", 3: "r3"})
    assert small.fingerprint == with_other_rows.fingerprint


def test_top_k_is_at_most_the_pool() -> None:
    assert routed({1: "aa"}, {1: "r1"}, top_k=5).top_k == 1


def test_a_plan_less_some_slots_is_another_by_digest() -> None:
    plan = routed({0: "base", 1: "aa", 2: "bb"}, {0: "r0", 1: "r1", 2: "r2"}, top_k=2)
    moved = routed({0: "base", 5: "aa", 4: "bb"}, {0: "r0", 5: "r1", 4: "r2"}, top_k=2)
    less = without(plan, [2], {0: "base", 1: "aa", 2: "bb"})
    assert (less.allowed_slots, less.top_k, less.policy) == ((0, 1), 2, Policy.ROUTED)
    assert less.fingerprint == without(moved, [4], {0: "base", 5: "aa", 4: "bb"}).fingerprint
    alone = without(plan, [1, 2], {0: "base", 1: "aa", 2: "bb"})
    assert (alone.allowed_slots, alone.top_k) == ((0,), 1)
    assert len({plan.fingerprint, less.fingerprint, alone.fingerprint}) == 3
