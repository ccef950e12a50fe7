"""Trainable gates on the server's layers: which gates exist, and that they are serving's own."""

from collections.abc import Callable

import pytest
import torch

from router_training.artefact import build_artefact
from router_training.encoding import TokenSequence, collate
from router_training.evaluation import gate_batch
from router_training.forward import answer_losses
from router_training.gates import RouterParameters, TrainingBatch
from router_training.roster import Roster
from router_training.settings import TrainingConfig
from server.routing.router import Granularity

GRANULARITIES: tuple[Granularity, ...] = ("layer", "projection")
Sequences = Callable[..., list[TokenSequence]]


def random_router(roster: Roster, granularity: Granularity) -> RouterParameters:
    router = RouterParameters.zeros(
        roster.gated_projections(), granularity, len(roster.adapters), hidden_size=roster.routed.hidden_size
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for row in router.parameters:
            row.normal_(std=0.5, generator=generator)
    return router


def test_layer_granularity_has_one_gate_per_layer_and_projection_one_per_targeted_projection(roster: Roster) -> None:
    projections = roster.gated_projections()
    by_layer = RouterParameters.zeros(projections, "layer", 3, hidden_size=roster.routed.hidden_size)
    by_projection = RouterParameters.zeros(projections, "projection", 3, hidden_size=roster.routed.hidden_size)
    assert sorted(by_layer.rows) == ["layer.0", "layer.1", "layer.2"]
    assert by_layer.num_parameters == 3 * 3 * 64
    leaves = {key.rpartition(".")[2] for key in by_projection.rows}
    assert leaves == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert by_projection.num_parameters == 4 * 3 * 3 * 64


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_straight_through_forward_is_the_servers_own_routed_forward(
    roster: Roster, make_sequences: Sequences, granularity: Granularity
) -> None:
    config = TrainingConfig(granularity=granularity, top_k=2, temperature=0.7)
    router = random_router(roster, granularity)
    batch = collate(make_sequences(6))
    snapshot = roster.routed.bank.snapshot
    training = TrainingBatch(snapshot, router, "straight_through", top_k=2, temperature=0.7)
    plans = roster.routed_plans(build_artefact(router.detached(), roster, config))
    with torch.no_grad():
        found = answer_losses(roster.routed, batch, training)
        expected = answer_losses(roster.routed, batch, gate_batch(roster.routed, batch, plans))
    # Straight-through adds and subtracts the dense gates, which costs a few units in the last place.
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_dense_gates_with_zero_rows_are_the_uniform_mixture(roster: Roster, make_sequences: Sequences) -> None:
    router = RouterParameters.zeros(roster.gated_projections(), "layer", 3, hidden_size=roster.routed.hidden_size)
    batch = collate(make_sequences(6))
    snapshot = roster.routed.bank.snapshot
    with torch.no_grad():
        dense = TrainingBatch(snapshot, router, "dense", top_k=2, temperature=1.0)
        found = answer_losses(roster.routed, batch, dense)
        uniform = gate_batch(roster.routed, batch, roster.uniform_plans())
        expected = answer_losses(roster.routed, batch, uniform)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_batch_keeps_the_logits_of_every_gate_in_order(roster: Roster, make_sequences: Sequences) -> None:
    router = random_router(roster, "layer")
    batch = collate(make_sequences(3))
    training = TrainingBatch(roster.routed.bank.snapshot, router, "dense", top_k=2, temperature=1.0)
    answer_losses(roster.routed, batch, training)
    assert list(training.logits) == ["layer.0", "layer.1", "layer.2"]
    stacked = training.stacked_logits(batch.answer_positions)
    assert stacked.shape == (3, int(batch.answer_positions.sum()), 3)
    assert stacked.requires_grad


def test_detached_rows_share_memory_with_the_parameters(roster: Roster) -> None:
    router = RouterParameters.zeros(roster.gated_projections(), "layer", 3, hidden_size=roster.routed.hidden_size)
    rows = router.detached()
    with torch.no_grad():
        router.rows["layer.1"].fill_(2.0)
    assert rows["layer.1"].data_ptr() == router.rows["layer.1"].data_ptr()
    assert bool((rows["layer.1"] == 2.0).all())
