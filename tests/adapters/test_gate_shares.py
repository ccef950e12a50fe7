"""Shares of what is routed, against caps."""

from server.adapters.gate_shares import GateShares


def fed(*masses: tuple[int, float], window: int = 100) -> GateShares:
    shares = GateShares(window)
    for slot, mass in masses:
        shares.add(slot, mass)
    return shares


def test_nothing_is_due_before_the_window_is_full() -> None:
    shares = fed((1, 60.0), (0, 39.0))
    assert not shares.is_due
    shares.add(2, 1.0)
    assert shares.is_due
    shares.judge({})
    assert not shares.is_due


def test_the_base_models_share_counts_in_the_sum() -> None:
    assert fed((1, 60.0), (0, 40.0)).judge({1: 0.6}) is None
    assert fed((1, 60.0), (0, 40.0)).judge({1: 0.59}) == (1, 0.6)
    assert fed((1, 60.0)).judge({1: 0.59}) == (1, 1.0)
    assert fed((1, 60.0)).judge({1: 1.0, 2: 0.5}) is None


def test_of_several_the_one_furthest_over_its_cap_goes() -> None:
    shares = ((1, 50.0), (2, 30.0), (3, 20.0))
    assert fed(*shares).judge({1: 0.4, 2: 0.1, 3: 0.1}) == (2, 0.3)
    assert fed(*shares).judge({1: 0.4}) == (1, 0.5)


def test_what_was_judged_counts_half() -> None:
    shares = fed((1, 100.0))
    assert shares.judge({1: 1.0}) is None
    shares.add(2, 100.0)
    assert shares.judge({1: 0.33}) == (1, 50 / 150)
    shares.add(2, 100.0)
    assert shares.judge({1: 0.33}) is None


def test_what_is_forgotten_counts_for_nobody() -> None:
    shares = fed((1, 90.0), (2, 5.0), (3, 5.0))
    shares.forget(1)
    assert shares.judge({1: 0.1}) is None
    assert fed((1, 90.0), (2, 5.0)).judge({2: 0.4}) is None
    shares = fed((1, 90.0), (2, 5.0))
    shares.forget(1)
    shares.add(2, 94.0)
    assert not shares.is_due, "a few tokens are no window"
    shares.add(2, 1.0)
    assert shares.is_due
    assert shares.judge({2: 0.4}) == (2, 1.0)
