"""The bank's snapshots: what is added, what is left alone, what is refused."""

import pytest
import torch

from server.routing.bank import RANK_BUCKET, LoraBank, LoraWeights


def make_bank() -> LoraBank:
    return LoraBank(num_slots=6, dtype=torch.float32, device=torch.device("cpu"))


def weights(seed: int, rank: int, names: tuple[str, ...] = ("q", "v")) -> dict[str, LoraWeights]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LoraWeights(torch.randn(rank, 8, generator=generator), torch.randn(12, rank, generator=generator))
        for name in names
    }


def rows_of(bank: LoraBank, name: str, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    projection = bank.snapshot.projections[name]
    rows = projection.owner == slot
    return projection.a[rows], projection.b[:, rows]


def test_adapters_of_different_ranks_and_targets_stand_side_by_side() -> None:
    bank = make_bank()
    first, second = weights(1, 4), weights(2, 9, names=("v",))
    bank.publish(bank.with_adapter(1, first))
    bank.publish(bank.with_adapter(2, second))
    assert set(bank.snapshot.projections) == {"q", "v"}
    for slot, given, name in ((1, first, "q"), (1, first, "v"), (2, second, "v")):
        a, b = rows_of(bank, name, slot)
        assert torch.equal(a, given[name].A)
        assert torch.equal(b, given[name].B)


def test_rank_rows_are_padded_to_buckets_with_zeros_of_the_base_slot() -> None:
    bank = make_bank()
    bank.publish(bank.with_adapter(3, weights(1, 5)))
    projection = bank.snapshot.projections["q"]
    assert projection.a.shape == (RANK_BUCKET, 8)
    assert projection.b.shape == (12, RANK_BUCKET)
    padding = projection.owner == 0
    assert padding.sum() == RANK_BUCKET - 5
    assert not projection.a[padding].any()
    assert not projection.b[:, padding].any()
    assert projection.num_rows == 5


def test_staging_changes_nothing_until_published() -> None:
    bank = make_bank()
    before = bank.snapshot
    staged = bank.with_adapter(1, weights(1, 4))
    assert bank.snapshot is before
    assert not before.projections
    bank.publish(staged)
    assert bank.snapshot.slots == {1}


def test_removing_an_adapter_leaves_the_others_bit_identical() -> None:
    bank = make_bank()
    kept = {1: weights(1, 4), 3: weights(3, 16)}
    for slot in (1, 2, 3):
        bank.publish(bank.with_adapter(slot, kept.get(slot, weights(2, 7))))
    old = bank.snapshot
    bank.publish(bank.without_slots([2]))
    assert bank.snapshot.slots == {1, 3}
    for slot, given in kept.items():
        for name in ("q", "v"):
            a, b = rows_of(bank, name, slot)
            assert torch.equal(a, given[name].A)
            assert torch.equal(b, given[name].B)
    assert old.slots == {1, 2, 3}, "snapshots are immutable"


def test_a_projection_without_adapters_disappears() -> None:
    bank = make_bank()
    bank.publish(bank.with_adapter(1, weights(1, 4)))
    bank.publish(bank.with_adapter(2, weights(2, 4, names=("v",))))
    bank.publish(bank.without_slots([1]))
    assert set(bank.snapshot.projections) == {"v"}
    assert bank.snapshot.num_bytes == (RANK_BUCKET * 8 + 12 * RANK_BUCKET) * 4


@pytest.mark.parametrize("slot", [0, -1, 6])
def test_slots_outside_the_bank_are_refused(slot: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        make_bank().with_adapter(slot, weights(1, 4))


def test_a_taken_slot_is_refused() -> None:
    bank = make_bank()
    bank.publish(bank.with_adapter(1, weights(1, 4)))
    with pytest.raises(ValueError, match="in use"):
        bank.with_adapter(1, weights(2, 4))
