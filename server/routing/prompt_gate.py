"""The prompt gate: reads each question whole before its tokens run, and gives confident stretches to one adapter.

A router that decides per token knows nothing at a prompt's beginning, which is the same for every task, and little in
its first words. But a prompt is known whole. Token scores, a linear map of the frozen token embeddings as a table
(vocabulary x choices), are the emissions of a hidden Markov chain over the choices; its smoothed posterior at a token
looks both ways, and tells where in a prompt the task changes. Where it is unsure the router decides as elsewhere.

A pure function of (prompt tokens, router, allowed choices). Letters: T tokens of the question, C choices, V vocabulary.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.routing.chat_frame import ChatFrame
from server.routing.prompt_statistics import QuestionStatistics

Floats = npt.NDArray[np.float64]

READS = "every question, the answer's header and turns, nobody's questions to the base model"
"""What a gate reads of a chat and decides; belongs to whatever its decisions are kept under."""
TIMES_CHANCE = 3.0
"""The odds of a choice must also be so many times what they are where nothing is known. Matters in pools of two, and in
small ones for the base model's lead."""
NEWCOMER_CONFIDENCE = 0.7
"""Least posterior in a pool with choices that the gate was not trained with: scores from a few examples are rougher."""
NEWCOMER_ARRIVAL = 1e-6
"""Prior probability that a newcomer takes over within a line: its scores are too rough to cut into what others ask."""
NEWCOMER_ANSWERS = 0.9
"""Posterior of all tokens of a question from which a newcomer answers it alone: a gate row from a few examples is far
rougher in answers than the gate is in questions."""
MAX_NEWCOMER_SHARE = 0.1
"""Mean posterior of all newcomers up to which a question that no choice is sure of is none of theirs."""
FAINT_NEWCOMER_SHARE = 0.01
"""The same for a question that trained choices have for certain, up to which they may begin its answer."""


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


@dataclass(frozen=True)
class Reading:
    """What a gate makes of one question."""

    choices: list[int | None]
    """Which of the columns' choices each token is given to; None where the router decides. Only so many tokens as the
    settings say."""
    newcomer_share: float
    """Mean posterior of all newcomers together, whoever the question is given to."""
    answers: int | None
    """The newcomer that gets the answer too; None where the router decides."""


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
    ) -> Floats:
        """(T, len(columns)): probability that each token belongs to the choice of each column (V,). Ids beyond the
        table say nothing. `newcomers` and `base` as in `decide`."""
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
        return smoothed(emissions.numpy(), arrivals)

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
    ) -> Reading:
        """What becomes of a question. `newcomers` are columns of choices that the gate was not trained with. `base` is
        the base model's; with `base_takes_rest` it gets a question of which nothing is sure, unless that may be a
        newcomer's.
        """
        posterior = self.posterior(
            question[: self.settings.max_question_tokens], columns, newcomers=newcomers, base=base
        )
        best = posterior.argmax(axis=1)
        is_sure = posterior.max(axis=1) >= self._needed(len(columns), bool(newcomers), base)[best]
        newcomer_share = float(posterior[:, list(newcomers)].sum(axis=1).mean())
        choices = [index if sure else None for index, sure in zip(best.tolist(), is_sure.tolist(), strict=True)]
        if base_takes_rest and base is not None and not is_sure.any() and newcomer_share <= MAX_NEWCOMER_SHARE:
            choices = [base] * len(choices)
        answers = next((new for new in newcomers if posterior[:, new].min() >= NEWCOMER_ANSWERS), None)
        return Reading(choices, newcomer_share, answers)

    def _needed(self, num_choices: int, with_newcomers: bool, base: int | None) -> Floats:
        """(num_choices,): posterior from which a token is given to each: of two, a half is a toss-up."""
        weights = np.ones(num_choices)
        if base is not None:
            weights[base] = math.exp(self.settings.base_lead)
        odds = TIMES_CHANCE * weights / np.maximum(weights.sum() - weights, 1e-9)
        least = max(self.settings.confidence, NEWCOMER_CONFIDENCE if with_newcomers else 0.0)
        needed: Floats = np.maximum(least, odds / (1 + odds))
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


def smoothed(emissions: Floats, arrivals: Floats) -> Floats:
    """Posterior (T, C) of a hidden Markov chain by the forward-backward algorithm (Rabiner 1989).

    emissions (T, C) in nats; `arrivals` (T, C) or what broadcasts to it: probability that a token belongs to a choice
    if the one before it belongs to another. The first choice is uniform.
    """
    length, count = emissions.shape
    if count == 1 or length == 0:
        return np.ones((length, count))
    arrivals = np.broadcast_to(arrivals, emissions.shape)
    rest = 1 - arrivals.sum(axis=1)
    likelihood: Floats = np.exp(emissions - emissions.max(axis=1, keepdims=True))
    # Far from the best choice is as good as never; zero would divide by zero where everything is.
    likelihood = np.maximum(likelihood, 1e-30)
    posterior: Floats = np.empty_like(likelihood)
    message = likelihood[0] / likelihood[0].sum()
    posterior[0] = message
    for position in range(1, length):
        message = likelihood[position] * (rest[position] * message + arrivals[position])
        message /= message.sum()
        posterior[position] = message
    message = np.ones(count)
    for position in range(length - 1, 0, -1):
        message = likelihood[position] * message
        message /= message.sum()
        message = rest[position] * message + arrivals[position] @ message
        posterior[position - 1] *= message
    posterior /= posterior.sum(axis=1, keepdims=True)
    return posterior
