"""Sampling in batches against the plain one-row reference, and its edges."""

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch

from server.engine import sampling_ops
from server.engine.sampler import sample, score_tokens
from server.errors import EngineError
from tests.engine.fakes import make_sequence
from tests.engine.sampling_reference import VOCAB_SIZE, any_sequence, random_logits, reference_sample, sequence


@pytest.mark.parametrize("seed", range(12))
def test_a_batch_of_mixed_rows_equals_the_reference_row_by_row(seed: int) -> None:
    count = 40  # more than one chunk of rows
    logits = random_logits(count, seed=seed)
    rows, twins = ([any_sequence(random.Random(f"{seed}/{i}"), i) for i in range(count)] for _ in range(2))
    expected = [reference_sample(row_logits, twin) for row_logits, twin in zip(logits.tolist(), twins, strict=True)]
    assert [token.token_id for token in sample(logits, rows)] == expected
    assert [row.rng.getstate() for row in rows] == [twin.rng.getstate() for twin in twins], "same number of draws"


@pytest.mark.parametrize("seed", range(6))
def test_a_row_does_not_depend_on_its_batch_mates(seed: int) -> None:
    count = 24
    logits = random_logits(count, seed=seed)
    batched = sample(logits, [any_sequence(random.Random(100 * seed + i), i) for i in range(count)])
    for index in range(count):
        (alone,) = sample(logits[index : index + 1], [any_sequence(random.Random(100 * seed + index), index)])
        assert alone.token_id == batched[index].token_id


def test_the_logits_are_left_as_they_were() -> None:
    logits = random_logits(8)
    before = logits.clone()
    sample(logits, [any_sequence(random.Random(i), i) for i in range(8)])
    assert torch.equal(logits, before)


# Greedy


def test_greedy_is_the_argmax_with_the_lowest_id_on_ties() -> None:
    logits = random_logits(3)
    logits[0, [999, 130, 131, 700]] = 50.0
    logits[1, 0] = logits[1, 999] = 50.0
    assert [token.token_id for token in sample(logits, [sequence(), sequence(), sequence()])] == [
        130,
        0,
        int(logits[2].argmax()),
    ]


@pytest.mark.parametrize("vocab_size", [1, 2, 127, 128, 129, 256, 49152])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_equals_torchs_argmax_at_any_vocabulary_and_type(vocab_size: int, dtype: torch.dtype) -> None:
    logits = random_logits(3, vocab_size=vocab_size).to(dtype)  # bfloat16 has many ties
    assert [token.token_id for token in sample(logits, [sequence()] * 3)] == logits.float().argmax(-1).tolist()


def test_an_all_greedy_batch_computes_no_softmax_and_no_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("keep_likely", "to_weights", "draw", "penalise", "row_logprobs"):
        monkeypatch.delattr(sampling_ops, name)
    assert len(sample(random_logits(4), [sequence(i) for i in range(4)])) == 4


def test_greedy_rows_draw_no_random_number_and_others_exactly_one() -> None:
    rows = [sequence(0), sequence(1, temperature=1.0)]
    states = [row.rng.getstate() for row in rows]
    sample(random_logits(2), rows)
    assert rows[0].rng.getstate() == states[0]
    expected = random.Random(1)
    expected.random()
    assert rows[1].rng.getstate() == expected.getstate()


def test_no_rows_sample_nothing() -> None:
    assert sample(torch.empty(0, VOCAB_SIZE), []) == []


# Temperatures


@pytest.mark.parametrize("temperature", [1e-320, 1e-45, 1e-10, 0.01])
def test_a_tiny_temperature_is_greedy_and_overflows_nothing(temperature: float) -> None:
    logits = random_logits(3, scale=20.0)
    drawn = sample(logits, [sequence(i, temperature=temperature) for i in range(3)])
    assert [token.token_id for token in drawn] == logits.argmax(-1).tolist()


def test_a_huge_temperature_is_uniform() -> None:
    logits = random_logits(400, vocab_size=4)
    drawn = Counter(token.token_id for token in sample(logits, [sequence(i, temperature=1e30) for i in range(400)]))
    assert min(drawn.values()) > 60


# Logprobs


def test_logprobs_are_of_the_untouched_logits_with_rank_and_most_likely_tokens() -> None:
    logits = random_logits(4).to(torch.bfloat16)
    rows = [
        sequence(0, logprobs=3),
        sequence(1),
        sequence(2, logprobs=0, temperature=2.0),
        sequence(3, logprobs=5, logit_bias=((17, 100.0),)),
    ]
    sampled = sample(logits, rows)
    expected = logits.float().log_softmax(-1)
    assert sampled[1].logprobs is None
    assert sampled[3].token_id == 17
    for index, count in ((0, 3), (2, 0), (3, 5)):
        found = sampled[index].logprobs
        assert found is not None
        assert found.token_id == sampled[index].token_id
        assert found.logprob == pytest.approx(expected[index, found.token_id].item(), abs=1e-5)
        assert found.rank == 1 + int((expected[index] > expected[index, found.token_id]).sum())
        order = expected[index].sort(descending=True, stable=True).indices.tolist()
        assert [token for token, _ in found.top] == order[:count]
        assert [logprob for _, logprob in found.top] == pytest.approx(expected[index, order[:count]].tolist(), abs=1e-5)


def test_the_greedy_token_is_first_among_tied_alternatives() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, [200, 300, 400, 999]] = 9.0
    (token,) = sample(logits, [sequence(logprobs=2)])
    assert token.logprobs is not None
    assert (token.token_id, token.logprobs.rank) == (200, 1)
    assert [id_ for id_, _ in token.logprobs.top] == [200, 300]


def test_more_alternatives_than_tokens_are_all_tokens() -> None:
    (token,) = sample(random_logits(1, vocab_size=5), [sequence(logprobs=20)])
    assert token.logprobs is not None
    assert len(token.logprobs.top) == 5


def test_scored_tokens_equal_log_softmax_at_every_position() -> None:
    logits, targets = random_logits(150), list(range(150))  # more than one chunk
    expected = logits.log_softmax(-1)
    scored = score_tokens(logits, targets, 2)
    assert [row.token_id for row in scored] == targets
    assert [row.logprob for row in scored] == pytest.approx([expected[i, i].item() for i in targets], abs=1e-5)
    assert [row.rank for row in scored] == [1 + int((expected[i] > expected[i, i]).sum()) for i in targets]
    assert [[id_ for id_, _ in row.top] for row in scored] == expected.topk(2).indices.tolist()


# Broken logits


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_name_their_sequences_before_anything_is_drawn(
    bad: float, params: dict[str, Any]
) -> None:
    logits = random_logits(3)
    logits[1, 77] = bad
    rows = [sequence(id_, **params) for id_ in (10, 11, 12)]
    states = [row.rng.getstate() for row in rows]
    with pytest.raises(EngineError, match="11") as caught:
        sample(logits, rows)
    assert caught.value.sequence_ids == (11,)
    assert [row.rng.getstate() for row in rows] == states


def test_a_row_without_any_possible_token_is_an_error() -> None:
    with pytest.raises(EngineError) as caught:
        sample(torch.zeros(1, 2), [sequence(4, eos=(0, 1), min_tokens=1)])
    assert caught.value.sequence_ids == (4,)


def test_scoring_logits_that_are_not_finite_names_the_sequence() -> None:
    logits = random_logits(2)
    logits[1, 0] = math.nan
    with pytest.raises(EngineError) as caught:
        score_tokens(logits, [1, 2], 0, sequence_id=9)
    assert caught.value.sequence_ids == (9,)


def test_seeds_below_zero_are_seeds_of_their_own() -> None:
    """`random.Random(-1)` is `random.Random(1)`."""
    drawn = {seed: make_sequence(seed=seed).rng.random() for seed in (-2, -1, 0, 1, 2)}
    assert len(set(drawn.values())) == 5
    assert drawn[1] == random.Random(1).random(), "others keep their streams"
    assert drawn[-1] == make_sequence(seed=-1).rng.random()
