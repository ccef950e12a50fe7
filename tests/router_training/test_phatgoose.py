"""Gate vectors trained one adapter at a time: start, gradient, isolation."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from router_training.encoding import TokenSequence, collate
from router_training.evaluation import gate_batch
from router_training.forward import answer_losses
from router_training.frozen import check_frozen, frozen_digests
from router_training.phatgoose import GateSettings, SigmoidBatch, stacked, train_vectors
from router_training.roster import Roster
from server.routing.policy import Policy, fixed_plan

Sequences = Callable[..., list[TokenSequence]]
ADAPTER, SLOT = 0, 1


@pytest.fixture
def own(make_sequences: Sequences) -> list[TokenSequence]:
    return [sequence for sequence in make_sequences(24) if sequence.label == SLOT]


def loss_of(roster: Roster, sequences: list[TokenSequence], vectors: Mapping[str, Tensor]) -> float:
    """Chat by chat, unpadded."""
    batch = SigmoidBatch(roster.routed.bank.snapshot, vectors, SLOT, roster.routed.num_slots)
    with torch.inference_mode():
        losses = [answer_losses(roster.routed, collate([s]), batch).double().mean() for s in sequences]
    return float(torch.stack(losses).mean())


def zeros(roster: Roster) -> dict[str, Tensor]:
    return {name: torch.zeros(lora.A.shape[1]) for name, lora in roster.adapters[ADAPTER].weights.items()}


def test_a_vector_of_zeros_is_the_adapter_at_half_weight(roster: Roster, own: list[TokenSequence]) -> None:
    plan = fixed_plan(Policy.WEIGHTED, {SLOT: 0.5}, roster.digest_of_slot)
    batch = collate(own)
    with torch.inference_mode():
        expected = answer_losses(roster.routed, batch, gate_batch(roster.routed, batch, [plan] * 4))
        half = SigmoidBatch(roster.routed.bank.snapshot, zeros(roster), SLOT, roster.routed.num_slots)
        found = answer_losses(roster.routed, batch, half)
    torch.testing.assert_close(found, expected)


def test_the_gate_is_a_sigmoid_of_each_tokens_input(roster: Roster) -> None:
    info = next(info for info in roster.gated_projections() if info.name in roster.adapters[ADAPTER].weights)
    tokens = torch.randn(5, info.d_in, generator=torch.Generator().manual_seed(0))
    vector = torch.randn(info.d_in, generator=torch.Generator().manual_seed(1))
    batch = SigmoidBatch(roster.routed.bank.snapshot, {info.name: vector}, SLOT, roster.routed.num_slots)
    gates = batch.gates(info, tokens)
    assert gates is not None
    torch.testing.assert_close(gates[:, SLOT], 1 / (1 + torch.exp(-(tokens * vector).sum(dim=1))))
    assert not gates[:, [0, 2, 3]].any()
    assert batch.gates(info._replace(name="elsewhere"), tokens) is None


def test_the_first_step_goes_down_the_slope_that_differences_show(roster: Roster, own: list[TokenSequence]) -> None:
    """Adam's first step is the learning rate times the sign of the gradient, checked for coordinates of one vector."""
    moved = train_vectors(roster, ADAPTER, own[:4], GateSettings(steps=1, learning_rate=0.01))
    assert set(moved) == set(roster.adapters[ADAPTER].weights)
    name = next(iter(moved))
    checked = 0
    for coordinate in range(20):
        losses = []
        for distance in (0.05, -0.05):
            vectors = zeros(roster)
            vectors[name][coordinate] = distance
            losses.append(loss_of(roster, own[:4], vectors))
        slope = losses[0] - losses[1]
        if abs(slope) > 1e-4:  # well above float32 noise
            assert float(moved[name][coordinate]) == pytest.approx(-0.01 if slope > 0 else 0.01, rel=1e-3)
            checked += 1
    assert checked >= 10


def test_training_lowers_the_own_loss_and_touches_nothing_else(roster: Roster, own: list[TokenSequence]) -> None:
    before, seen = frozen_digests(roster), list[float]()
    vectors = train_vectors(roster, ADAPTER, own, GateSettings(steps=15, batch_size=8), on_step=seen.append)
    check_frozen(roster, before)
    assert seen[0] == pytest.approx(loss_of(roster, own, zeros(roster)), abs=1e-5)
    assert loss_of(roster, own, vectors) < seen[0] - 0.02
    again = train_vectors(roster, ADAPTER, own, GateSettings(steps=15, batch_size=8))
    assert all(torch.equal(vectors[name], again[name]) for name in vectors)


def test_vectors_of_all_adapters_lie_side_by_side_with_zeros_where_one_has_none(roster: Roster) -> None:
    vectors = [
        {name: torch.full((lora.A.shape[1],), i + 1.0) for name, lora in adapter.weights.items()}
        for i, adapter in enumerate(roster.adapters)
    ]
    rows = stacked(roster, vectors)
    assert set(rows) == {info.name for info in roster.gated_projections()}
    assert rows["model.layers.1.self_attn.k_proj"][:, 0].tolist() == [0, 2, 0]
    assert rows["model.layers.1.self_attn.v_proj"][:, 0].tolist() == [1, 2, 3]
