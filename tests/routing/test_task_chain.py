"""The chain over a question's choices: smoothing and the first choice against enumeration, and extreme scores."""

import itertools
import math

import numpy as np
import pytest

from server.routing.task_chain import smoothed


def test_smoothing_equals_the_sum_over_all_paths() -> None:
    generator = np.random.default_rng(0)
    emissions, switch = generator.normal(size=(6, 3)) * 2, 0.1
    expected = np.zeros((6, 3))
    for path in itertools.product(range(3), repeat=6):
        changes = sum(first != second for first, second in itertools.pairwise(path))
        weight = math.exp(sum(emissions[position, choice] for position, choice in enumerate(path)))
        weight *= (switch / 2) ** changes * (1 - switch) ** (5 - changes)
        for position, choice in enumerate(path):
            expected[position, choice] += weight
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(smoothed(emissions, np.array(switch / 2)).tokens, expected, rtol=1e-10)


def test_every_token_and_choice_may_have_a_probability_of_its_own_to_arrive() -> None:
    generator = np.random.default_rng(2)
    emissions, arrivals = generator.normal(size=(4, 3)), generator.uniform(0, 0.4, size=(4, 3))
    expected = np.zeros((4, 3))
    for path in itertools.product(range(3), repeat=4):
        weight = math.exp(sum(emissions[position, choice] for position, choice in enumerate(path)))
        for position in range(1, 4):
            before, choice = path[position - 1], path[position]
            others = sum(arrivals[position, other] for other in range(3) if other != before)
            weight *= arrivals[position, choice] if choice != before else 1 - others
        for position, choice in enumerate(path):
            expected[position, choice] += weight
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(smoothed(emissions, arrivals).tokens, expected, rtol=1e-10)


def test_smoothing_stays_finite_for_long_and_extreme_questions() -> None:
    emissions = np.random.default_rng(1).normal(size=(3000, 4)) * 300
    posterior = smoothed(emissions, np.array(1e-3)).tokens
    assert np.isfinite(posterior).all()
    np.testing.assert_allclose(posterior.sum(axis=1), 1.0, rtol=1e-9)


def test_a_single_choice_is_certain() -> None:
    assert (smoothed(np.zeros((4, 1)), np.array(1e-3)).tokens == 1).all()


@pytest.mark.parametrize("background", [None, 0, 2])
def test_who_is_first_equals_the_sum_over_all_paths(background: int | None) -> None:
    """Whoever stands first on a path, what it has of the background left out."""
    generator = np.random.default_rng(3)
    emissions, arrivals = generator.normal(size=(5, 3)), generator.uniform(0, 0.4, size=(5, 3))
    expected = np.zeros(3)
    for path in itertools.product(range(3), repeat=5):
        weight = math.exp(sum(emissions[position, choice] for position, choice in enumerate(path)))
        for position, (before, choice) in enumerate(itertools.pairwise(path), start=1):
            others = sum(arrivals[position, other] for other in range(3) if other != before)
            weight *= arrivals[position, choice] if choice != before else 1 - others
        first = next((choice for choice in path if choice != background), path[0])
        expected[first] += weight
    found = smoothed(emissions, arrivals, background=background)
    np.testing.assert_allclose(found.first, expected / expected.sum(), rtol=1e-10)
    np.testing.assert_array_equal(found.tokens, smoothed(emissions, arrivals).tokens)


def test_who_is_first_stays_finite_where_tokens_are_extreme() -> None:
    emissions = np.random.default_rng(4).normal(size=(3000, 4)) * 300
    first = smoothed(emissions, np.array(1e-3), background=1).first
    assert np.isfinite(first).all()
    np.testing.assert_allclose(first.sum(), 1.0, rtol=1e-9)
    hardly = smoothed(emissions, np.array(1e-9), background=1).first
    np.testing.assert_allclose(hardly.sum(), 1.0, rtol=1e-9)


def test_one_choice_is_the_first_whatever_it_is() -> None:
    assert smoothed(np.zeros((4, 1)), np.array(1e-3), background=0).first.tolist() == [1.0]
