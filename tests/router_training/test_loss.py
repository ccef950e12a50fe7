"""RSL against its closed forms (autograd and finite differences), its direction, and its bounds."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from router_training import loss

NUM_TOKENS, NUM_ADAPTERS, TOP_K = 64, 6, 2


def make_logits(seed: int = 0, scale: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(NUM_TOKENS, NUM_ADAPTERS, generator=generator, dtype=torch.float64)


def numeric_gradient(function: Callable[[Tensor], Tensor], logits: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences, one logit at a time."""
    gradient = torch.zeros_like(logits)
    for index in range(logits.numel()):
        shift = torch.zeros_like(logits)
        shift.view(-1)[index] = step
        gradient.view(-1)[index] = (function(logits + shift) - function(logits - shift)) / (2 * step)
    return gradient


def autograd_gradient(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf), leaf)
    return gradient


def balance_of(frequency: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: loss.balance_term(torch.softmax(logits, dim=-1), frequency)


def entropy_of(logits: Tensor) -> Tensor:
    return loss.entropy_term(torch.softmax(logits, dim=-1))


def test_balance_value_is_the_sum_of_the_paper_times_the_number_of_adapters() -> None:
    logits = make_logits()
    probabilities = torch.softmax(logits, dim=-1)
    counts = [0.0] * NUM_ADAPTERS
    for row in logits.tolist():
        for adapter in sorted(range(NUM_ADAPTERS), key=row.__getitem__, reverse=True)[:TOP_K]:
            counts[adapter] += 1 / (NUM_TOKENS * TOP_K)
    frequency = loss.top_k_frequency(logits, TOP_K)
    assert frequency.tolist() == pytest.approx(counts, abs=1e-12)
    expected = NUM_ADAPTERS * sum(probabilities[:, i].mean().item() * counts[i] for i in range(NUM_ADAPTERS))
    assert loss.balance_term(probabilities, frequency).item() == pytest.approx(expected, abs=1e-12)


def test_entropy_value_is_the_mean_entropy_over_log_e() -> None:
    probabilities = torch.softmax(make_logits(), dim=-1)
    rows = [-sum(p * math.log(p) for p in row) for row in probabilities.tolist()]
    expected = sum(rows) / NUM_TOKENS / math.log(NUM_ADAPTERS)
    assert loss.entropy_term(probabilities).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("gradient_of", [autograd_gradient, numeric_gradient])
def test_balance_gradient_is_its_closed_form(gradient_of: Callable[..., Tensor]) -> None:
    logits = make_logits()
    frequency = loss.top_k_frequency(logits, TOP_K)
    closed_form = loss.balance_gradient(torch.softmax(logits, dim=-1), frequency)
    torch.testing.assert_close(gradient_of(balance_of(frequency), logits), closed_form, atol=1e-6, rtol=0)


@pytest.mark.parametrize("gradient_of", [autograd_gradient, numeric_gradient])
def test_entropy_gradient_is_its_closed_form(gradient_of: Callable[..., Tensor]) -> None:
    logits = make_logits()
    closed_form = loss.entropy_gradient(torch.softmax(logits, dim=-1))
    torch.testing.assert_close(gradient_of(entropy_of, logits), closed_form, atol=1e-6, rtol=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_whole_loss_has_the_closed_form_gradient_averaged_over_gates(sign: int) -> None:
    gates = torch.stack([make_logits(1), make_logits(2), make_logits(3)]).requires_grad_()
    labels = torch.arange(NUM_TOKENS) % NUM_ADAPTERS
    total = loss.router_losses(gates, labels, TOP_K).total(alpha=0.7, lambda_=0.3, sign=sign, eta=0.0)
    (gradient,) = torch.autograd.grad(total, gates)
    for index, logits in enumerate(gates.detach()):
        probabilities = torch.softmax(logits, dim=-1)
        balance = loss.balance_gradient(probabilities, loss.top_k_frequency(logits, TOP_K))
        expected = (0.7 * balance + sign * 0.3 * loss.entropy_gradient(probabilities)) / len(gates)
        torch.testing.assert_close(gradient[index], expected, atol=1e-6, rtol=0)


def test_entropy_has_a_gradient_where_a_probability_is_too_small_for_a_number() -> None:
    logits = torch.tensor([[0.0, 1.0, -1000.0], [0.0, 1.0, -90.0], [0.0, -1000.0, -1000.0]])
    assert 0 in torch.softmax(logits, dim=-1)
    gradient = autograd_gradient(entropy_of, logits)
    expected = autograd_gradient(entropy_of, logits.double())
    torch.testing.assert_close(gradient, expected.float(), atol=1e-7, rtol=0)


def test_uniform_gates_give_balance_one_and_the_largest_entropy_without_gradient() -> None:
    logits = torch.zeros(NUM_TOKENS, NUM_ADAPTERS, dtype=torch.float64)
    uniform = torch.softmax(logits, dim=-1)
    frequency = torch.full((NUM_ADAPTERS,), 1 / NUM_ADAPTERS, dtype=torch.float64)
    assert loss.balance_term(uniform, frequency).item() == pytest.approx(1.0, abs=1e-12)
    assert loss.entropy_term(uniform).item() == pytest.approx(1.0, abs=1e-12)
    assert loss.token_entropy(uniform)[0].item() == pytest.approx(math.log(NUM_ADAPTERS), abs=1e-12)
    assert loss.entropy_gradient(uniform).abs().max() < 1e-15


def test_one_hot_gates_on_one_adapter_give_balance_e_and_no_entropy() -> None:
    logits = torch.zeros(NUM_TOKENS, NUM_ADAPTERS)
    logits[:, 2] = 1000.0
    losses = loss.router_losses(logits[None], torch.full((NUM_TOKENS,), 2), top_k=1)
    assert losses.balance.item() == NUM_ADAPTERS
    assert losses.entropy.item() == 0.0
    assert losses.adapter_id.item() == 0.0


def test_top_k_frequency_sums_to_one_breaks_ties_low_and_carries_no_gradient() -> None:
    frequency = loss.top_k_frequency(torch.zeros(5, NUM_ADAPTERS, requires_grad=True), TOP_K)
    assert frequency.tolist() == [0.5, 0.5, 0, 0, 0, 0]
    assert not frequency.requires_grad


def test_adapter_id_term_is_cross_entropy() -> None:
    gates = torch.stack([make_logits(1), make_logits(2)])
    labels = torch.arange(NUM_TOKENS) % NUM_ADAPTERS
    expected = torch.nn.functional.cross_entropy(gates.flatten(0, 1) / 0.5, labels.repeat(2))
    found = loss.router_losses(gates, labels, TOP_K, temperature=0.5).adapter_id
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_token_weights_count_a_token_as_often_as_it_was_repeated() -> None:
    logits, labels = make_logits()[:4], torch.tensor([0, 1, 2, 3])
    repeats = torch.tensor([3, 1, 2, 4])
    weighted = loss.router_losses(logits[None], labels, TOP_K, weights=repeats.double() / repeats.sum())
    repeated = loss.router_losses(
        logits.repeat_interleave(repeats, dim=0)[None], labels.repeat_interleave(repeats), TOP_K
    )
    for name in ("balance", "entropy", "adapter_id"):
        torch.testing.assert_close(getattr(weighted, name), getattr(repeated, name), atol=1e-12, rtol=0)


def descend(sign: int, alpha: float = 1.0, lambda_: float = 0.1, seed: int = 0, steps: int = 400) -> Tensor:
    """Probabilities after gradient descent on RSL alone, from the same random logits."""
    logits = make_logits(seed, scale=1.0).requires_grad_()
    optimiser = torch.optim.SGD([logits], lr=40.0)
    for _ in range(steps):
        optimiser.zero_grad()
        losses = loss.router_losses(logits[None], torch.zeros(NUM_TOKENS, dtype=torch.int64), TOP_K)
        torch.autograd.backward(losses.total(alpha=alpha, lambda_=lambda_, sign=sign, eta=0.0))
        optimiser.step()
    return torch.softmax(logits.detach(), dim=-1)


def variance(probabilities: Tensor) -> float:
    return float((probabilities - probabilities.mean(dim=0)).square().sum(dim=1).mean())


def test_plus_one_specialises_and_minus_one_flattens() -> None:
    start = torch.softmax(make_logits(scale=1.0), dim=-1)
    specialised, flattened = descend(sign=1), descend(sign=-1)
    start_entropy = loss.token_entropy(start).mean()
    assert loss.token_entropy(specialised).mean() < 0.3 * start_entropy
    assert variance(specialised) > 2 * variance(start)
    assert float(loss.token_entropy(flattened).mean()) > 0.95 * math.log(NUM_ADAPTERS)
    assert variance(flattened) < 0.2 * variance(start)


def test_mutual_information_of_adapter_and_token_rises_with_plus_one() -> None:
    start = loss.mutual_information(torch.softmax(make_logits(scale=1.0), dim=-1))
    assert loss.mutual_information(descend(sign=1)) > 2 * start
    assert loss.mutual_information(descend(sign=-1)) < 0.2 * start


def test_balance_alone_lowers_the_largest_load_from_a_skewed_start() -> None:
    logits = make_logits()
    logits[:, 0] += 3.0
    start = torch.softmax(logits, dim=-1).mean(dim=0).max()
    leaf = logits.requires_grad_()
    optimiser = torch.optim.SGD([leaf], lr=20.0)
    for _ in range(100):
        optimiser.zero_grad()
        torch.autograd.backward(
            loss.router_losses(leaf[None], torch.zeros(NUM_TOKENS, dtype=torch.int64), TOP_K).balance
        )
        optimiser.step()
    assert torch.softmax(leaf.detach(), dim=-1).mean(dim=0).max() < 0.6 * start


def test_a_prior_moves_the_optimum_of_the_balance_term_to_the_expected_traffic() -> None:
    prior = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    at_prior = loss.balance_term(prior.repeat(4, 1), prior, prior=prior)
    assert float(at_prior) == pytest.approx(1.0)
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    assert float(loss.balance_term(uniform.repeat(4, 1), uniform, prior=prior)) > 1.5
    # A choice above its share costs, one below it does not: with equal shares it would be the other way round.
    logits = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    frequency = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(loss.balance_term(torch.softmax(logits, -1), frequency, prior=prior), logits)
    assert gradient[0, 1] > gradient[0, 0]
    (plain,) = torch.autograd.grad(loss.balance_term(torch.softmax(logits, -1), frequency), logits)
    assert plain[0, 0] > plain[0, 1]


def test_a_uniform_prior_is_the_papers_balance_term() -> None:
    generator = torch.Generator().manual_seed(5)
    probabilities = torch.softmax(torch.randn(2, 6, 4, generator=generator), -1)
    frequency = torch.softmax(torch.randn(2, 4, generator=generator), -1)
    torch.testing.assert_close(
        loss.balance_term(probabilities, frequency, prior=torch.full((4,), 0.25)),
        loss.balance_term(probabilities, frequency),
    )


def test_distilled_losses_are_likelihood_and_divergence_in_the_share_asked_for() -> None:
    logits, teacher = make_logits(1), make_logits(2)
    targets = torch.arange(NUM_TOKENS) % NUM_ADAPTERS
    likelihood = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=teacher), torch.distributions.Categorical(logits=logits)
    )
    for share in (0.0, 0.3, 1.0):
        found = loss.distilled_losses(logits, targets, teacher, share)
        torch.testing.assert_close(found, (1 - share) * likelihood + share * divergence)
    assert loss.distilled_losses(teacher, targets, teacher, 1.0).abs().max() < 1e-12
