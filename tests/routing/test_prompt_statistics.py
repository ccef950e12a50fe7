"""Statistics of questions: every choice counts the same, and what does not fit a gate is named."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from server.routing.prompt_statistics import MAX_RETAINED, MAX_TOKENS, QuestionStatistics, summarise_questions
from server.routing.token_features import NUM_FEATURES, token_features

V, C = 12, 3
QUESTIONS: list[tuple[list[int], int]] = [([1, 1, 2], 0), ([3], 2), ([2, 4, 4, 4], 0), ([3, 5], 2)]
EMBEDDINGS = torch.randn(V, 4, generator=torch.Generator().manual_seed(0))


def test_the_frequency_is_the_mean_over_the_choices_that_have_questions() -> None:
    found = summarise_questions(QUESTIONS, EMBEDDINGS, C).frequency
    first = np.bincount([1, 1, 2, 2, 4, 4, 4], minlength=V) / 7
    last = np.bincount([3, 3, 5], minlength=V) / 3
    np.testing.assert_allclose(found.numpy(), (first + last) / 2, rtol=1e-6)


def test_retained_questions_come_back_with_their_choice() -> None:
    assert summarise_questions(QUESTIONS, EMBEDDINGS, C).questions == [*QUESTIONS[::2], *QUESTIONS[1::2]]


def test_of_many_and_long_questions_some_are_kept_evenly_spread_and_cut() -> None:
    many = [([index % V] * (MAX_TOKENS + 9), 1) for index in range(2 * MAX_RETAINED)]
    kept = summarise_questions(many, EMBEDDINGS, C).questions
    assert kept == [([2 * index % V] * MAX_TOKENS, 1) for index in range(MAX_RETAINED)]


def test_tensors_and_back_is_exact() -> None:
    statistics = summarise_questions(QUESTIONS, EMBEDDINGS, C)
    again = QuestionStatistics.from_tensors(statistics.tensors())
    for name, value in statistics.tensors().items():
        assert torch.equal(again.tensors()[name], value)
    assert not again.problems(V, C)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"frequency": torch.ones(V - 1) / V}, rf"frequency is \({V - 1},\)"),
        ({"frequency": torch.full((V,), float("nan"))}, "not the shares"),
        ({"frequency": torch.full((V,), float("inf"))}, "not the shares"),
        ({"lengths": torch.tensor([3, 4, 1], dtype=torch.int32)}, "do not fit together"),
        ({"lengths": torch.tensor([3, 4, 1, 3], dtype=torch.int32)}, "do not fit together"),
        ({"lengths": torch.tensor([3, 4, 3, 0], dtype=torch.int32)}, "do not fit together"),
        ({"choices": torch.tensor([0, 0, 2, C], dtype=torch.int32)}, "choices are none, or not within 0 and 2"),
        ({"tokens": torch.full((10,), V, dtype=torch.int32)}, "tokens are none, or not within 0 and 11"),
        ({"features": torch.zeros(V - 1, 4).half()}, rf"features is torch.float16 \({V - 1}, 4\), not float16 \({V}, "),
        ({"features": torch.zeros(V, 4)}, "features is torch.float32"),
        ({"features": torch.zeros(V, NUM_FEATURES + 1).half()}, f"features are more than {NUM_FEATURES}"),
        ({"features": torch.full((V, 4), float("inf")).half()}, "or not finite"),
    ],
)
def test_what_does_not_fit_the_gate_is_named(change: dict[str, Any], problem: str) -> None:
    problems = replace(summarise_questions(QUESTIONS, EMBEDDINGS, C), **change).problems(V, C)
    assert len(problems) == 1
    with pytest.raises(ValueError, match=problem):
        raise ValueError(problems[0])


def test_features_are_of_ordinary_questions_and_earlier_artefacts_have_none() -> None:
    statistics = summarise_questions(QUESTIONS, EMBEDDINGS, C)
    assert statistics.features is not None
    frequency = statistics.frequency.double()
    np.testing.assert_allclose(statistics.ordinary.numpy(), 0.6 * frequency.numpy() + 0.4 / V, rtol=1e-12)
    assert torch.equal(statistics.features, token_features(EMBEDDINGS, statistics.ordinary))
    tensors = statistics.tensors()
    del tensors["features"]
    earlier = QuestionStatistics.from_tensors(tensors)
    assert earlier.features is None
    assert earlier.tensors().keys() == tensors.keys()
    assert not earlier.problems(V, C)


def test_a_missing_tensor_is_an_error() -> None:
    tensors = summarise_questions(QUESTIONS, EMBEDDINGS, C).tensors()
    with pytest.raises(KeyError, match="lengths"):
        QuestionStatistics.from_tensors({key: value for key, value in tensors.items() if key != "lengths"})
