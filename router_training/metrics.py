"""Task metrics: generated answers against references, one number per task. Knows no model."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

from router_training.sandbox import passes_tests

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
FENCE = re.compile(r"```(?:python)?\n(.*?)(?:```|$)", re.DOTALL)


@dataclass(frozen=True)
class Answer:
    """One generated answer and what it is held to."""

    generated: str
    reference: str
    tests: tuple[str, ...] = ()
    """Assertions that a generated program must pass."""


@dataclass(frozen=True)
class Metric:
    """A named measure over all answers of a task; higher is better."""

    name: str
    compute: Callable[[Sequence[Answer]], float]


def accuracy(label: Callable[[str], str]) -> Callable[[Sequence[Answer]], float]:
    """Share of answers whose label, read by `label`, is the reference's."""
    return lambda answers: sum(label(a.generated) == label(a.reference) for a in answers) / len(answers)


def matthews(positive: str) -> Callable[[Sequence[Answer]], float]:
    """Matthews correlation of the first word being `positive`; 0 where one side never varies."""

    def compute(answers: Sequence[Answer]) -> float:
        pairs = [(first_word(a.generated) == positive, first_word(a.reference) == positive) for a in answers]
        tp, fp = pairs.count((True, True)), pairs.count((True, False))
        fn, tn = pairs.count((False, True)), pairs.count((False, False))
        scale = sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        return (tp * tn - fp * fn) / scale if scale else 0.0

    return compute


def pass_at_1(answers: Sequence[Answer]) -> float:
    """Share of generated programs that pass their tests in the sandbox."""
    return sum(bool(a.tests) and passes_tests(program_of(a.generated), a.tests) for a in answers) / len(answers)


def first_word(text: str) -> str:
    """Lower-case letters of the first word."""
    words = text.split()
    return re.sub(r"\W", "", words[0]).lower() if words else ""


def option_letter(text: str) -> str:
    """Capital letter of a multiple-choice answer such as `B. water`; the whole text where there is none."""
    match = re.match(r"\s*([A-H])\b", text)
    return str(match[1]) if match else text.strip()


def last_number(text: str) -> str:
    """The final number, behind `####` if there is such a mark, without thousands separators and trailing zeros."""
    numbers = NUMBER.findall(text.rpartition("####")[2] if "####" in text else text)
    if not numbers:
        return ""
    number = str(numbers[-1]).replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def words(text: str) -> str:
    """The text with white space normalised."""
    return " ".join(text.split())


def structure(text: str) -> str:
    """JSON with sorted keys, so that only content counts; other text as `words`."""
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except (ValueError, RecursionError):  # RecursionError: a model that repeats an opening bracket
        return words(text)


def program_of(text: str) -> str:
    """The code of an answer: inside its fence if it has one."""
    match = FENCE.search(text)
    return str(match[1]) if match else text


METRICS: Mapping[str, Metric] = {
    "gsm8k": Metric("final number", accuracy(last_number)),
    "mbpp": Metric("pass@1", pass_at_1),
    "sst2": Metric("accuracy", accuracy(first_word)),
    "cola": Metric("Matthews correlation", matthews("acceptable")),
    "wikisql": Metric("exact match", accuracy(words)),
    "snips": Metric("exact match", accuracy(structure)),
    "pubmedqa": Metric("accuracy", accuracy(first_word)),
    "arc": Metric("accuracy", accuracy(option_letter)),
}
"""By the name of the task's folder."""

DEFAULT_METRIC = Metric("exact match", accuracy(words))
"""Of tasks that are not in `METRICS`."""


def metric_of(task: str) -> Metric:
    """The metric of a task."""
    return METRICS.get(task, DEFAULT_METRIC)
