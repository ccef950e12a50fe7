"""Static mixtures against finite differences and analytic minima, on the tiny roster."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from router_training.encoding import TokenSequence, collate
from router_training.evaluation import evaluate_policy, gate_batch
from router_training.forward import answer_losses, mean_chat_loss
from router_training.frozen import check_frozen, frozen_digests
from router_training.roster import Roster
from router_training.scores import LayerWeightsBatch
from router_training.static_weights import HubSettings, SoupSettings, learn_layer_weights, minimise, search_weights
from server.routing.policy import Policy, fixed_plan

Sequences = Callable[..., list[TokenSequence]]


def loss_of(roster: Roster, sequences: list[TokenSequence], weights: Tensor) -> float:
    """Chat by chat, unpadded."""
    with torch.inference_mode():
        routing = LayerWeightsBatch(roster.routed.bank.snapshot, weights)
        losses = [answer_losses(roster.routed, collate([s]), routing).double().mean() for s in sequences]
    return float(torch.stack(losses).mean())


def test_the_mean_over_chats_weighs_short_and_long_answers_alike(roster: Roster, make_sequences: Sequences) -> None:
    sequences = make_sequences(6)
    assert len({sequence.num_answer_tokens for sequence in sequences}) > 1
    weights = torch.full((3, 3), 0.4)
    with torch.inference_mode():
        found = mean_chat_loss(roster.routed, sequences, LayerWeightsBatch(roster.routed.bank.snapshot, weights))
    assert float(found) == pytest.approx(loss_of(roster, sequences, weights), abs=1e-5)


def test_the_first_step_of_the_soup_goes_down_the_slope_that_differences_show(
    roster: Roster, make_sequences: Sequences
) -> None:
    """Adam's first step is the learning rate times the sign of the gradient."""
    sequences = make_sequences(4)
    settings = SoupSettings(steps=1, learning_rate=0.01, batch_size=4)
    moved = learn_layer_weights(roster, sequences, settings) - 1 / 3
    checked = 0
    for layer in range(3):
        for adapter in range(3):
            step = torch.zeros(3, 3)
            step[layer, adapter] = 0.01
            slope = loss_of(roster, sequences, 1 / 3 + step) - loss_of(roster, sequences, 1 / 3 - step)
            if abs(slope) > 1e-3:  # well above float32 noise
                assert float(moved[layer, adapter]) == pytest.approx(-0.01 if slope > 0 else 0.01, rel=1e-3)
                checked += 1
    assert checked >= 8


def test_the_soup_beats_the_uniform_mixture_it_starts_from_and_leaves_the_rest_alone(
    roster: Roster, make_sequences: Sequences
) -> None:
    sequences, seen = make_sequences(9), list[float]()
    before = frozen_digests(roster)
    settings = SoupSettings(steps=30, batch_size=9)
    weights = learn_layer_weights(roster, sequences, settings, on_step=seen.append)
    check_frozen(roster, before)
    assert weights.shape == (3, 3)
    assert seen[0] == pytest.approx(loss_of(roster, sequences, torch.full((3, 3), 1 / 3)), abs=1e-5)
    assert len(seen) == 30
    assert loss_of(roster, sequences, weights) < seen[0] - 0.05
    assert torch.equal(weights, learn_layer_weights(roster, sequences, settings))


def test_equal_static_weights_are_the_servers_weighted_policy(roster: Roster, make_sequences: Sequences) -> None:
    sequences = make_sequences(3)
    plan = fixed_plan(Policy.WEIGHTED, {1: 0.3, 2: 1.2, 3: 0.1}, roster.digest_of_slot)
    batch = collate(sequences)
    with torch.inference_mode():
        expected = answer_losses(roster.routed, batch, gate_batch(roster.routed, batch, [plan] * 4))
        rows = torch.tensor([[0.3, 1.2, 0.1]] * 3)
        found = answer_losses(roster.routed, batch, LayerWeightsBatch(roster.routed.bank.snapshot, rows))
    torch.testing.assert_close(found, expected)


def test_the_search_comes_near_a_known_minimum_and_counts_its_evaluations() -> None:
    target, seen = [0.4, -0.3, 0.8], list[Sequence[float]]()

    def bowl(weights: Sequence[float]) -> float:
        seen.append(list(weights))
        return sum((weight - wanted) ** 2 for weight, wanted in zip(weights, target, strict=True))

    found = minimise(bowl, 3, HubSettings(evaluations=200))
    assert len(seen) == 200
    assert seen[0] == [0, 0, 0]
    assert bowl(found) == min(map(bowl, seen[:200]))
    assert found == pytest.approx(target, abs=0.02)
    assert minimise(bowl, 3, HubSettings(evaluations=20)) == minimise(bowl, 3, HubSettings(evaluations=20))
    other = minimise(bowl, 3, HubSettings(evaluations=20, seed=1))
    assert other != minimise(bowl, 3, HubSettings(evaluations=20))


def test_the_search_stays_within_its_bounds() -> None:
    seen: list[float] = []

    def slope(weights: Sequence[float]) -> float:
        seen.extend(weights)
        return weights[0] - weights[1]

    found = minimise(slope, 2, HubSettings(evaluations=60))
    assert found == [-1.5, 1.5]
    assert max(map(abs, seen)) == 1.5


def test_the_searched_objective_is_loss_and_penalty_and_is_lowered(roster: Roster, make_sequences: Sequences) -> None:
    sequences, seen = make_sequences(9), list[float]()
    settings = HubSettings(evaluations=25, penalty=0.5)
    found = search_weights(roster, sequences, settings, on_evaluation=seen.append)
    base = evaluate_policy(roster.routed, sequences, roster.tasks, roster.base_plans())
    assert seen[0] == pytest.approx(loss_of(roster, sequences, torch.zeros(3, 3)), abs=1e-5)
    assert base  # zero weights are the base model
    expected = loss_of(roster, sequences, torch.tensor([found] * 3)) + 0.5 * sum(map(abs, found)) / 3
    assert min(seen) == pytest.approx(expected, abs=1e-5)
    assert min(seen) < seen[0]
    assert len(seen) == 25
