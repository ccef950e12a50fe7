"""The prompt gate: reads each question whole before its tokens run, and gives confident stretches to one adapter.

A router that decides per token knows nothing at a prompt's beginning, which is the same for every task, and little in
its first words. But a prompt is known whole. Token scores, a linear map of the frozen token embeddings as a table
(vocabulary x choices), are the emissions of a hidden Markov chain over the choices; its smoothed posterior at a token
looks both ways, and tells where in a prompt the task changes. Where it is not sure the likeliest adapters act together,
and where no choice is likely the router decides as elsewhere.

A pure function of (prompt tokens, router, allowed choices). Letters: T tokens of the question, C choices, V vocabulary.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.routing.chat_frame import ChatFrame
from server.routing.prompt_statistics import QuestionStatistics
from server.routing.task_chain import ChainPosterior, Floats, smoothed

READS = "every question, the answer's header and turns, nobody's questions to the base model, mixtures of the likely"
"""What a gate reads of a chat and decides; belongs to whatever its decisions are kept under."""
TIMES_CHANCE = 3.0
"""The odds of a choice must also be so many times what they are where nothing is known. Matters in pools of two, and in
small ones for the base model's lead."""
SURE = 0.8
"""Posterior from which a choice has a token, or an answer's header, to itself. Below it the others act too."""
WEIGHT_STEPS = 8
"""Weights of a mixture are multiples of one over so many, so that like tokens have one plan."""
NEWCOMER_CONFIDENCE = 0.7
"""Least posterior of a token that may be a newcomer's, a choice's that the gate was not trained with: scores from a few
examples are rougher."""
MAX_NEWCOMER_TOKEN_SHARE = 0.05
"""Posterior of all newcomers together up to which a token is none of theirs."""
NEWCOMER_ARRIVAL = 1e-6
"""Prior probability that a newcomer takes over within a line: its scores are too rough to cut into what others ask."""
NEWCOMER_ANSWERS = 0.9
"""Posterior of all tokens of a question from which a newcomer answers it alone: a gate row from a few examples is far
rougher in answers than the gate is in questions."""
MAX_NEWCOMER_SHARE = 0.1
"""Mean posterior of all newcomers up to which a question that no choice is sure of is none of theirs."""
MAX_NEWCOMER_FIRST = 0.02
"""Probability that the first adapter with a part of a question is a newcomer, up to which a trained one may begin the
answer to a question that is its own for certain. A newcomer's answer that another begins costs tens of nats, one that
the router begins costs a trained adapter less than one (docs/hot-routing.md)."""

MIN_NEWCOMER_PART = 0.05
"""Mean posterior of a newcomer below which it has no part in the answer to a question that is most likely nobody's. Its
gate row, of a few examples, would take some of that answer's tokens all the same."""


@dataclass(frozen=True)
class PromptGateSettings:
    """How scores become choices. Chosen on training chats; see docs/prompt-gate.md."""

    switch: float = 1e-3
    """Prior probability that the next token belongs to another choice, 0 to 1."""
    switch_at_lines: float = 0.05
    """The same of a token that begins a line: a second task seldom begins elsewhere."""
    base_lead: float = 1.0
    """Nats that the base model leads every adapter by before a question's first token: most of what people may ask is
    nobody's. None in artefacts of earlier trainers."""
    confidence: float = 0.5
    """Posterior from which a token is given to a choice, 0 to 1; below it the router decides."""
    max_opening_tokens: int = 64
    """Tokens before the first question follow its first token if they are no more than this. A longer system message
    is left to the router, so that requests of all tasks share its cached K/V."""
    max_question_tokens: int = 512
    """Tokens of each question that are read; the router has seen enough by then."""


Mixture = tuple[tuple[int, float], ...]
"""(choice, weight) of the choices that act on a token, weights that sum to one: one choice where the gate is sure."""


@dataclass(frozen=True)
class Reading:
    """What a gate makes of one question."""

    choices: list[int | None]
    """Which of the columns' choices each token is given to; None where the router decides. Only so many tokens as the
    settings say."""
    mixtures: list[Mixture]
    """What acts on each token that is given to a choice: that one, and what else the token may be of."""
    first: Mixture | None
    """The same of whoever's answer comes first, that of the first adapter with a part of the question; None where
    nothing is given for sure."""
    newcomer_first: float
    """Probability that the first adapter with a part of the question is a newcomer, whoever it is given to."""
    answers: int | None
    """The newcomer that gets the answer too; None where the router decides."""
    absent: tuple[int, ...] = ()
    """Newcomers that the router leaves out of the answer: the question is most likely nobody's, and hardly theirs."""


@dataclass(frozen=True, eq=False)
class PromptGate:
    """Scores per token id and choice, in the order of the artefact's adapters."""

    scores: Tensor
    """(V, C) float16: emissions in nats, up to a constant per token."""
    frame: ChatFrame
    settings: PromptGateSettings = PromptGateSettings()
    statistics: QuestionStatistics | None = None
    """What columns for newcomers are made of (`routing.prompt_columns`); change no gate by themselves."""
    answer_ends: tuple[int, ...] = ()
    """Of each choice, the line ends in a row that end its answers more often than they stand in them; 0 where none do.
    None in artefacts of earlier trainers."""

    def posterior(
        self,
        token_ids: Sequence[int],
        columns: Sequence[Tensor],
        *,
        newcomers: Collection[int] = (),
        base: int | None = None,
    ) -> ChainPosterior:
        """Probability that each token belongs to the choice of each column (V,), and that a choice is the first beside
        the base model. Ids beyond the table say nothing. `newcomers` and `base` as in `decide`."""
        ids = torch.tensor(token_ids)
        known = (ids < len(self.scores)) & (ids >= 0)
        ids = ids.where(known, 0)
        emissions = torch.stack([column[ids] for column in columns], dim=1).double() * known[:, None]
        if base is not None:
            emissions[0, base] += self.settings.base_lead
        begins = self.begins_line(token_ids)
        switch = np.where(begins, self.settings.switch_at_lines, self.settings.switch)
        arrivals = np.repeat(switch[:, None] / max(1, len(columns) - 1), len(columns), axis=1)
        for newcomer in newcomers:
            arrivals[~begins, newcomer] = NEWCOMER_ARRIVAL
        return smoothed(emissions.numpy(), arrivals, background=base)

    def begins_line(self, token_ids: Sequence[int]) -> npt.NDArray[np.bool_]:
        """(T,): whether each token is the first of a line, but for the first of all."""
        ends = np.array([False, *(token in self.frame.newlines for token in token_ids)])
        begins: npt.NDArray[np.bool_] = ends[:-1] & ~ends[1:]
        return begins

    def decide(
        self,
        question: Sequence[int],
        columns: Sequence[Tensor],
        *,
        newcomers: Collection[int] = (),
        base: int | None = None,
        base_takes_rest: bool = False,
        top_k: int = 2,
    ) -> Reading:
        """What becomes of a question. `newcomers` are columns of choices that the gate was not trained with. `base` is
        the base model's; with `base_takes_rest` it gets a question of which nothing is sure, unless that may be a
        newcomer's. At most `top_k` adapters act on a token.
        """
        posterior, first = self.posterior(
            question[: self.settings.max_question_tokens], columns, newcomers=newcomers, base=base
        )
        best = posterior.argmax(axis=1)
        shares_of_newcomers = posterior[:, list(newcomers)].sum(axis=1)
        least = np.where(shares_of_newcomers > MAX_NEWCOMER_TOKEN_SHARE, NEWCOMER_CONFIDENCE, 0.0)
        is_sure = posterior.max(axis=1) >= np.maximum(least, self._needed(len(columns), base)[best])
        newcomer_share = float(shares_of_newcomers.mean())
        choices = [index if sure else None for index, sure in zip(best.tolist(), is_sure.tolist(), strict=True)]
        mixtures = mixtures_of(posterior, top_k, base)
        if base_takes_rest and base is not None and not is_sure.any() and newcomer_share <= MAX_NEWCOMER_SHARE:
            choices, mixtures = [base] * len(choices), [((base, 1.0),)] * len(choices)
        begins = mixtures_of(first[None], top_k, base)[0] if is_sure.any() else None
        answers = next((new for new in newcomers if posterior[:, new].min() >= NEWCOMER_ANSWERS), None)
        is_nobodys = base is not None and int(first.argmax()) == base
        parts = posterior.mean(axis=0)
        absent = tuple(new for new in newcomers if is_nobodys and parts[new] < MIN_NEWCOMER_PART)
        newcomer_first = float(first[list(newcomers)].sum())
        return Reading(choices, mixtures, begins, newcomer_first, answers, absent)

    def _needed(self, num_choices: int, base: int | None) -> Floats:
        """(num_choices,): posterior from which a token is given to each: of two, a half is a toss-up."""
        weights = np.ones(num_choices)
        if base is not None:
            weights[base] = math.exp(self.settings.base_lead)
        odds = TIMES_CHANCE * weights / np.maximum(weights.sum() - weights, 1e-9)
        needed: Floats = np.maximum(self.settings.confidence, odds / (1 + odds))
        return needed

    def columns(self, index_of_slot: Mapping[int, int]) -> dict[int, Tensor]:
        """slot -> scores (V,) of the slots of trained choices; shares their memory."""
        return {slot: self.scores[:, index] for slot, index in index_of_slot.items()}

    def ends_of_answers(self, index_of_slot: Mapping[int, int]) -> dict[int, int]:
        """slot -> line ends in a row that end its answers, of the slots of trained choices where any do."""
        if not self.answer_ends:
            return {}
        return {slot: ends for slot, index in index_of_slot.items() if (ends := self.answer_ends[index])}

    def restricted(self, kept: Sequence[int]) -> "PromptGate":
        """A gate of these choices alone. Statistics, which knew the others, are gone."""
        ends = tuple(self.answer_ends[index] for index in kept) if self.answer_ends else ()
        return replace(self, scores=self.scores[:, list(kept)].contiguous(), statistics=None, answer_ends=ends)

    @cached_property
    def fingerprint(self) -> str:
        """Everything but the scores, which belong to the adapters' rows."""
        frame = f"{self.frame.header}{self.frame.answer or self.frame.end}"
        return f"{READS}, frame={frame} {self.frame.line_ends} {self.answer_ends} {self.settings}"

    def record(self) -> dict[str, Any]:
        """For the artefact's JSON."""
        frame = {field: list(getattr(self.frame, field)) for field in ("header", "answer", "line_ends")}
        return {**frame, "end": self.frame.end, "answer_ends": list(self.answer_ends), **asdict(self.settings)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], scores: Tensor) -> "PromptGate":
        """Inverse of `record`. Raises KeyError, TypeError or ValueError for what no `record` wrote."""
        settings = {"base_lead": 0.0, **record}
        answer = tuple(map(int, settings.pop("answer", ())))
        line_ends = tuple((int(token), int(count)) for token, count in settings.pop("line_ends", ()))
        answer_ends = tuple(map(int, settings.pop("answer_ends", ())))
        frame = ChatFrame(tuple(map(int, settings.pop("header"))), int(settings.pop("end")), answer, line_ends)
        if not frame.header:
            raise ValueError("the prompt gate's header has no tokens")
        if answer and answer[0] != frame.end:
            raise ValueError("the prompt gate's answer header does not begin with the end of a question")
        read = PromptGateSettings(**settings)
        if not (0 < read.switch < 1 and 0 < read.switch_at_lines < 1 and 0 < read.confidence <= 1):
            raise ValueError("the prompt gate's switch, switch_at_lines and confidence must lie between 0 and 1")
        if not 0 <= read.base_lead < math.inf:
            raise ValueError("the prompt gate's base_lead must be a number of nats from 0")
        if min(answer_ends, default=0) < 0:
            raise ValueError("the prompt gate's answer_ends must be counts of line ends")
        limits = (read.max_opening_tokens, read.max_question_tokens)
        if not all(isinstance(limit, int) for limit in limits) or min(limits) < 0 or not read.max_question_tokens:
            raise ValueError("the prompt gate's limits must be whole numbers of tokens, and a question at least one")
        return cls(scores, frame, read, answer_ends=answer_ends)


def mixtures_of(posterior: Floats, most: int, base: int | None = None) -> list[Mixture]:
    """Of each row (C,) of (T, C), who acts: the likeliest alone if it is sure or the base model, else the likeliest
    adapters, at most `most`, by their shares of what these have. Weights are multiples of one over `WEIGHT_STEPS`,
    rounded in favour of the likeliest, and sum to one as a router's do.

    Where most likely none is to act, faint ones only disturb (docs/prompt-gate.md has the figures).
    """
    best = posterior.argmax(axis=1)[:, None]
    is_alone = (posterior.max(axis=1, keepdims=True) >= SURE) | (best == base)
    likely = posterior.copy()
    if base is not None:
        likely[:, base] = 0.0
    np.put_along_axis(likely, np.argsort(-likely, axis=1, kind="stable")[:, most:], 0.0, axis=1)
    likely /= np.maximum(likely.sum(axis=1, keepdims=True), 1e-300)
    weights = np.where(is_alone, 0.0, np.floor(likely * WEIGHT_STEPS) / WEIGHT_STEPS)
    np.put_along_axis(weights, best, 0.0, axis=1)
    np.put_along_axis(weights, best, 1 - weights.sum(axis=1, keepdims=True), axis=1)
    changes = np.flatnonzero((weights[1:] != weights[:-1]).any(axis=1)) + 1
    mixtures: list[Mixture] = []
    for start, stop in pairwise([0, *changes.tolist(), len(weights)]):
        acting = tuple((choice, weight) for choice, weight in enumerate(weights[start].tolist()) if weight)
        mixtures += [acting] * (stop - start)
    return mixtures
