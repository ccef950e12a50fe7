"""Penalties, filters and the draw against transformers' processors and the probabilities they leave."""

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engine import sampler, sampling_ops
from server.engine.sampler import sample
from tests.engine.sampling_reference import (
    VOCAB_SIZE,
    random_logits,
    reference_probabilities,
    reference_sample,
    sequence,
)


def kept_by(logits: Tensor, **params: Any) -> list[set[int]]:
    """Tokens with a positive weight after our filters."""
    rows = [sequence(i, **params) for i in range(logits.shape[0])]
    temperatures = torch.tensor([row.params.temperature for row in rows])
    weights = sampling_ops.to_weights(logits.clone(), logits.amax(-1), temperatures)
    sampler._filter(weights, rows)
    return [set(row.nonzero().flatten().tolist()) for row in weights]


def kept_by_transformers(logits: Tensor, *warpers: Any) -> list[set[int]]:
    ids = torch.zeros(logits.shape[0], 1, dtype=torch.long)
    for warper in warpers:
        logits = warper(ids, logits)
    return [set(row.isfinite().nonzero().flatten().tolist()) for row in logits]


@pytest.mark.parametrize("top_k", [1, 2, 7, 50, 300, 999])
def test_top_k_keeps_what_transformers_keeps(top_k: int) -> None:
    logits = random_logits(6)
    assert kept_by(logits, temperature=1.0, top_k=top_k) == kept_by_transformers(logits, TopKLogitsWarper(top_k))


@pytest.mark.parametrize("top_p", [0.001, 0.1, 0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_top_p_keeps_what_transformers_keeps(top_p: float, scale: float) -> None:
    logits = random_logits(6, scale=scale)
    assert kept_by(logits, temperature=1.0, top_p=top_p) == kept_by_transformers(logits, TopPLogitsWarper(top_p))


@pytest.mark.parametrize("min_p", [0.001, 0.05, 0.5, 1.0])
def test_min_p_keeps_what_transformers_keeps(min_p: float) -> None:
    logits = random_logits(6)
    assert kept_by(logits, temperature=1.0, min_p=min_p) == kept_by_transformers(logits, MinPLogitsWarper(min_p))


def test_all_filters_together_keep_what_transformers_keeps_in_that_order() -> None:
    logits = random_logits(6)
    warpers = (TemperatureLogitsWarper(0.7), MinPLogitsWarper(0.01), TopKLogitsWarper(30), TopPLogitsWarper(0.8))
    ours = kept_by(logits, temperature=0.7, min_p=0.01, top_k=30, top_p=0.8)
    assert ours == kept_by_transformers(logits, *warpers)


def test_top_p_over_a_flat_vocabulary_of_real_size_finds_its_cut_beyond_the_candidates() -> None:
    logits = random_logits(2, scale=0.5, vocab_size=49152)
    ours = kept_by(logits, temperature=1.0, top_p=0.6)
    theirs = kept_by_transformers(logits, TopPLogitsWarper(0.6))
    # Sums of 49152 float32 numbers differ in the last digits: a token at the very edge may fall on either side.
    assert all(len(a ^ b) <= 2 and len(a) > 1000 for a, b in zip(ours, theirs, strict=True))


def test_repetition_penalty_equals_transformers() -> None:
    logits = random_logits(1)
    row = sequence(output=(4, 4, 900), repetition_penalty=1.3)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([row.token_ids]), logits.clone())
    assert torch.allclose(sampler._adjust(logits.clone(), [row]), expected, rtol=1e-6)


def test_presence_and_frequency_penalties_count_output_tokens_only() -> None:
    row = sequence(output=(4, 4, 900, 3), presence_penalty=0.5, frequency_penalty=0.25)
    change = sampler._adjust(torch.zeros(1, VOCAB_SIZE), [row])[0]
    assert {index: change[index].item() for index in change.nonzero().flatten().tolist()} == {
        3: -0.75,
        4: -1.0,
        900: -0.75,
    }


def test_penalties_follow_sequences_as_they_grow() -> None:
    """Counts are kept from step to step; the reference counts anew. Few tokens, so that they come again."""
    penalties: list[dict[str, Any]] = [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.5, "frequency_penalty": 0.25},
        {"repetition_penalty": 0.9, "frequency_penalty": -0.3},
        {},
    ]
    rows = [sequence(index, output=(2, 4) * index, **params) for index, params in enumerate(penalties)]
    for step in range(40):
        logits = random_logits(len(rows), seed=step, vocab_size=8)
        chosen = [token.token_id for token in sample(logits, rows)]
        assert chosen == [reference_sample(row.tolist(), of) for row, of in zip(logits, rows, strict=True)]
        for row, token_id in zip(rows, chosen, strict=True):
            row.append(token_id)


def test_min_tokens_forbids_eos_and_stop_tokens_until_then() -> None:
    logits = random_logits(1)
    logits[0, [5, 7, 9]] = torch.tensor([30.0, 20.0, 10.0])
    chosen = [
        sample(logits, [sequence(output=(0,) * count, eos=(5,), stop_token_ids=(7,), min_tokens=2)])[0].token_id
        for count in range(3)
    ]
    assert chosen == [9, 9, 5]
    # As in vLLM: ignored is that it ends the answer, not that it may not come yet.
    assert sample(logits, [sequence(eos=(5,), min_tokens=2, ignore_eos=True)])[0].token_id == 7


# Drawing


class FixedNumber(random.Random):
    def __init__(self, number: float) -> None:
        super().__init__(0)
        self.number = number

    def random(self) -> float:
        return self.number


@pytest.mark.parametrize("number", [0.0, 5e-324, 0.5, 1 - 2**-53])
def test_no_random_number_draws_a_forbidden_token(number: float) -> None:
    logits = random_logits(4, vocab_size=257)
    rows = [sequence(i, temperature=1.0, eos=(0, 128, 255, 256), min_tokens=1) for i in range(4)]
    logits[1, :200] = -torch.inf
    logits[2, 3:] = -torch.inf
    logits[3] = -torch.inf
    logits[3, 130] = 0.0
    for row in rows:
        row.rng = FixedNumber(number)
    drawn = [token.token_id for token in sample(logits, rows)]
    for token, row in zip(drawn, logits, strict=True):
        assert token not in (0, 128, 255, 256)
        assert row[token] > -torch.inf


def test_frequencies_follow_the_probabilities() -> None:
    count = 8_000
    row_logits = random_logits(1, vocab_size=40, scale=1.5)
    params: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.2}
    probabilities = reference_probabilities(row_logits[0].tolist(), sequence(**params))
    drawn = Counter(
        token.token_id
        for start in range(0, count, 1000)
        for token in sample(row_logits.expand(1000, -1), [sequence(start + i, **params) for i in range(1000)])
    )
    assert {token for token, probability in enumerate(probabilities) if probability} >= set(drawn)
    for token, probability in enumerate(probabilities):
        deviation = math.sqrt(count * probability * (1 - probability))
        # 5 standard deviations: the seeds are fixed, this only says how far the fixed draw may be.
        assert abs(drawn[token] - count * probability) <= 5 * deviation
