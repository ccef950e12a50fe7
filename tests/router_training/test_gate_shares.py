"""Gate shares by layer and position against gates computed by hand, and that looking changes nothing."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from router_training.artefact import build_artefact
from router_training.encoding import TokenSequence, collate
from router_training.evaluation import gate_batch
from router_training.forward import last_hidden_states
from router_training.gate_shares import LayerRecorder, gate_shares, shares_along
from router_training.gates import RouterParameters
from router_training.roster import Roster
from router_training.settings import TrainingConfig
from server.routing.policy import GatePlan
from server.routing.router import Granularity

Sequences = Callable[..., list[TokenSequence]]


def random_plans(
    roster: Roster, granularity: Granularity = "layer", without_layer: int | None = None
) -> list[GatePlan]:
    router = RouterParameters.zeros(roster.gated_projections(), granularity, 3, hidden_size=roster.routed.hidden_size)
    generator = torch.Generator().manual_seed(0)
    rows = {
        key: torch.randn(row.shape, generator=generator)
        for key, row in router.detached().items()
        if key != f"layer.{without_layer}"
    }
    artefact = build_artefact(rows, roster, TrainingConfig(granularity=granularity))
    return roster.routed_plans(artefact)


def test_layers_hold_the_mean_gates_of_each_task_s_answer_positions(roster: Roster, make_sequences: Sequences) -> None:
    plans, sequences = random_plans(roster), make_sequences(9)
    found = gate_shares(roster, sequences, plans)
    assert found["choices"] == roster.tasks
    for label, task in enumerate(roster.names, start=1):
        own = [sequence for sequence in sequences if sequence.label == label]
        layers: list[list[torch.Tensor]] = [[] for _ in range(roster.routed.num_layers)]
        for sequence in own:  # one by one, so unpadded
            batch = collate([sequence])
            gates = gate_batch(roster.routed, batch, plans, collect_layers=True)
            assert gates is not None
            with torch.inference_mode():
                last_hidden_states(roster.routed, batch, gates)
            for layer, values in zip(layers, gates.layer_gates(1), strict=True):
                layer.append(values[batch.answer_positions])
        expected = torch.stack([torch.cat(layer).mean(dim=0) for layer in layers])
        assert torch.allclose(torch.tensor(found["layers"][task]), expected, atol=1e-3)
        assert expected.std() > 0.05, "gates that differ, or nothing is tested"


def test_a_layer_without_a_gate_is_a_row_of_zeros_and_others_sum_to_one(
    roster: Roster, make_sequences: Sequences
) -> None:
    found = gate_shares(roster, make_sequences(6), random_plans(roster, without_layer=0))
    for rows in found["layers"].values():
        assert [round(sum(row), 2) for row in rows] == [0.0] + [1.0] * (roster.routed.num_layers - 1)


def test_projections_of_a_layer_are_averaged(roster: Roster, make_sequences: Sequences) -> None:
    plans, sequence = random_plans(roster, "projection"), make_sequences(1)[0]
    batch = collate([sequence])
    gates = gate_batch(roster.routed, batch, plans, collect_layers=True)
    assert gates is not None
    recorder = LayerRecorder(gates, roster.routed.num_layers)
    with torch.inference_mode():
        last_hidden_states(roster.routed, batch, recorder)
    per_layer = len(roster.gated_projections()) // roster.routed.num_layers
    assert per_layer == 4
    first = torch.stack(gates.layer_gates(1)[:per_layer]).mean(dim=0)
    assert torch.allclose(recorder.means(gates.share)[0], first, atol=1e-6)


def test_looking_on_changes_nothing(roster: Roster, make_sequences: Sequences) -> None:
    plans, batch = random_plans(roster), collate(make_sequences(4))
    plain, watched = (gate_batch(roster.routed, batch, plans) for _ in range(2))
    assert watched is not None
    with torch.inference_mode():
        expected = last_hidden_states(roster.routed, batch, plain)
        found = last_hidden_states(roster.routed, batch, LayerRecorder(watched, roster.routed.num_layers))
    assert torch.equal(found, expected)


def test_the_opening_reaches_as_far_as_the_shortest_chat(roster: Roster, make_sequences: Sequences) -> None:
    plans, sequences = random_plans(roster), make_sequences(6)
    opening = gate_shares(roster, sequences, plans)["opening"]
    for label, task in enumerate(roster.names, start=1):
        own = [sequence for sequence in sequences if sequence.label == label]
        assert len(opening[task]) == min(map(len, own))
        shares = [shares_along(roster, sequence, plans)["share"] for sequence in own]
        mean = sum(share[3][label] for share in shares) / len(shares)
        assert opening[task][3] == pytest.approx(mean, abs=1e-3)


def test_a_composite_chat_is_followed_token_by_token(roster: Roster, make_sequences: Sequences) -> None:
    sequence = replace(make_sequences(1)[0], label_changes=((4, 2),))
    along = shares_along(roster, sequence, random_plans(roster))
    assert along["tasks"] == ["alpha"] * 4 + ["beta"] * (len(sequence) - 4)
    assert sum(along["answer"]) == sequence.num_answer_tokens
    assert [round(sum(row), 2) for row in along["share"]] == [1.0] * len(sequence)
