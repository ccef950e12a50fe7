"""Prompt-gate columns for adapters that the gate was not trained with, in closed form, and the canary that judges them.

From the question tokens of an adapter's examples and the gate's statistics alone: what is needed of the embeddings,
which a server may have freed, is in those. No other newcomer enters, so that registrations commute and no trained
column changes. V: vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from server.routing.policy import BASE_ALIAS
from server.routing.prompt_gate import PromptGate
from server.routing.prompt_statistics import QuestionStatistics
from server.routing.token_features import tilted

GAIN = 0.5
"""Weight of a token's log ratio. Tokens of a question are not independent, so whole ones would be too sure."""
PRIOR_TOKENS = 1500.0
"""Tokens of questions like the examples' that their own are mixed with."""
ALIKE_SHARE = 0.05
"""Share of these that is like the examples'; the rest is ordinary, so that words that are merely like a newcomer's do
not outweigh what trained choices know, and none says much against it. The best of what was tried, as the two above: see
docs/hot-routing.md."""
MAX_LOG_RATIO = 6.0
"""Nats; no single token may say more, before the gain."""
MIN_EXAMPLES = 2
"""Fewer with a question cannot judge each other."""
MAX_OWN_LOST = 0.2
"""Canary: of its questions' tokens the gate may give at most so many to other adapters, by columns from half of its
examples, which know less than the column in use (docs/hot-routing.md has what that one loses). What it leaves to the
router or the base model is not lost: in their answers the gate row decides."""
MAX_TAKEN = 0.1
"""Canary: of the tokens of no trained choice's retained questions may the newcomer get more, as for gate rows. One
whole question of 16 is less: a single one is chance."""


@dataclass(frozen=True)
class PromptReport:
    """How a newcomer's column does in the gate, in shares from 0 to 1 of question tokens."""

    own_share: float
    """Of its examples' tokens, what the gate gives to it, by columns made without them."""
    own_lost_share: float
    """Of the same tokens, what the gate gives to other adapters. The rest is the base model's or the router's, and the
    router decides about the answer."""
    most_taken: str
    """The trained choice of whose retained questions it takes most."""
    most_taken_share: float

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the gate must not use it, with numbers; empty when it may."""
        found = []
        if self.own_lost_share > MAX_OWN_LOST:
            found.append(
                f"the prompt gate would give {100 * self.own_lost_share:.0f} % of its own examples' question tokens to "
                f"other adapters, more than {100 * MAX_OWN_LOST:.0f} % allowed"
            )
        if self.most_taken_share > MAX_TAKEN:
            found.append(
                f"it would take {100 * self.most_taken_share:.1f} % of the question tokens of {self.most_taken!r}, "
                f"more than {100 * MAX_TAKEN:.0f} % allowed"
            )
        return tuple(found)


@dataclass(frozen=True)
class PromptVerdict:
    """Whether a newcomer takes part in the prompt gate."""

    problems: tuple[str, ...]
    """Why not, with numbers; empty when it does. Then it is not routed at all: a gate that does not know it would give
    its prompts to others with confidence, and one that kept silent for it would cost every task more."""
    report: PromptReport | None = None
    """None where there was no column to judge."""

    def facts(self) -> Mapping[str, Any]:
        """JSON-able."""
        return {
            "state": "refused" if self.problems else "passed",
            "reason": "; ".join(self.problems) or None,
            **({} if self.report is None else asdict(self.report)),
        }


def make_column(
    prompts: Sequence[Sequence[int]], gate: PromptGate, names: Sequence[str]
) -> tuple[Tensor | None, PromptVerdict]:
    """The column of an adapter whose examples are these rendered chats, if the canary lets it take part.

    `names` of the gate's choices. Of a conversation every question counts, as the gate reads every one; a chat without
    a user message says nothing of questions and is left out.
    """
    if gate.statistics is None:
        problem = (
            "the router artefact has no statistics of questions; add them with `lora-mixer-train background "
            "--router DIR --data DIR`, then load the artefact again"
        )
        return None, PromptVerdict((problem,))
    examples = asked_in(prompts, gate)
    if len(examples) < MIN_EXAMPLES:
        problem = f"{len(examples)} of its examples have a question for the prompt gate; {MIN_EXAMPLES} are needed"
        return None, PromptVerdict((problem,))
    column = column_from_questions(joined(examples), gate, gate.statistics)
    report = judge_column(column, examples, gate, gate.statistics, names)
    return (None if report.problems else column), PromptVerdict(report.problems, report)


def column_from_questions(
    questions: Sequence[Sequence[int]], gate: PromptGate, statistics: QuestionStatistics
) -> Tensor:
    """(V,) float16: the newcomer's score beside the gate's own.

    If s_c were log P(token | c) up to a constant per token, log mean exp of them would be that of an ordinary question,
    and a newcomer's score that plus log P(token | newcomer) / P(token | ordinary): so it is, with the ratio damped.
    P(token | newcomer) is the examples' counts, mixed with ordinary tokens and with ones that are like theirs
    (`token_features.tilted`), if the statistics have features. A token that says nothing gets what the trained choices
    have between them. Ids beyond the table are left out.
    """
    vocabulary, num_choices = gate.scores.shape
    tokens = torch.tensor([token for question in questions for token in question], dtype=torch.int64)
    tokens = tokens[(tokens >= 0) & (tokens < vocabulary)]
    counts = torch.bincount(tokens, minlength=vocabulary).double()
    ordinary = statistics.ordinary
    likely = ordinary
    if statistics.features is not None:
        alike = tilted(ordinary, statistics.features, counts)
        likely = (1 - ALIKE_SHARE) * ordinary + ALIKE_SHARE * alike
    own = (counts + PRIOR_TOKENS * likely) / (len(tokens) + PRIOR_TOKENS)
    ratio = (own / ordinary).log().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    between = torch.logsumexp(gate.scores.double(), dim=1) - math.log(num_choices)
    return (between + GAIN * ratio).half()


def judge_column(
    column: Tensor,
    examples: Sequence[Sequence[Sequence[int]]],
    gate: PromptGate,
    statistics: QuestionStatistics,
    names: Sequence[str],
) -> PromptReport:
    """The canary: the column on retained questions, and columns from either half of its examples on the other.

    `examples` have a question or more each, and there must be at least `MIN_EXAMPLES`. `names` of the gate's choices.
    """
    base = base_place(names)
    halves = (joined(examples[0::2]), joined(examples[1::2]))
    own = [
        shares(gate, column_from_questions(halves[fitted], gate, statistics), halves[1 - fitted], base)
        for fitted in (0, 1)
    ]
    lengths = [sum(map(len, halves[1 - fitted])) for fitted in (0, 1)]
    own_share, lost = (
        sum(length * share for length, share in zip(lengths, values, strict=True)) / sum(lengths)
        for values in ([given[-1] for given in own], [lost_share(given, base) for given in own])
    )
    return PromptReport(own_share, lost, *most_taken(gate, column, statistics.questions, names))


def asked_in(prompts: Sequence[Sequence[int]], gate: PromptGate) -> list[list[Sequence[int]]]:
    """The questions of every rendered chat that has one; no empty ones."""
    asked = [
        [prompt[start:stop] for start, stop in gate.frame.user_messages(prompt) if start < stop] for prompt in prompts
    ]
    return [questions for questions in asked if questions]


def lost_share(given: Sequence[float], base: int | None) -> float:
    """Of `shares` with a newcomer's column, what other adapters get."""
    return sum(share for place, share in enumerate(given[:-1]) if place != base)


def most_taken(
    gate: PromptGate, column: Tensor, retained: Sequence[tuple[Sequence[int], int]], names: Sequence[str]
) -> tuple[str, float]:
    """The choice of whose retained questions, (token ids, choice) each, a newcomer gets most, and what share of their
    tokens; the first one and nothing where none are retained."""
    base = base_place(names)
    taken = {
        names[choice]: shares(gate, column, [tokens for tokens, label in retained if label == choice], base)[-1]
        for choice in sorted({label for _, label in retained})
    }
    most = max(taken, key=lambda name: taken[name], default=names[0])
    return most, taken.get(most, 0.0)


def base_place(names: Sequence[str]) -> int | None:
    """Where the base model is among a gate's choices; None where the router has no null expert."""
    return names.index(BASE_ALIAS) if BASE_ALIAS in names else None


def joined(examples: Sequence[Sequence[Sequence[int]]]) -> list[Sequence[int]]:
    """The questions of all."""
    return [question for questions in examples for question in questions]


def shares(
    gate: PromptGate, column: Tensor | None, questions: Sequence[Sequence[int]], base: int | None = None
) -> list[float]:
    """Of the questions' tokens, what the gate gives to each of its choices, and last to `column` if there is one.
    `base` is the base model's place among the choices."""
    columns = [*gate.scores.unbind(dim=1), *([] if column is None else [column])]
    newcomers = [] if column is None else [len(columns) - 1]
    readings = [gate.decide(question, columns, newcomers=newcomers, base=base) for question in questions]
    given = [index for reading in readings for index in reading.choices]
    return [given.count(index) / len(given) for index in range(len(columns))]
