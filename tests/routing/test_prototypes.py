"""Closed-form gate rows against independent numpy computations, and the canary's verdicts."""

import numpy as np
import pytest
import torch
from torch import Tensor

from server.routing import prototypes
from server.routing.background import Background, GateBackground, soft_maximum, summarise_gate
from server.routing.bank import LoraWeights
from server.routing.prototypes import (
    GateColumn,
    HotRow,
    column_from_examples,
    column_from_weights,
    judge,
    norm_factor,
    win_rate,
)

D, A, N = 12, 3, 400
NAMES = ("a", "b", "c")


def clusters(*, seed: int = 0, shift: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Background inputs (N, D) of A classes with labels, and rows (A, D) that tell them apart."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.zeros(A, D)
    centres[torch.arange(A), torch.arange(A)] = shift
    labels = torch.arange(N) % A
    inputs = centres[labels] + torch.randn(N, D, generator=generator)
    return inputs, labels, 2 * torch.eye(A, D)


def newcomers(count: int = 60, *, seed: int = 1) -> Tensor:
    """Inputs of a class of its own."""
    inputs = torch.randn(count, D, generator=torch.Generator().manual_seed(seed))
    inputs[:, A] += 4.0
    return inputs


def whole_background() -> tuple[GateBackground, Background, Tensor]:
    inputs, labels, rows = clusters()
    gate = summarise_gate(inputs, torch.arange(0, N, 5), rows, 1.0)
    return gate, Background({"layer.0": gate}, labels[::5]), rows


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_row_from_examples_is_the_ridge_solution_that_numpy_finds(temperature: float) -> None:
    """The same least squares over the raw tokens, written as one stacked system; D directions lose nothing to rank."""
    inputs, _, rows = clusters()
    own = newcomers()
    gate = summarise_gate(inputs, torch.arange(10), rows, temperature)
    column = column_from_examples(own, rows, gate, temperature=temperature)
    x = np.concatenate([inputs.numpy(), own.numpy()]).astype(np.float64)
    logits = x @ rows.numpy().T.astype(np.float64) / temperature
    target = temperature * np.log(np.exp(logits).sum(axis=1))
    target[:N] -= prototypes.BACKGROUND_MARGIN * temperature
    target[N:] += prototypes.OWN_MARGIN * temperature
    weight = np.concatenate(
        [np.full(N, (1 - prototypes.OWN_WEIGHT) / N), np.full(len(own), prototypes.OWN_WEIGHT / len(own))]
    )
    penalty = prototypes.PENALTY * inputs.numpy().astype(np.float64).var(axis=0).mean()
    system = np.concatenate([x, np.ones((len(x), 1))], axis=1) * np.sqrt(weight)[:, None]
    ridge = np.concatenate([np.sqrt(penalty) * np.eye(D), np.zeros((D, 1))], axis=1)  # the bias is free
    stacked = np.concatenate([system, ridge])
    solution, *_ = np.linalg.lstsq(stacked, np.concatenate([target * np.sqrt(weight), np.zeros(D)]), rcond=None)
    np.testing.assert_allclose(column.row.numpy(), solution[:D], atol=1e-4)  # float32 against float64
    assert column.bias == pytest.approx(solution[D], abs=1e-3)


def test_a_row_from_examples_wins_new_tokens_of_its_kind_and_leaves_the_others() -> None:
    gate, background, rows = whole_background()
    row = HotRow({"layer.0": column_from_examples(newcomers(), rows, gate)})
    assert win_rate(row, {"layer.0": newcomers(seed=2)}, {"layer.0": rows}) > 0.85
    report = judge(row, {"layer.0": rows}, background, NAMES, top_k=1, own_win_rate=0.9)
    assert report.problems == ()
    assert report.expected_background_share < 0.1


def test_the_norm_factor_gives_the_norm_of_every_update_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    loras = [
        LoraWeights(torch.randn(r, D, generator=generator), torch.randn(width, r, generator=generator))
        for r, width in ((4, 20), (7, 5))
    ]
    x = torch.randn(50, D, generator=generator)
    updates = [x.double() @ lora.A.double().T @ lora.B.double().T for lora in loras]
    expected = torch.cat(updates, dim=1).square().sum(dim=1).sqrt()
    found = torch.linalg.vector_norm(x @ norm_factor(loras).T, dim=1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_norm_factor_begins_with_the_top_singular_direction() -> None:
    generator = torch.Generator().manual_seed(3)
    lora = LoraWeights(torch.randn(5, D, generator=generator), torch.randn(9, 5, generator=generator))
    _, values, directions = np.linalg.svd((lora.B @ lora.A).numpy())
    first = norm_factor([lora])[0].numpy()
    assert np.linalg.norm(first) == pytest.approx(values[0], rel=1e-5)
    assert abs(first @ directions[0]) == pytest.approx(values[0], rel=1e-5)


def test_a_row_from_weights_prefers_what_the_adapter_acts_on_and_wins_little_of_the_background() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, _, rows = clusters()
    inputs[:, A] = inputs[:, A].abs()  # tokens differ in how much of the newcomer's direction they have
    gate = summarise_gate(inputs, torch.arange(N), rows, 1.0)
    a = torch.zeros(2, D)
    a[0, A] = 1.0
    column = column_from_weights([LoraWeights(a, torch.randn(8, 2, generator=generator))], rows, gate)
    assert int(column.row.argmax()) == A
    wins = column.logits(inputs) > soft_maximum(inputs @ rows.T, 1.0)
    assert float(wins.float().mean()) <= 1 / (A + 1) + 1 / N


def test_the_canary_refuses_a_row_that_takes_tokens_from_others() -> None:
    _, background, rows = whole_background()
    greedy = HotRow({"layer.0": GateColumn(torch.zeros(D), 100.0)})
    report = judge(greedy, {"layer.0": rows}, background, NAMES, top_k=1, own_win_rate=1.0)
    assert report.old_hit_rate_before > 0.9
    assert report.old_hit_rate_after == 0.0
    assert report.expected_background_share == 1.0
    assert f"{100 * report.hit_rate_drop:.1f} points" in report.problems[0]


def test_the_canary_names_the_domain_that_a_second_choice_eats_into() -> None:
    """With two chosen, a row level with b's comes in second on b's tokens: every hit stays, half of b's weight goes."""
    _, background, rows = whole_background()
    jealous = HotRow({"layer.0": GateColumn(rows[1] * 1.0, -0.5)})
    report = judge(jealous, {"layer.0": rows}, background, NAMES, top_k=2, own_win_rate=1.0)
    states = background.gates["layer.0"].states[background.domains == 1]
    logits = np.concatenate([(states @ rows.T).numpy(), (states @ rows[1] - 0.5).numpy()[:, None]], axis=1)
    weights = np.exp(logits)
    weights[weights < np.sort(weights, axis=1)[:, -2:-1]] = 0
    expected = (weights[:, -1] / weights.sum(axis=1)).mean()
    assert report.most_captured == "b"
    assert report.most_captured_share == pytest.approx(expected, rel=1e-5)
    assert report.hit_rate_drop <= prototypes.MAX_HIT_RATE_DROP
    assert report.problems == (
        f"it would take {100 * expected:.1f} % of the gate weight on the tokens of 'b', more than 10 % allowed",
    )


def test_the_canary_refuses_a_row_that_loses_its_own_examples() -> None:
    _, background, rows = whole_background()
    timid = HotRow({"layer.0": GateColumn(torch.zeros(D), -100.0)})
    own = win_rate(timid, {"layer.0": newcomers()}, {"layer.0": rows})
    report = judge(timid, {"layer.0": rows}, background, NAMES, top_k=2, own_win_rate=own)
    assert report.hit_rate_drop == 0.0
    assert report.problems == ("its gate row wins 0 % of its own examples' tokens, below 50 %",)


def test_the_digest_of_a_row_is_of_its_content() -> None:
    row = HotRow({"layer.0": GateColumn(torch.ones(D), 1.0)})
    assert row.digest == HotRow({"layer.0": GateColumn(torch.ones(D), 1.0)}).digest
    assert row.digest != HotRow({"layer.0": GateColumn(torch.ones(D), 1.5)}).digest
    assert row.digest != HotRow({"layer.0": GateColumn(2 * torch.ones(D), 1.0)}).digest
    prompted = [HotRow(row.columns, prompt_column=torch.full((5,), value).half()).digest for value in (0, 1, 1)]
    assert len({row.digest, *prompted}) == 3
    assert prompted[1] == prompted[2]
