"""Task metrics on answers whose score is known, Matthews correlation against numpy's correlation."""

from decimal import Decimal

import numpy as np
import pytest

from router_training.metrics import METRICS, Answer, final_number, metric_of, option_letter, program_of


def score(task: str, *pairs: tuple[str, str]) -> float:
    return metric_of(task).compute([Answer(generated, reference) for generated, reference in pairs])


def test_labels_are_read_from_the_beginning_of_the_answer() -> None:
    assert score("sst2", ("Positive.", "positive"), ("negative", "positive"), ("", "positive")) == pytest.approx(1 / 3)
    assert score("arc", ("B. water", "B. water vapour"), ("A", "B. water")) == 0.5
    assert score("pubmedqa", ("yes, because", "yes. A reason"), ("no", "maybe")) == 0.5


@pytest.mark.parametrize(
    "text",
    [
        *[
            "B",
            "B.",
            "B) water",
            "(B) water",
            "[B]",
            "**B**",
            "**B.** water",
            "B: water",
            "B - water",
            "B\nbecause",
            '"B"',
        ],
        *["The answer is B.", "the correct answer is: **B**", "Answer: B", "**Answer:** (B) water", "Option B: water"],
        *["Roots drink.\nThe answer is option B, since", "Option A is wrong.\nAnswer:\nB", "The correct choice is B"],
    ],
)
def test_an_option_is_read_in_every_form(text: str) -> None:
    assert option_letter(text) == "B"


@pytest.mark.parametrize("text", ["A dog", "A man, a plan", "DNA.", "The answer is A dog", "water", "answer", ""])
def test_an_article_and_other_words_are_no_option(text: str) -> None:
    assert option_letter(text) == text
    assert option_letter(f"The answer is C. {text}") == "C"


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
        ("#### 1234 apples of 5", True),
        ("#### 5 of 1234", False),
        ("#### 123", False),
        ("the answer is 1234\n####", False),
        ("I do not know", False),
        ("####", False),
        ("", False),
    ],
)
def test_the_number_behind_the_mark_counts_and_else_the_last_one(generated: str, is_right: bool) -> None:
    assert score("gsm8k", (generated, "steps with 7\n#### 1234")) == is_right


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *[("007", "7"), ("-0", "0"), ("7.50", "7.5"), (".5", "0.5"), ("-.5", "-0.5"), ("costs $.5", "0.5")],
        *[("$18", "18"), ("€18.", "18"), ("18 %", "18"), ("18%.", "18"), ("**18**", "18"), ("\\boxed{18}", "18")],
        *[("-$5", "-5"), ("$-5", "-5"), ("(-5)", "-5"), ("\u22125", "-5"), ("x=-5", "-5"), ("\u0663", "3")],
        *[("10-5", "5"), ("10\u22125", "5"), ("10 - 5", "5"), ("(1)-5", "5"), ("50%-5", "5"), ("COVID-19", "19")],
        *[("5\u201310", "10"), ("- 5 apples", "5"), ("10 = -5", "-5"), ("10--5", "-5")],
        *[("1,234,567.5", "1234567.5"), ("-1,234", "-1234"), ("1 234", "1234"), ("1\u202f234\u202f567", "1234567")],
        *[
            ("1, 234", "234"),
            ("1,2,3", "3"),
            ("12,34", "34"),
            ("1,2345", "2345"),
            ("2023 100", "100"),
            ("0 500", "500"),
        ],
        *[("v1.2.3", "3"), ("wait...5", "5"), ("No.5", "5"), ("1" * 5000, "1" * 5000)],
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, number: str) -> None:
    assert final_number(text) == Decimal(number)


def test_no_number_is_never_right_even_where_the_reference_has_none() -> None:
    assert score("gsm8k", ("", "none"), ("who knows", "who knows")) == 0.0
    assert score("gsm8k", ("0", "-0.0")) == 1.0


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


@pytest.mark.parametrize("fence", ["```", "```py", "```Python", "```python3", "``` python "])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_program_is_read_from_any_python_fence(fence: str, newline: str) -> None:
    text = newline.join(["Here it is:", fence, "def twice(x):", "    return 2 * x", "```", "It doubles."])
    assert program_of(text).split() == ["def", "twice(x):", "return", "2", "*", "x"]
    compile(program_of(text), "<program>", "exec")


def test_a_task_nobody_knows_is_scored_by_exact_match() -> None:
    assert metric_of("poetry").name == "exact match"
    assert score("poetry", ("a b", "a  b"), ("a", "b")) == 0.5
