"""Features of tokens and distributions tilted along them, against numpy and the conditions that define them."""

import numpy as np
import pytest
import torch
from torch import Tensor

from server.routing.token_features import NUM_FEATURES, TILT_PENALTY, tilted, token_features

V = 300


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shares(seed: int = 1) -> Tensor:
    return torch.softmax(random(V, seed=seed).double(), dim=0)


def test_features_are_centred_uncorrelated_and_of_variance_one_under_the_shares() -> None:
    ordinary, embeddings = shares(), random(V, 40) * torch.linspace(0.1, 3, 40) + 5
    features = token_features(embeddings, ordinary)
    assert features.dtype is torch.float16
    assert features.shape == (V, NUM_FEATURES)
    values, weights = features.double().numpy(), ordinary.numpy()
    np.testing.assert_allclose(weights @ values, 0, atol=1e-3)
    np.testing.assert_allclose(values.T @ (weights[:, None] * values), np.eye(NUM_FEATURES), atol=5e-3)


def test_features_span_the_directions_in_which_tokens_differ_most() -> None:
    """Principal components under the shares, by numpy's own decomposition; their signs are anybody's."""
    ordinary, embeddings = shares(), random(V, 40) * torch.linspace(0.1, 3, 40)
    weights, values = ordinary.numpy(), embeddings.double().numpy()
    centred = values - weights @ values
    _, _, directions = np.linalg.svd(np.sqrt(weights)[:, None] * centred, full_matrices=False)
    expected = centred @ directions[:NUM_FEATURES][::-1].T
    expected /= np.sqrt(weights @ expected**2)
    found = token_features(embeddings, ordinary).double().numpy()
    signs = np.sign((found * expected).sum(axis=0))
    np.testing.assert_allclose(found * signs, expected, atol=0.02)


def test_directions_without_variance_are_none() -> None:
    embeddings = torch.cat([random(V, 3), torch.full((V, 5), 2.0)], dim=1)
    assert token_features(embeddings, shares()).shape == (V, 3)
    assert token_features(torch.ones(V, 5), shares()).shape == (V, 0)


@pytest.mark.parametrize("number", [4, 400, 40_000])
def test_a_tilt_meets_the_condition_of_its_maximum(number: int) -> None:
    ordinary, features = shares(), token_features(random(V, 40), shares())
    towards = torch.softmax(ordinary.log() + features.double() @ random(NUM_FEATURES, seed=3).double(), dim=0)
    counts = torch.bincount(
        torch.multinomial(towards, number, replacement=True, generator=torch.Generator().manual_seed(4)), minlength=V
    )
    found = tilted(ordinary, features, counts).numpy()
    values = features.double().numpy()
    assert found.min() > 0
    np.testing.assert_allclose(found.sum(), 1, rtol=1e-12)
    w = (counts.numpy() @ values - number * (found @ values)) / TILT_PENALTY
    expected = ordinary.numpy() * np.exp(values @ w)
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-4)


def test_many_tokens_are_matched_in_their_mean_and_few_hardly_move_it() -> None:
    ordinary, features = shares(), token_features(random(V, 40), shares())
    wanted = features[7].double()
    far = torch.zeros(V).double()
    distances = []
    for number in (0, 10, 1_000, 1_000_000):
        far[7], far[8] = number, number
        mean = tilted(ordinary, features, far) @ features.double()
        distances.append(float((mean - (wanted + features[8].double()) / 2).norm()))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.01 * distances[0]
    torch.testing.assert_close(tilted(ordinary, features, torch.zeros(V)), ordinary)


def test_one_token_said_a_million_times_and_no_features_at_all_are_distributions() -> None:
    ordinary, counts = shares(), torch.zeros(V)
    counts[int(ordinary.argmin())] = 1e6
    found = tilted(ordinary, token_features(random(V, 40), ordinary), counts)
    assert torch.isfinite(found).all()
    assert float(found.sum()) == pytest.approx(1)
    assert torch.equal(tilted(ordinary, torch.zeros(V, 0).half(), counts), ordinary)
