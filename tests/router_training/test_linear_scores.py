"""Closed-form routers against independent computations: densities, correlations, plain means."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from router_training.linear_scores import (
    LinearScorer,
    PrototypeScorer,
    discriminant,
    fit_discriminant,
    mean_activation,
    ridge,
)
from router_training.router_inputs import CachedInputs
from router_training.settings import TrainingConfig
from router_training.warm_start import fit_ridge
from server.routing.bank import ProjectionInfo

WIDTH, COUNT, CLASSES = 6, 600, 3
QUERY = ProjectionInfo("q", WIDTH, WIDTH, 0, False)
VALUE = ProjectionInfo("v", WIDTH, WIDTH, 0, False)
LATER = ProjectionInfo("later", WIDTH, WIDTH, 1, False)


@pytest.fixture
def cached() -> CachedInputs:
    """Three classes with one covariance, not isotropic, in unequal numbers."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), COUNT, replacement=True, generator=generator)
    means = 2 * torch.randn(CLASSES, WIDTH, generator=generator)
    shape = torch.randn(WIDTH, WIDTH, generator=generator)
    inputs = means[labels] + torch.randn(COUNT, WIDTH, generator=generator) @ shape
    return CachedInputs({"layer.0": inputs}, labels + 1, torch.ones(COUNT, dtype=torch.bool))


@pytest.fixture
def tokens() -> Tensor:
    return 3 * torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(4))


def pooled_covariance(inputs: Tensor, labels: Tensor) -> Tensor:
    """Class by class with numpy."""
    parts = [np.cov(inputs[labels == c].double().numpy().T, bias=True) * int((labels == c).sum()) for c in (1, 2, 3)]
    return torch.tensor(sum(parts) / len(inputs), dtype=torch.float32)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_discriminants_are_the_log_posteriors_of_normal_classes(
    cached: CachedInputs, tokens: Tensor, shrinkage: float
) -> None:
    inputs, labels = cached.inputs["layer.0"], cached.labels
    covariance = pooled_covariance(inputs, labels)
    covariance = (1 - shrinkage) * covariance + shrinkage * covariance.diagonal().mean() * torch.eye(WIDTH)
    means = [inputs[labels == c].mean(dim=0) for c in (1, 2, 3)]
    normals = [MultivariateNormal(mean, covariance) for mean in means]
    densities = torch.stack([normal.log_prob(tokens) for normal in normals], dim=1)  # type: ignore[no-untyped-call]
    rows, biases = fit_discriminant(inputs, labels - 1, CLASSES, shrinkage)
    found = (tokens @ rows.T + biases).softmax(dim=1)
    torch.testing.assert_close(found, densities.softmax(dim=1), rtol=1e-3, atol=1e-4)


def test_the_discriminant_scorer_is_the_fit_of_each_gate(cached: CachedInputs, tokens: Tensor) -> None:
    rows, biases = fit_discriminant(cached.inputs["layer.0"], cached.labels - 1, CLASSES)
    scorer = discriminant(cached, CLASSES, "layer")
    for info in (QUERY, VALUE):
        found = scorer.scores(info, tokens)
        assert found is not None
        torch.testing.assert_close(found, tokens @ rows.T + biases)
    assert scorer.scores(LATER, tokens) is None


def test_ridge_is_the_warm_starts_closed_form(cached: CachedInputs, tokens: Tensor) -> None:
    penalty = TrainingConfig().warm_start_penalty
    rows = fit_ridge(cached.inputs["layer.0"], cached.labels - 1, torch.ones(COUNT), CLASSES, penalty)
    found = ridge(cached, CLASSES, "layer").scores(QUERY, tokens)
    assert found is not None
    torch.testing.assert_close(found, tokens @ rows.T)


def test_mean_activation_is_the_correlation_with_the_mean_of_the_own_inputs(
    cached: CachedInputs, tokens: Tensor
) -> None:
    means = np.stack([cached.inputs["layer.0"][cached.labels == c].numpy().mean(axis=0) for c in (1, 2, 3)])
    expected = [[np.corrcoef(token, mean)[0, 1] for mean in means] for token in tokens.numpy()]
    found = mean_activation(cached, CLASSES, "layer").scores(QUERY, tokens)
    assert found is not None
    torch.testing.assert_close(found, torch.tensor(expected).float() * WIDTH**0.5, rtol=1e-3, atol=1e-3)


def test_neither_scale_nor_offset_of_a_prototype_or_token_matters(tokens: Tensor) -> None:
    prototypes = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(5))
    plain = PrototypeScorer({"q": prototypes}, "projection").scores(QUERY, tokens)
    scaled = PrototypeScorer({"q": 7 * prototypes + 2}, "projection").scores(QUERY, 3 * tokens - 1)
    assert plain is not None
    assert scaled is not None
    # LayerNorm's epsilon of 1e-5 is what differs.
    torch.testing.assert_close(plain, scaled, rtol=1e-3, atol=1e-3)


def test_an_adapter_without_a_prototype_is_never_chosen(tokens: Tensor) -> None:
    prototypes = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(5))
    prototypes[1] = 0
    scores = PrototypeScorer({"q": prototypes}, "projection").scores(QUERY, tokens)
    assert scores is not None
    assert bool((scores[:, 1] == -torch.inf).all())
    assert bool(scores[:, [0, 2]].isfinite().all())


def test_a_scorer_has_scores_only_where_it_has_rows(tokens: Tensor) -> None:
    scorer = LinearScorer({"q": torch.ones(2, WIDTH)}, "projection")
    assert scorer.scores(VALUE, tokens) is None
    found = scorer.scores(QUERY, tokens)
    assert found is not None
    torch.testing.assert_close(found[:, 0], tokens.sum(dim=1))
