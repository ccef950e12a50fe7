"""The prompt gate: reads each question whole before its tokens run, and gives confident stretches to one adapter.

A router that decides per token knows nothing at a prompt's beginning, which is the same for every task, and little in
its first words. But a prompt is known whole. Token scores, a linear map of the frozen token embeddings as a table
(vocabulary x choices), are the emissions of a hidden Markov chain over the choices; its smoothed posterior at a token
looks both ways, and tells where in a prompt the task changes. Where it is unsure the router decides as elsewhere.

A pure function of (prompt tokens, router, allowed choices). Letters: T tokens of the question, C choices, V vocabulary.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.routing.policy import BASE_PLAN, BASE_SLOT, ENDLESS, GatePlan, PlanSpan, Policy, fixed_plan
from server.routing.prompt_statistics import QuestionStatistics

Floats = npt.NDArray[np.float64]

READS = "every question, the answer's header, nobody's questions to the base model"
"""What a gate reads of a chat and decides; belongs to whatever its decisions are kept under."""
TIMES_CHANCE = 1.5
"""A posterior must also be so many times what it is where nothing is known. Matters in pools of two."""
NEWCOMER_CONFIDENCE = 0.7
"""Least posterior in a pool with choices that the gate was not trained with: scores from a few examples are rougher."""
NEWCOMER_ANSWERS = 0.9
"""Posterior of all tokens of a question from which a newcomer answers it alone: a gate row from a few examples is far
rougher in answers than the gate is in questions."""
MAX_NEWCOMER_SHARE = 0.1
"""Mean posterior of all newcomers up to which a question that no choice is sure of is none of theirs."""
FAINT_NEWCOMER_SHARE = 0.01
"""The same for a question that trained choices have for certain, up to which they may begin its answer."""


@dataclass(frozen=True)
class ChatFrame:
    """Where the questions stand in a rendered chat, in token ids."""

    header: tuple[int, ...]
    """What the chat template puts right before a user's words."""
    end: int
    """The first token after them."""
    answer: tuple[int, ...] = ()
    """What the template puts between them and the answer, `end` included; none in artefacts of earlier trainers."""

    def question(self, token_ids: Sequence[int]) -> tuple[int, int] | None:
        """(first token, token behind the last) of the first user message; None where there is none or it is empty."""
        found = next(self.user_messages(token_ids), None)
        return found if found is not None and found[0] < found[1] else None

    def is_answered(self, token_ids: Sequence[int], stop: int) -> bool:
        """Whether the answer's header is what follows the user message that ends at `stop`."""
        return bool(self.answer) and tuple(token_ids[stop : stop + len(self.answer)]) == self.answer

    def user_messages(self, token_ids: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(first token, token behind the last) of every user message in order, equal where it is empty."""
        width, position = len(self.header), 0
        try:
            while True:
                position = token_ids.index(self.header[0], position)
                if tuple(token_ids[position : position + width]) != self.header:
                    position += 1
                    continue
                start = position + width
                position = token_ids.index(self.end, start)
                yield start, position
        except ValueError:  # no further one, or one without an end
            return


@dataclass(frozen=True)
class PromptGateSettings:
    """How scores become choices. Chosen on training chats; see docs/prompt-gate.md."""

    switch: float = 1e-3
    """Prior probability that the next token belongs to another choice, 0 to 1."""
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

    def posterior(self, token_ids: Sequence[int], columns: Sequence[Tensor]) -> Floats:
        """(T, len(columns)): probability that each token belongs to the choice of each column (V,). Ids beyond the
        table say nothing."""
        ids = torch.tensor(token_ids)
        known = (ids < len(self.scores)) & (ids >= 0)
        ids = ids.where(known, 0)
        emissions = torch.stack([column[ids] for column in columns], dim=1).double() * known[:, None]
        return smoothed(emissions.numpy(), self.settings.switch)

    def decide(
        self,
        question: Sequence[int],
        columns: Sequence[Tensor],
        *,
        newcomers: Collection[int] = (),
        otherwise: int | None = None,
    ) -> Reading:
        """What becomes of a question. `newcomers` are columns of choices that the gate was not trained with. One of
        which nothing is sure goes to the column `otherwise`, unless it may be a newcomer's.
        """
        posterior = self.posterior(question[: self.settings.max_question_tokens], columns)
        best, is_sure = posterior.argmax(axis=1), posterior.max(axis=1) >= self._needed(len(columns), bool(newcomers))
        newcomer_share = float(posterior[:, list(newcomers)].sum(axis=1).mean())
        choices = [index if sure else None for index, sure in zip(best.tolist(), is_sure.tolist(), strict=True)]
        if otherwise is not None and not is_sure.any() and newcomer_share <= MAX_NEWCOMER_SHARE:
            choices = [otherwise] * len(choices)
        answers = next((new for new in newcomers if posterior[:, new].min() >= NEWCOMER_ANSWERS), None)
        return Reading(choices, newcomer_share, answers)

    def _needed(self, num_choices: int, with_newcomers: bool) -> float:
        """Posterior from which a token is given to one of so many choices: of two, a half is a toss-up."""
        least = NEWCOMER_CONFIDENCE if with_newcomers else 0.0
        return min(1.0, max(self.settings.confidence, TIMES_CHANCE / num_choices, least))

    def columns(self, index_of_slot: Mapping[int, int]) -> dict[int, Tensor]:
        """slot -> scores (V,) of the slots of trained choices; shares their memory."""
        return {slot: self.scores[:, index] for slot, index in index_of_slot.items()}

    @cached_property
    def fingerprint(self) -> str:
        """Everything but the scores, which belong to the adapters' rows."""
        return f"{READS}, frame={self.frame.header}{self.frame.answer or self.frame.end} {self.settings}"

    def record(self) -> dict[str, Any]:
        """For the artefact's JSON."""
        frame = {"header": list(self.frame.header), "end": self.frame.end, "answer": list(self.frame.answer)}
        return {**frame, **asdict(self.settings)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], scores: Tensor) -> "PromptGate":
        """Inverse of `record`. Raises KeyError, TypeError or ValueError for what no `record` wrote."""
        settings = dict(record)
        answer = tuple(map(int, settings.pop("answer", ())))
        frame = ChatFrame(tuple(map(int, settings.pop("header"))), int(settings.pop("end")), answer)
        if not frame.header:
            raise ValueError("the prompt gate's header has no tokens")
        if answer and answer[0] != frame.end:
            raise ValueError("the prompt gate's answer header does not begin with the end of a question")
        read = PromptGateSettings(**settings)
        if not (0 < read.switch < 1 and 0 < read.confidence <= 1):
            raise ValueError("the prompt gate's switch and confidence must lie between 0 and 1")
        limits = (read.max_opening_tokens, read.max_question_tokens)
        if not all(isinstance(limit, int) for limit in limits) or min(limits) < 0 or not read.max_question_tokens:
            raise ValueError("the prompt gate's limits must be whole numbers of tokens, and a question at least one")
        return cls(scores, frame, read)


def smoothed(emissions: Floats, switch: float) -> Floats:
    """Posterior (T, C) of a hidden Markov chain by the forward-backward algorithm (Rabiner 1989).

    emissions (T, C) in nats. The first choice is uniform; each token keeps the choice of the one before it with
    probability 1 - `switch`, and takes each other one with equal probability.
    """
    length, count = emissions.shape
    if count == 1 or length == 0:
        return np.ones((length, count))
    other = switch / (count - 1)
    keep = 1 - switch - other
    likelihood: Floats = np.exp(emissions - emissions.max(axis=1, keepdims=True))
    # Far from the best choice is as good as never; zero would divide by zero where everything is.
    likelihood = np.maximum(likelihood, 1e-30)
    posterior: Floats = np.empty_like(likelihood)
    message = np.full(count, 1 / count)
    for position in range(length):
        message = likelihood[position] * (keep * message + other)
        message /= message.sum()
        posterior[position] = message
    message = np.ones(count)
    for position in range(length - 2, -1, -1):
        message = likelihood[position + 1] * message
        message /= message.sum()
        message = keep * message + other
        posterior[position] *= message
    posterior /= posterior.sum(axis=1, keepdims=True)
    return posterior


def prompt_spans(
    gate: PromptGate,
    plan: GatePlan,
    column_of_slot: Mapping[int, Tensor],
    digest_of_slot: Mapping[int, str],
    token_ids: Sequence[int],
    *,
    newcomers: Set[int] = frozenset(),
) -> tuple[PlanSpan, ...]:
    """Which plan the tokens of a prompt follow; behind the last span all follow `plan`.

    Each question is decided by itself, so that later turns of a conversation change nothing before them. A first one
    that no choice is sure of is the base model's if it may be chosen: most such are nobody's, and an adapter finds its
    way back in the answer, which the router decides. (A later one may mean something in its conversation.) The answer's
    header follows the first stretch with an adapter: the first task is answered first; but no trained one where the
    question may be a newcomer's. A newcomer that has a question for certain answers it alone, up to the next one.

    `column_of_slot` (V,) each. None at all where an allowed choice has no scores: the gate would give that one's
    prompts to others. `newcomers`: slots that the gate was not trained with.
    """
    slots = plan.allowed_slots
    if any(slot not in column_of_slot for slot in slots):
        return ()
    columns = [column_of_slot[slot] for slot in slots]
    new_columns = [index for index, slot in enumerate(slots) if slot in newcomers]
    base_column = slots.index(BASE_SLOT) if BASE_SLOT in slots else None
    owners: list[int | None] = []
    """Slot of each token so far; None where the router decides."""
    answering: int | None = None

    def fill(stop: int, owner: int | None) -> None:
        owners.extend([owner] * (stop - len(owners)))

    for index, (start, stop) in enumerate(gate.frame.user_messages(token_ids)):
        leading = len(gate.frame.header) if index else start
        fill(start - leading, answering)
        answering = None
        if start == stop:
            continue
        otherwise = None if index else base_column
        reading = gate.decide(token_ids[start:stop], columns, newcomers=new_columns, otherwise=otherwise)
        own = [None if choice is None else slots[choice] for choice in reading.choices]
        follows = bool(index) or start <= gate.settings.max_opening_tokens
        fill(start, own[0] if follows else None)
        owners += own
        first = _first_adapter(own)
        is_safe = first in newcomers or reading.newcomer_share <= FAINT_NEWCOMER_SHARE
        if first is not None and is_safe and gate.frame.is_answered(token_ids, stop):
            fill(stop, None)
            fill(stop + len(gate.frame.answer), first)
        answering = None if reading.answers is None else slots[reading.answers]
    spans: list[PlanSpan] = []
    end = 0
    for slot, group in groupby([*owners, answering]):
        end += len(list(group))
        spans.append(PlanSpan(end, plan if slot is None else _only(slot, digest_of_slot)))
    if answering is not None:
        spans[-1] = spans[-1]._replace(stop=ENDLESS)
    while spans and spans[-1].plan is plan:
        spans.pop()
    return tuple(spans)


def _first_adapter(owners: Iterable[int | None]) -> int | None:
    """Whose answer comes first: that of the first stretch that has an adapter. The base model's may be a greeting."""
    return next((owner for owner in owners if owner is not None and owner != BASE_SLOT), None)


def _only(slot: int, digest_of_slot: Mapping[int, str]) -> GatePlan:
    if slot == BASE_SLOT:
        return BASE_PLAN
    return fixed_plan(Policy.PINNED, {slot: 1.0}, digest_of_slot)
