"""Task metrics: generated answers against references, one number per task. Knows no model."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from math import sqrt

from router_training.sandbox import passes_tests

NUMBER = re.compile(
    r"(?P<minus>(?<![\w)\]%])[-\u2212\u2013])?"  # behind a digit, word or bracket it subtracts or joins
    r"[$€£¥₹]?"
    r"(?P<digits>"
    # Groups of three with one kind of mark: a comma or a space, which may be a narrow or an unbreakable one.
    r"[1-9]\d{0,2}(?P<mark>[, \u00a0\u2009\u202f])\d{3}(?:(?P=mark)\d{3})*(?!\d)(?:\.\d+)?"
    r"|\d+(?:\.\d+)?"
    r"|(?<![\w.])\.\d+)"
)

OPTION = re.compile(
    r"(?:\A|\b(?i:answer|option|choice)(?:\s+is)?\b)"
    r"[\s:(\[*_`\"]*([A-H])"
    r"(?:[.:,)\]*_`\"]|\s+[-\u2013\u2014]|[^\S\n]*(?:\n|\Z))"
)
"""`B`, `B.`, `(B) water`, `**B**`, `The answer is B.`: a letter alone or set off; `A dog` begins with an article."""

FENCE = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\r?\n(.*?)(?:```|$)", re.DOTALL | re.IGNORECASE)


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


def accuracy(label: Callable[[str], object]) -> Callable[[Sequence[Answer]], float]:
    """Share of answers whose label, read by `label`, is the reference's; None, where there is none, is never right."""

    def is_right(answer: Answer) -> bool:
        found = label(answer.generated)
        return found is not None and found == label(answer.reference)

    return lambda answers: sum(map(is_right, answers)) / len(answers)


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
    """Letter of a multiple-choice answer such as `B. water`, see `OPTION`; the whole text where there is none."""
    match = OPTION.search(text)
    return str(match[1]) if match else text.strip()


def final_number(text: str) -> Decimal | None:
    """The number behind the last `####`, as GSM8K has it; the last number of a text without such a mark."""
    _, mark, rest = text.rpartition("####")
    numbers = list(NUMBER.finditer(rest))
    if not numbers:
        return None
    number = numbers[0 if mark else -1]
    size = Decimal(re.sub(r"[^\d.]", "", number["digits"]))
    return -size if number["minus"] else size


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
    "gsm8k": Metric("final number", accuracy(final_number)),
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
