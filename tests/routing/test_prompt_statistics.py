"""Statistics of questions: every choice counts the same, and what does not fit a gate is named."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from server.routing.prompt_statistics import MAX_RETAINED, MAX_TOKENS, QuestionStatistics, summarise_questions

V, C = 12, 3
QUESTIONS: list[tuple[list[int], int]] = [([1, 1, 2], 0), ([3], 2), ([2, 4, 4, 4], 0), ([3, 5], 2)]


def test_the_frequency_is_the_mean_over_the_choices_that_have_questions() -> None:
    found = summarise_questions(QUESTIONS, V, C).frequency
    first = np.bincount([1, 1, 2, 2, 4, 4, 4], minlength=V) / 7
    last = np.bincount([3, 3, 5], minlength=V) / 3
    np.testing.assert_allclose(found.numpy(), (first + last) / 2, rtol=1e-6)


def test_retained_questions_come_back_with_their_choice() -> None:
    assert summarise_questions(QUESTIONS, V, C).questions == [*QUESTIONS[::2], *QUESTIONS[1::2]]


def test_of_many_and_long_questions_some_are_kept_evenly_spread_and_cut() -> None:
    many = [([index % V] * (MAX_TOKENS + 9), 1) for index in range(2 * MAX_RETAINED)]
    kept = summarise_questions(many, V, C).questions
    assert kept == [([2 * index % V] * MAX_TOKENS, 1) for index in range(MAX_RETAINED)]


def test_tensors_and_back_is_exact() -> None:
    statistics = summarise_questions(QUESTIONS, V, C)
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
    ],
)
def test_what_does_not_fit_the_gate_is_named(change: dict[str, Any], problem: str) -> None:
    problems = replace(summarise_questions(QUESTIONS, V, C), **change).problems(V, C)
    assert len(problems) == 1
    with pytest.raises(ValueError, match=problem):
        raise ValueError(problems[0])


def test_a_missing_tensor_is_an_error() -> None:
    tensors = summarise_questions(QUESTIONS, V, C).tensors()
    with pytest.raises(KeyError, match="lengths"):
        QuestionStatistics.from_tensors({key: value for key, value in tensors.items() if key != "lengths"})
