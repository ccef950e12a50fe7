"""Task metrics on answers whose score is known, Matthews correlation against numpy's correlation."""

import numpy as np
import pytest

from router_training.metrics import METRICS, Answer, metric_of


def score(task: str, *pairs: tuple[str, str]) -> float:
    return metric_of(task).compute([Answer(generated, reference) for generated, reference in pairs])


def test_labels_are_read_from_the_beginning_of_the_answer() -> None:
    assert score("sst2", ("Positive.", "positive"), ("negative", "positive"), ("", "positive")) == pytest.approx(1 / 3)
    assert score("arc", ("B. water", "B. water vapour"), ("A", "B. water")) == 0.5
    assert score("pubmedqa", ("yes, because", "yes. A reason"), ("no", "maybe")) == 0.5


def test_matthews_correlation_is_the_correlation_of_the_two_labellings() -> None:
    generator = np.random.default_rng(0)
    said, true = generator.integers(0, 2, 50), generator.integers(0, 2, 50)
    names = ["unacceptable", "acceptable"]
    pairs = [(names[a], names[b]) for a, b in zip(said, true, strict=True)]
    assert score("cola", *pairs) == pytest.approx(float(np.corrcoef(said, true)[0, 1]))
    assert score("cola", *[("acceptable", name) for name in names]) == 0.0
    assert score("cola", *[(name, name) for name in names]) == 1.0


@pytest.mark.parametrize(
    ("generated", "is_right"),
    [
        ("so 1,000 + 234\n#### 1,234", True),
        ("the answer is 1234.", True),
        ("#### 1234.00", True),
        ("#### 1234 apples of 5", False),
        ("#### 123", False),
        ("I do not know", False),
    ],
)
def test_the_final_number_counts(generated: str, is_right: bool) -> None:
    assert score("gsm8k", (generated, "steps with 7\n#### 1234")) == is_right


def test_json_is_compared_by_content_and_sql_by_words() -> None:
    assert score("snips", ('{"b": 1, "a": {"c": "x"}}', '{"a": {"c": "x"}, "b": 1}')) == 1.0
    assert score("snips", ('{"b": 2}', '{"b": 1}'), ("{broken", '{"b": 1}')) == 0.0
    assert score("snips", ("[" * 100_000, '{"b": 1}'), ('{"a": ' * 100_000, '{"b": 1}')) == 0.0
    assert score("wikisql", ("SELECT  a\nFROM t", "SELECT a FROM t"), ("SELECT b", "SELECT a")) == 0.5


def test_programs_are_run() -> None:
    tests = ("assert twice(2) == 4",)
    answers = [
        Answer("```python\ndef twice(x):\n    return 2 * x\n```", "", tests),
        Answer("def twice(x):\n    return 3 * x", "", tests),
        Answer("def twice(x):\n    return 2 * x", "", ()),
    ]
    assert METRICS["mbpp"].compute(answers) == pytest.approx(1 / 3)


def test_a_task_nobody_knows_is_scored_by_exact_match() -> None:
    assert metric_of("poetry").name == "exact match"
    assert score("poetry", ("a b", "a  b"), ("a", "b")) == 0.5
