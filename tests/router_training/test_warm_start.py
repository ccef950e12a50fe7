"""Cached router inputs and the rows fitted to them."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from router_training.encoding import TokenSequence
from router_training.gates import RouterParameters
from router_training.roster import FIRST_SLOT, Roster
from router_training.router_inputs import cache_inputs, concatenate
from router_training.settings import TrainingConfig
from router_training.warm_start import fit_ridge, fit_softmax, warm_start
from server.routing.bank import BankSnapshot, LoraWeights
from server.routing.router import Granularity

Sequences = Callable[..., list[TokenSequence]]


def separable(num_tokens: int = 90, width: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (N, d) of three classes that a linear map separates, their labels and unit weights."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_tokens) % 3
    centres = 2.0 * torch.randn(3, width, generator=generator)
    return (
        centres[labels] + torch.randn(num_tokens, width, generator=generator),
        labels,
        torch.ones(num_tokens),
    )


def test_ridge_solves_its_normal_equations_up_to_a_gain() -> None:
    inputs, labels, weights = separable()
    rows = fit_ridge(inputs, labels, weights, 3, penalty=1e-2).double()
    x = inputs.double()
    targets = torch.nn.functional.one_hot(labels, 3).double() - 1 / 3
    gram = x.T @ x
    rho = 1e-2 * gram.diagonal().mean()
    expected = torch.linalg.solve(gram + rho * torch.eye(12, dtype=torch.float64), x.T @ targets).T
    gain = (rows / expected).median()
    assert float(gain) in {2.0**power for power in range(-1, 9)} or abs(float(gain.log2()) % 1) < 1e-4
    torch.testing.assert_close(rows, gain * expected, atol=1e-3, rtol=1e-3)


def test_softmax_regression_lowers_cross_entropy_below_ridge_and_is_stationary() -> None:
    inputs, labels, weights = separable()
    penalty = 1e-2
    ridge = fit_ridge(inputs, labels, weights, 3, penalty)
    fitted = fit_softmax(inputs, labels, weights, ridge, penalty, iterations=100)

    def objective(rows: Tensor) -> Tensor:
        regulariser = 0.5 * penalty * inputs.square().mean() * rows.square().sum()
        return torch.nn.functional.cross_entropy(inputs @ rows.T, labels) + regulariser

    leaf = fitted.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(leaf), leaf)
    assert gradient.abs().max() < 1e-3
    assert objective(fitted) < objective(ridge)


def test_a_token_of_weight_two_counts_like_two_tokens() -> None:
    inputs, labels, weights = separable(30)
    weights[:10] = 2.0
    doubled = torch.cat([inputs, inputs[:10]]), torch.cat([labels, labels[:10]])
    weighted = fit_ridge(inputs, labels, weights, 3, 1e-2)
    repeated = fit_ridge(*doubled, torch.ones(40), 3, 1e-2)
    torch.testing.assert_close(weighted, repeated, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("granularity", ["layer", "projection"])
def test_cached_inputs_are_what_the_projections_receive(
    roster: Roster, make_sequences: Sequences, granularity: Granularity
) -> None:
    seen: dict[str, list[Tensor]] = {}
    for name in roster.routed.projections:
        module = roster.routed.model.get_submodule(name)
        module.register_forward_pre_hook(
            lambda _, arguments, name=name: seen.setdefault(name, []).append(arguments[0].flatten(0, 1))
        )
    sequences = make_sequences(1)
    cached = cache_inputs(
        roster.routed,
        sequences,
        roster.own_adapter_plans(),
        granularity,
        max_prompt_tokens=100,
        max_answer_tokens=100,
    )
    source = "model.layers.1.self_attn.q_proj"
    key = "layer.1" if granularity == "layer" else source
    # All positions but the last, which predicts nothing.
    assert torch.equal(cached.inputs[key], seen[source][0][: len(sequences[0]) - 1])
    assert cached.is_answer.tolist().count(True) == sequences[0].num_answer_tokens
    assert set(cached.labels.tolist()) == {sequences[0].label}


@pytest.mark.parametrize("target", ["gate_proj", "down_proj"])
def test_a_layers_gate_reads_the_attention_input_whatever_the_adapters_target(
    roster: Roster, make_sequences: Sequences, target: str
) -> None:
    """As the server's does. Adapters on the MLP alone, in layer 1 alone, and inputs of another width, `down_proj`'s."""
    bank = roster.routed.bank
    bank.publish(BankSnapshot())
    generator = torch.Generator().manual_seed(0)
    name = f"model.layers.1.mlp.{target}"
    info = roster.routed.projections[name]
    for slot in range(FIRST_SLOT, FIRST_SLOT + len(roster.adapters)):
        pair = torch.randn(2, info.d_in, generator=generator), torch.randn(info.d_out, 2, generator=generator)
        bank.publish(bank.with_adapter(slot, {name: LoraWeights(*pair)}))
    seen: list[Tensor] = []
    roster.routed.model.get_submodule("model.layers.1.self_attn.q_proj").register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0].flatten(0, 1))
    )
    sequences = make_sequences(1)
    plans = roster.own_adapter_plans()
    cached = cache_inputs(roster.routed, sequences, plans, "layer", max_prompt_tokens=100, max_answer_tokens=100)
    assert set(cached.inputs) == {"layer.1"}, "no gate where no adapter acts"
    assert torch.equal(cached.inputs["layer.1"], seen[0][: len(sequences[0]) - 1])
    projections = [info]
    zeros = RouterParameters.zeros(projections, "layer", 3, hidden_size=roster.routed.hidden_size)
    assert {key: tuple(rows.shape) for key, rows in zeros.detached().items()} == {
        "layer.1": (3, roster.routed.hidden_size)
    }
    by_projection = RouterParameters.zeros(projections, "projection", 3, hidden_size=roster.routed.hidden_size)
    assert by_projection.detached()[name].shape == (3, info.d_in)


def test_caching_takes_the_last_prompt_token_and_few_others(roster: Roster, make_sequences: Sequences) -> None:
    sequences = make_sequences(6)
    cached = cache_inputs(
        roster.routed,
        sequences,
        roster.base_plans(),
        "layer",
        max_prompt_tokens=2,
        max_answer_tokens=1,
    )
    assert len(cached.labels) == 6 * 3
    assert int(cached.is_answer.sum()) == 6
    twice = concatenate([cached, cached])
    assert len(twice.labels) == 2 * len(cached.labels)
    assert twice.inputs["layer.0"].shape == (36, 64)


@pytest.mark.parametrize("granularity", ["layer", "projection"])
@pytest.mark.parametrize("method", ["ridge", "softmax"])
def test_warm_start_tells_tasks_apart(
    roster: Roster, make_sequences: Sequences, granularity: Granularity, method: str
) -> None:
    config = TrainingConfig.model_validate({"granularity": granularity, "warm_start": method})
    rounds: list[int] = []
    router = warm_start(roster, make_sequences(60), config, on_round=lambda number, _: rounds.append(number))
    held_out = cache_inputs(
        roster.routed,
        make_sequences(30, seed=1),
        roster.base_plans(),
        granularity,
        max_prompt_tokens=0,
        max_answer_tokens=8,
    )
    hits = {
        key: float(((held_out.inputs[key] @ rows.T).argmax(dim=1) + FIRST_SLOT == held_out.labels).float().mean())
        for key, rows in router.detached().items()
    }
    assert rounds == [0, 1]
    assert sum(hits.values()) / len(hits) > 0.6  # chance is a third


@pytest.mark.parametrize("method", ["none", "softmax"])
def test_layers_below_the_first_routed_one_get_no_gate(roster: Roster, make_sequences: Sequences, method: str) -> None:
    config = TrainingConfig.model_validate({"warm_start": method, "routed_from_layer": 1, "warm_start_rounds": 1})
    assert sorted(warm_start(roster, make_sequences(6), config).rows) == ["layer.1", "layer.2"]


def test_a_null_expert_learns_its_own_chats(roster: Roster, make_sequences: Sequences) -> None:
    sequences = [replace(sequence, label=0) if sequence.label == 3 else sequence for sequence in make_sequences(60)]
    config = TrainingConfig(null_expert=True, warm_start_rounds=1)
    router = warm_start(roster, sequences, config)
    assert router.first_slot == 0
    held_out = cache_inputs(
        roster.routed, sequences[:30], roster.base_plans(), "layer", max_prompt_tokens=0, max_answer_tokens=8
    )
    chosen = (held_out.inputs["layer.1"] @ router.detached()["layer.1"].T).argmax(dim=1)
    assert float((chosen == held_out.labels).float().mean()) > 0.6
    assert float((chosen == 3).float().mean()) < 0.05  # nobody's chats


def test_no_warm_start_gives_zero_rows(roster: Roster, make_sequences: Sequences) -> None:
    router = warm_start(roster, make_sequences(3), TrainingConfig(warm_start="none"))
    assert all(not row.any() for row in router.detached().values())
