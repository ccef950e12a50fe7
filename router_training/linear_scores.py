"""Routers made of one vector per adapter and gate, from the router inputs of a few calibration chats in closed form.

Mean activation (the baseline of PHATGOOSE, arXiv 2402.05859), linear discriminant analysis, and the scorers that turn
vectors into scores; ridge regression is `warm_start.fit_ridge`. Trains nothing by gradient.

Letters: T and N tokens, A adapters, d width of the gate's input.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from router_training.router_inputs import CachedInputs
from router_training.settings import TrainingConfig
from router_training.warm_start import fit_rows
from server.routing.bank import ProjectionInfo
from server.routing.router import Granularity, gate_key

LDA_SHRINKAGE = 0.1
"""Share of the pooled covariance replaced by its mean diagonal. 16 chats of each of 8 tasks are some 5,000 tokens, but
neighbours within a chat are alike, so that the small ones of 576 directions are noise."""


class LinearScorer:
    """Implements `scores.Scorer`: w·x + b, the same for all projections that share a gate."""

    def __init__(self, rows: Mapping[str, Tensor], granularity: Granularity, biases: Mapping[str, Tensor] = {}) -> None:
        """`rows` (A, d) and `biases` (A,) by gate key; a gate without biases has none."""
        self._rows = rows
        self._biases = biases
        self._granularity: Granularity = granularity

    def scores(self, info: ProjectionInfo, tokens: Tensor) -> Tensor | None:
        """See `scores.Scorer`."""
        key = gate_key(self._granularity, info)
        if (rows := self._rows.get(key)) is None:
            return None
        return F.linear(tokens.float(), rows, self._biases.get(key))


class PrototypeScorer:
    """Implements `scores.Scorer`: v·x / √d of standardised v and x, that is √d times their correlation (PHATGOOSE).

    An adapter whose prototype is all zero has nothing in that place and is never chosen.
    """

    def __init__(self, prototypes: Mapping[str, Tensor], granularity: Granularity) -> None:
        """`prototypes` (A, d) by gate key, as they were measured or trained."""
        self._prototypes = {key: F.layer_norm(rows.float(), rows.shape[-1:]) for key, rows in prototypes.items()}
        self._absent = {key: (rows == 0).all(dim=1) for key, rows in prototypes.items()}
        self._granularity: Granularity = granularity

    def scores(self, info: ProjectionInfo, tokens: Tensor) -> Tensor | None:
        """See `scores.Scorer`."""
        key = gate_key(self._granularity, info)
        if (prototypes := self._prototypes.get(key)) is None:
            return None
        x = F.layer_norm(tokens.float(), tokens.shape[-1:])  # (T, d)
        scores: Tensor = x @ prototypes.T / tokens.shape[-1] ** 0.5
        return scores.masked_fill(self._absent[key], -torch.inf)


def mean_activation(cached: CachedInputs, num_adapters: int, granularity: Granularity) -> PrototypeScorer:
    """Each adapter's prototype is the mean router input of its own chats."""
    return PrototypeScorer(
        {key: _means(x.float(), cached.labels, num_adapters) for key, x in cached.inputs.items()}, granularity
    )


def ridge(cached: CachedInputs, num_adapters: int, granularity: Granularity) -> LinearScorer:
    """Regression on the adapter's identity, with the penalty and the gain of the warm start."""
    return LinearScorer(fit_rows(cached, num_adapters, TrainingConfig(warm_start="ridge")), granularity)


def discriminant(cached: CachedInputs, num_adapters: int, granularity: Granularity) -> LinearScorer:
    """Linear discriminant analysis: the scores are log posteriors, up to a constant per token, of normal classes with
    one covariance and equal priors."""
    fitted = {key: fit_discriminant(x.float(), cached.labels - 1, num_adapters) for key, x in cached.inputs.items()}
    rows, biases = ({key: pair[part] for key, pair in fitted.items()} for part in (0, 1))
    return LinearScorer(rows, granularity, biases)


def fit_discriminant(
    inputs: Tensor, labels: Tensor, num_classes: int, shrinkage: float = LDA_SHRINKAGE
) -> tuple[Tensor, Tensor]:
    """w_i = Σ⁻¹ μ_i (A, d) and b_i = −½ μ_i·w_i (A,) of inputs (N, d) and labels (N,) from 0.

    Σ is the covariance within classes, pooled, (1 − γ) Σ + γ tr(Σ)/d with γ = `shrinkage`. Each class needs a token.
    """
    means = _means(inputs, labels + 1, num_classes)
    centred = inputs - means[labels]
    covariance = centred.T @ centred / len(inputs)
    scale = covariance.diagonal().mean()
    covariance.mul_(1 - shrinkage).diagonal().add_(shrinkage * scale)
    rows: Tensor = torch.linalg.solve(covariance, means.T).T.contiguous()
    return rows, -0.5 * (rows * means).sum(dim=1)


def _means(inputs: Tensor, labels: Tensor, num_adapters: int) -> Tensor:
    """(A, d): mean of the inputs of each label from 1 on."""
    return torch.stack([inputs[labels == label].mean(dim=0) for label in range(1, num_adapters + 1)])
