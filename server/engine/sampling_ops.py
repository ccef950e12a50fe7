"""Tensor maths of sampling: penalties, filters, drawing and logprobs. Knows tensors only, no sequences.

A vocabulary is tens of thousands wide and a row's interesting part is a few tokens, so most functions look at blocks
of the vocabulary first and inside one or a few blocks after. On a CPU that is several times faster than
`argmax`, `topk`, `sort` and `cumsum` over whole rows. S rows, V vocabulary.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
"""Vocabulary entries per block: about the square root of the vocabularies we meet, so both levels cost the same."""

NUM_TOP_P_CANDIDATES = 256
"""Most likely tokens in which top-p's cut is looked for before a row is sorted: most model outputs are that peaked."""

NEGLIGIBLE = 1e-18
"""Weight, relative to the likeliest token's, below which tokens are dropped: a vocabulary of them stays below 1e-12."""


class Filters(NamedTuple):
    """Per-row cuts, each (S,) float32 or int64; a neutral value keeps everything."""

    min_p: Tensor
    """0 is neutral."""
    top_k: Tensor
    """Number kept, at least 1; V or more is neutral."""
    top_p: Tensor
    """1 is neutral."""


def in_blocks(rows: Tensor, fill: float) -> Tensor:
    """(S, V) -> (S, ceil(V / BLOCK), BLOCK), padded with `fill` at the end."""
    missing = -rows.shape[-1] % BLOCK
    padded = F.pad(rows, (0, missing), value=fill) if missing else rows
    return padded.reshape(rows.shape[0], padded.shape[1] // BLOCK, BLOCK)


def greatest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(S, V) -> values (S,), lowest ids that have them (S,). NaN counts as greatest, so a bad row shows."""
    blocks = in_blocks(logits, -torch.inf)
    block_tops = blocks.amax(-1)  # (S, V / BLOCK)
    block = block_tops.argmax(-1, keepdim=True)  # (S, 1)
    inside = _inside(blocks, block)  # (S, BLOCK)
    return block_tops.amax(-1), block.squeeze(-1) * BLOCK + inside.argmax(-1)


def top_values(rows: Tensor, count: int) -> Tensor:
    """(S, V) -> the `count` greatest values of each row, descending (S, count)."""
    if count * BLOCK * 2 > rows.shape[-1]:
        return rows.topk(count).values
    # The `count` greatest values lie in the `count` blocks with the greatest maxima.
    blocks = in_blocks(rows, -torch.inf)
    best = blocks.amax(-1).topk(count).indices  # (S, count)
    return _inside(blocks, best).topk(count).values


def _inside(blocks: Tensor, chosen: Tensor) -> Tensor:
    """(S, N, BLOCK), block numbers (S, C) -> their contents side by side (S, C * BLOCK)."""
    return blocks.gather(1, chosen.unsqueeze(-1).expand(-1, -1, BLOCK)).flatten(1)


def to_weights(logits: Tensor, best: Tensor, temperatures: Tensor) -> Tensor:
    """Unnormalised probabilities with a maximum of 1: (S, V), (S,) greatest logits, (S,) temperatures > 0 -> (S, V).

    `logits` is overwritten. Shifted before it is scaled, so that no temperature overflows. What is less likely than
    NEGLIGIBLE becomes 0, before it becomes a denormal number, which make CPUs crawl.
    """
    scaled = logits.sub_(best.unsqueeze(-1)).div_(temperatures.unsqueeze(-1)).clamp_(min=math.log(NEGLIGIBLE) - 1)
    return F.threshold(scaled.exp_(), NEGLIGIBLE, 0.0, inplace=True)


def penalise(logits: Tensor, rows: Tensor, token_ids: Tensor, num_said: Tensor, penalties: Tensor) -> None:
    """Apply repetition, presence and frequency penalties in place.

    Row and token id (N,) of every logit that is penalised, each once; how often its token was generated (N,), 0 of what
    stands in the prompt alone; and its row's repetition, presence and frequency penalty (N, 3). Repetition is CTRL's
    (arXiv 1909.05858): positive logits divided, negative multiplied. Presence is subtracted once, frequency per
    occurrence, from tokens already generated (OpenAI's definitions).
    """
    repetition, presence, frequency = penalties.unbind(dim=1)
    values = logits[rows, token_ids]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[rows, token_ids] = values - ((num_said > 0) * presence + num_said * frequency)


def keep_likely(weights: Tensor, filters: Filters) -> None:
    """Set the weights that the filters cut to 0, in place: min-p, then top-k, then top-p over what is left.

    `weights` (S, V) are unnormalised probabilities with a maximum of 1. Each filter is a threshold on the weight, so
    equally likely tokens stay or go together and the result does not depend on any order among them.
    """
    cut = filters.min_p.clone()  # (S,) weights below are dropped
    has_top_k, has_top_p = filters.top_k < weights.shape[-1], filters.top_p < 1
    count = int(torch.where(has_top_k, filters.top_k, 1).max())
    if bool(has_top_p.any()):
        count = max(count, NUM_TOP_P_CANDIDATES)
    top = top_values(weights, min(count, weights.shape[-1]))
    kth = top.gather(1, (filters.top_k.clamp(max=top.shape[-1]) - 1).unsqueeze(-1)).squeeze(-1)
    cut = torch.where(has_top_k, torch.maximum(cut, kth), cut)
    _drop_below(weights, cut)
    if not bool(has_top_p.any()):
        return
    total = weights.sum(-1, dtype=torch.float64)  # (S,)
    wanted = (filters.top_p * total).unsqueeze(-1)  # (S, 1) mass
    index, is_reached = _first_reaching(top, wanted)
    cut = torch.where(has_top_p, top.gather(1, index).squeeze(-1), 0)
    for row in (has_top_p & ~is_reached).nonzero().flatten().tolist():
        # Tokens below this share cannot have more than 1 - p of the mass together, so the cut lies above them.
        least = float((1 - filters.top_p[row]) * total[row] / weights.shape[-1])
        candidates = weights[row][weights[row] >= least]
        descending = candidates.sort(descending=True).values.unsqueeze(0)
        index, _ = _first_reaching(descending, wanted[row : row + 1])
        cut[row] = descending[0, index[0, 0]]
    _drop_below(weights, cut)


def _drop_below(weights: Tensor, cut: Tensor) -> None:
    """Set weights (S, V) below their row's cut (S,) to 0, in place."""
    # On a CPU a comparison written as floats is several times faster than one written as bools.
    weights.mul_(torch.ge(weights, cut.unsqueeze(-1), out=torch.empty_like(weights)))


def _first_reaching(descending: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(S, N) weights, (S, 1) mass -> index where the running sum reaches the mass (S, 1), and whether it does (S,)."""
    num_short = (descending.cumsum(-1, dtype=torch.float64) < wanted).sum(-1, keepdim=True)
    size = descending.shape[-1]
    return num_short.clamp(max=size - 1), num_short.squeeze(-1) < size


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF sampling: (S, V) unnormalised probabilities, (S,) float64 numbers in [0, 1) -> token ids (S,).

    First the block, then the token inside it. Tokens of weight 0 are never drawn.
    """
    blocks = in_blocks(weights, 0.0)
    cdf = blocks.sum(-1).cumsum(-1, dtype=torch.float64)  # (S, V / BLOCK)
    target = (uniforms * cdf[:, -1]).unsqueeze(-1)  # (S, 1)
    block = _first_above(cdf, target)
    target = target - F.pad(cdf, (1, 0)).gather(1, block)  # what is left of it inside the block
    inside = _inside(blocks, block)  # (S, BLOCK)
    token = _first_above(inside.cumsum(-1, dtype=torch.float64), target)
    return (block * BLOCK + token).squeeze(-1)


def _first_above(cdf: Tensor, target: Tensor) -> Tensor:
    """(S, N) running sums, (S, 1) -> the first index whose sum exceeds the target (S, 1), so one of positive weight.

    Rounding may lift a target to the total, or to what the block's own sum makes of it; it is kept just below.
    """
    below_total = torch.nextafter(cdf[:, -1:], torch.zeros_like(target))
    return torch.searchsorted(cdf, torch.minimum(target, below_total), right=True)


class RowLogprobs(NamedTuple):
    """Natural-log probabilities of one row."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


def row_logprobs(logits: Tensor, token_ids: Tensor, num_top: list[int]) -> list[RowLogprobs]:
    """Logprob and 1-based rank of one token per row, and each row's most likely tokens (ties: lower id first).

    `logits` (S, V) float32, `token_ids` (S,).
    """
    normaliser = logits.logsumexp(-1)  # (S,)
    chosen = logits.gather(1, token_ids.unsqueeze(-1))  # (S, 1)
    is_better = torch.gt(logits, chosen, out=torch.empty_like(logits))  # as floats: faster, and exact below 2^24
    ranks = (is_better.sum(-1) + 1).long().tolist()
    logprobs = (chosen.squeeze(-1) - normaliser).tolist()
    tops = _most_likely(logits, normaliser, num_top)
    return [RowLogprobs(*row) for row in zip(logprobs, ranks, tops, strict=True)]


def _most_likely(logits: Tensor, normaliser: Tensor, num_top: list[int]) -> list[tuple[tuple[int, float], ...]]:
    count = min(max(num_top, default=0), logits.shape[-1])
    if count == 0:
        return [()] * len(num_top)
    least = top_values(logits, count)[:, -1:]  # (S, 1)
    # All tokens that reach `least`, those that tie with it, too; ids ascend within a row.
    blocks = in_blocks(logits, -torch.inf)
    rows, numbers = (blocks.amax(-1) >= least).nonzero(as_tuple=True)
    inside = blocks[rows, numbers]  # (blocks found, BLOCK)
    which, offsets = (inside >= least[rows]).nonzero(as_tuple=True)
    rows, ids = rows[which], numbers[which] * BLOCK + offsets
    values = inside[which, offsets] - normaliser[rows]
    found: list[list[tuple[int, float]]] = [[] for _ in num_top]
    for row, token_id, logprob in zip(rows.tolist(), ids.tolist(), values.tolist(), strict=True):
        found[row].append((token_id, logprob))
    # A stable sort, so that equally likely tokens keep their ascending ids.
    ordered = (sorted(pairs, key=lambda pair: -pair[1]) for pairs in found)
    return [tuple(pairs[:wanted]) for pairs, wanted in zip(ordered, num_top, strict=True)]
