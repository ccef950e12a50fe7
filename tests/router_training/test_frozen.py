"""Digests of what training must not touch."""

from collections.abc import Callable

import pytest
import torch

from router_training.frozen import FrozenWeightsError, check_frozen, frozen_digests
from router_training.roster import Roster


def test_digests_are_equal_for_equal_weights_and_name_every_adapter(make_roster: Callable[[], Roster]) -> None:
    digests = frozen_digests(make_roster())
    assert list(digests) == ["base", "alpha", "beta", "gamma"]
    assert len(set(digests.values())) == 4
    assert digests == frozen_digests(make_roster())


def test_a_changed_base_weight_is_noticed(roster: Roster) -> None:
    before = frozen_digests(roster)
    check_frozen(roster, before)
    with torch.no_grad():
        next(roster.routed.model.parameters()).view(-1)[3] += 1e-3
    with pytest.raises(FrozenWeightsError, match="frozen: base;"):
        check_frozen(roster, before)


def test_a_changed_adapter_is_named(roster: Roster) -> None:
    before = frozen_digests(roster)
    bank = next(iter(roster.routed.bank.snapshot.projections.values()))
    slot = bank.slots[0][0]
    bank.b[:, 0] += 1.0
    with pytest.raises(FrozenWeightsError, match=f"frozen: {roster.tasks[slot]};"):
        check_frozen(roster, before)
