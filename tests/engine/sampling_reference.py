"""A plain reference of sampling: one row at a time, Python floats, no tensors; and rows to try it with."""

import bisect
import itertools
import math
import random
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from server.engine.sequence import SamplingParams, Sequence

VOCAB_SIZE = 1000
"""Not a multiple of the block size."""


def sequence(id_: int = 0, output: tuple[int, ...] = (), eos: tuple[int, ...] = (), **params: Any) -> Sequence:
    params = {"temperature": 0.0, "seed": id_, "max_tokens": 100, **params}
    made = Sequence(id_, [1, 2, 3, 3], SamplingParams(**params), eos_token_ids=frozenset(eos))
    made.output_token_ids = list(output)
    return made


def random_logits(rows: int, *, scale: float = 2.0, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def reference_logits(logits: list[float], row: Sequence) -> list[float]:
    params, adjusted = row.params, list(logits)
    for token, bias in params.logit_bias:
        adjusted[token] += bias
    if row.num_output_tokens < params.min_tokens:
        for token in (*params.stop_token_ids, *row.eos_token_ids):
            adjusted[token] = -math.inf
    for token in set(row.token_ids):
        divides = adjusted[token] > 0
        adjusted[token] *= 1 / params.repetition_penalty if divides else params.repetition_penalty
    for token, count in Counter(row.output_token_ids).items():
        adjusted[token] -= params.frequency_penalty * count + params.presence_penalty
    return adjusted


def reference_probabilities(logits: list[float], row: Sequence) -> list[float]:
    params, adjusted = row.params, reference_logits(logits, row)
    best = max(adjusted)
    weights = [math.exp((logit - best) / params.temperature) for logit in adjusted]
    weights = [weight if weight >= params.min_p else 0.0 for weight in weights]
    if params.top_k > 0:
        kth = sorted(weights, reverse=True)[: params.top_k][-1]
        weights = [weight if weight >= kth else 0.0 for weight in weights]
    if params.top_p < 1:
        descending = sorted(weights, reverse=True)
        running = list(itertools.accumulate(descending))
        last = descending[bisect.bisect_left(running, params.top_p * sum(weights))]
        weights = [weight if weight >= last else 0.0 for weight in weights]
    return [weight / sum(weights) for weight in weights]


def reference_sample(logits: list[float], row: Sequence) -> int:
    if row.params.temperature == 0:
        adjusted = reference_logits(logits, row)
        return adjusted.index(max(adjusted))
    running = list(itertools.accumulate(reference_probabilities(logits, row)))
    return bisect.bisect_right(running, row.rng.random() * running[-1])


def any_sequence(rng: random.Random, id_: int) -> Sequence:
    """Every feature is on in about half of the rows."""

    def maybe(value: Any, neutral: Any) -> Any:
        return value if rng.random() < 0.5 else neutral

    return sequence(
        id_,
        output=tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(6))) * 2,
        eos=(5, 6),
        temperature=maybe(rng.uniform(0.2, 2), 0.0),
        top_p=maybe(rng.uniform(0.05, 0.99), 1.0),
        top_k=maybe(rng.randrange(1, 300), 0),
        min_p=maybe(rng.uniform(0, 0.2), 0.0),
        repetition_penalty=maybe(rng.uniform(0.8, 1.8), 1.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        logit_bias=maybe(((7, 5.0), (8, -100.0), (9, 3.0)), ()),
        min_tokens=maybe(4, 0),
        stop_token_ids=maybe((11, 12), ()),
        ignore_eos=maybe(True, False),
    )
