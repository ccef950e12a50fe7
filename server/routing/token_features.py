"""What tokens are like, and what somebody's tokens are likely to be who has shown only a few.

Examples name a few hundred tokens; what others ask with other words is alike all the same, and the base model's token
embeddings know how. A newcomer's tokens are taken from the distribution nearest to the ordinary one in which the mean
features are the examples' (maximum entropy; an exponential tilt of the ordinary one). Letters: V vocabulary, D
features, d embedding width.
"""

import torch
from torch import Tensor

NUM_FEATURES = 16
"""Most directions kept of the embeddings; 2 bytes per token and direction in an artefact."""
TILT_PENALTY = 600.0
"""Squared penalty on a tilt, in tokens: as if so many ordinary ones had been seen along every direction. With
`NUM_FEATURES` the best of what was tried: see docs/hot-routing.md."""
_LEAST_VARIANCE = 1e-6
"""Of the embeddings' mean square: directions with less are rounding."""
_MAX_STEPS = 50
_ENOUGH = 1e-6
"""Length of a Newton step that ends the search."""


def token_features(embeddings: Tensor, ordinary: Tensor) -> Tensor:
    """(V, D) float16: each token along the directions in which tokens differ most, widest last, with mean 0 and
    variance 1 under `ordinary` (V,), the shares of tokens. `embeddings` (V, d), of which no row's length should count.
    """
    weights = ordinary.float()[:, None]
    values = embeddings.detach().float()
    centred = values - (weights * values).sum(dim=0) / weights.sum()
    variances, directions = torch.linalg.eigh((centred.T @ (weights * centred)).double())
    kept = variances > _LEAST_VARIANCE * float((weights * values.square()).sum())
    kept[:-NUM_FEATURES] = False
    scaled: Tensor = directions[:, kept] / variances[kept].sqrt()
    return (centred @ scaled.float()).half()


def tilted(ordinary: Tensor, features: Tensor, counts: Tensor) -> Tensor:
    """(V,) float64 shares p(t) ~ ordinary(t) exp(w · features(t)), w the most likely for `counts` (V,) of tokens under
    the penalty: sum_t counts(t) log p(t) - `TILT_PENALTY` |w|² / 2. `ordinary` sums to one.

    At the maximum, n (mean of examples - mean of p) = penalty · w. No counts, or no features: the ordinary ones.
    """
    values, ordinary, counts = features.double(), ordinary.double(), counts.double()
    total, num_features = float(counts.sum()), values.shape[1]
    wanted = counts @ values
    w = values.new_zeros(num_features)
    shares = ordinary
    for _ in range(_MAX_STEPS if num_features else 0):
        mean = shares @ values
        covariance = values.T @ (shares[:, None] * values) - torch.outer(mean, mean)
        curvature = total * covariance + TILT_PENALTY * torch.eye(num_features, dtype=torch.float64)
        step = torch.linalg.solve(curvature, wanted - total * mean - TILT_PENALTY * w)
        length = float(step.norm())
        w = w + step / max(1.0, length)  # far from the maximum a whole step may be too wide
        shares = torch.softmax(ordinary.log() + values @ w, dim=0)
        if length < _ENOUGH:
            break
    return shares
