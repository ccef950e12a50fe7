"""Whose each token of a question is, by a hidden Markov chain over choices. Knows no tokens, no adapters and no gates.

Letters: T tokens of the question, C choices.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class ChainPosterior(NamedTuple):
    """What the chain makes of a whole question."""

    tokens: Floats
    """(T, C): probability that a token belongs to a choice, given all tokens."""
    first: Floats
    """(C,): probability that a choice is the first that any token belongs to, `background` left out, which keeps the
    probability that every token is its own."""


def smoothed(emissions: Floats, arrivals: Floats, *, background: int | None = None) -> ChainPosterior:
    """Posterior by the forward-backward algorithm (Rabiner 1989).

    emissions (T, C) in nats; `arrivals` (T, C) or what broadcasts to it: probability that a token belongs to a choice
    if the one before it belongs to another. The first choice is uniform. `background` is the choice that others may
    follow without being second; none: `first` is the first token's.
    """
    length, count = emissions.shape
    if count == 1 or length == 0:
        return ChainPosterior(np.ones((length, count)), np.full(count, 1 / count))
    arrivals = np.broadcast_to(arrivals, emissions.shape)
    rest = 1 - arrivals.sum(axis=1)
    likelihood: Floats = np.exp(emissions - emissions.max(axis=1, keepdims=True))
    # Far from the best choice is as good as never; zero would divide by zero where everything is.
    likelihood = np.maximum(likelihood, 1e-30)
    # Whoever had the token before has this one too, and whoever arrives. What need not wait for the token before is
    # computed of all tokens at once: the loops are most of what reading a question costs.
    stays, arrives = likelihood * rest[:, None], likelihood * arrivals  # (T, C)
    ones = np.ones(count)
    posterior: Floats = np.empty_like(likelihood)
    scales: Floats = np.empty(length)
    message = likelihood[0]
    for position in range(length):  # given the tokens so far
        if position:
            message = message * stays[position]
            message += arrives[position]
        scales[position] = total = message.dot(ones)
        message = np.divide(message, total, out=posterior[position])
    begins = _first_arrivals(likelihood, arrivals, rest, scales, background) / np.maximum(posterior, 1e-300)
    behind: Floats = np.empty_like(likelihood)  # what the tokens behind say
    behind[-1] = message = ones
    for position in range(length - 1, 0, -1):
        from_any = arrives[position].dot(message)
        message = stays[position] * message
        message += from_any
        message = np.divide(message, message.dot(ones), out=behind[position - 1])
    posterior *= behind
    posterior /= posterior.sum(axis=1, keepdims=True)
    first: Floats = (begins * posterior).sum(axis=0)
    if background is not None:
        first[background] = 0.0
        first[background] = max(0.0, 1 - first.sum())
    return ChainPosterior(posterior, first)


def _first_arrivals(
    likelihood: Floats, arrivals: Floats, rest: Floats, scales: Floats, background: int | None
) -> Floats:
    """(T, C): probability, given the tokens so far, that a choice begins here with nothing but background before it.

    `likelihood` and `arrivals` (T, C); `rest` (T,), probability that no choice arrives; `scales` (T,), probability of a
    token given those before it.
    """
    begins: Floats = np.zeros_like(likelihood)
    begins[0] = likelihood[0] / scales[0]
    if background is not None:
        stays = likelihood[:, background] / scales
        stays[1:] *= rest[1:] + arrivals[1:, background]
        begins[1:] = np.cumprod(stays)[:-1, None] * arrivals[1:] * likelihood[1:] / scales[1:, None]
    return begins
