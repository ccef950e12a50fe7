"""Fits the prompt gate: token scores linear in the frozen token embeddings, trained through the chain that reads them.

The loss is the negative log posterior of each question token's own choice, so that scores are as sure as they deserve
to be, whatever the number of tokens. Letters: V vocabulary, S questions, L padded length, C choices, d embedding width.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from router_training.answer_ends import answer_ends
from router_training.chain_loss import Question, SwitchTable, question_loss
from router_training.encoding import TokenSequence
from router_training.frames import chat_frame
from router_training.mixing import QUESTION_MIXES, Mix, encode_mix, question_settings
from router_training.progress import Progress
from router_training.roster import BASE_TASK, FIRST_SLOT, Roster
from router_training.settings import TrainingConfig
from router_training.trainer import Guide
from server.errors import ConfigError
from server.model.loader import LoadedModel
from server.routing.chat_frame import ChatFrame
from server.routing.plan_course import PlanSpan
from server.routing.policy import BASE_SLOT, GatePlan, Policy
from server.routing.prompt_course import prompt_course
from server.routing.prompt_gate import READS, PromptGate, PromptGateSettings
from server.routing.prompt_statistics import QuestionStatistics, summarise_questions

EPOCHS = 7
MIN_STEPS = 600
"""Of a fit, whatever the number of questions: after fewer no score is sure, and every question is the base model's
(docs/prompt-gate.md)."""
BATCH_SIZE = 72
"""Questions per step, as many of each choice as of each other, and of questions that join two as of one choice."""
LONGEST = 96
"""Tokens of a question per step: longer ones give their beginning or a stretch from anywhere."""
LEARNING_RATE = 2e-3
"""Falls to zero over the steps: what the last few batches were matters less."""
PENALTY = 1e-4
"""L2 penalty on the rows."""
DROPOUT = 0.3
"""Of the tokens of a question, at each step others, so many say nothing: a strange phrasing lacks the words that alone
would do in a known one."""
SHRINK = 0.66
"""Times the fitted scores. The chain that fits them knows its own phrasings; new ones bear out less than those promise.
All these and the chain's settings: best of a few tried, see docs/prompt-gate.md."""
UNGUIDED_EVERY = 4
"""One chat in so many is trained without the gate, so that the router also learns to find its way alone."""

_CONSTANTS = (QUESTION_MIXES, EPOCHS, BATCH_SIZE, LONGEST, LEARNING_RATE, PENALTY, DROPOUT, SHRINK, UNGUIDED_EVERY)
RECIPE = " ".join(map(str, (*_CONSTANTS, PromptGateSettings(), READS)))
"""All that a fit depends on beside questions, seed and, where they are few, `MIN_STEPS`."""


def recipe(num_questions: int) -> str:
    """Of a fit of so many questions; belongs to whatever is kept of training with a prompt gate."""
    return f"{RECIPE} {MIN_STEPS}" if num_steps(num_questions) == MIN_STEPS else RECIPE


def fit_prompt_gate(
    embeddings: Tensor,
    draws: Sequence[Sequence[TokenSequence]],
    frame: ChatFrame,
    *,
    first_slot: int,
    names: Sequence[str],
    seed: int,
    settings: PromptGateSettings = PromptGateSettings(),  # noqa: B008  frozen
    on_step: Callable[[int], None] = lambda _: None,
) -> PromptGate:
    """The mean of a gate from the first questions of each draw, with statistics of those of the first draw.
    `embeddings` (V, d); column c is slot `first_slot` + c, of the choice `names[c]`.

    `on_step` hears of every step, which all fits take side by side. Deterministic in the seed. Raises ConfigError where
    a draw has no question of a choice.
    """
    features = normalised(embeddings)
    questions = [_questions(frame, sequences, first_slot) for sequences in draws]
    asked = [{column for _, own in draw for column in own.tolist()} for draw in questions]
    if silent := sorted(set(range(len(names))).difference(set[int].intersection(*asked) if asked else ())):
        listed = ", ".join(names[column] for column in silent)
        raise ConfigError(f"the training chats of {listed} have no first question for a prompt gate; train without it")
    rows = torch.zeros(len(draws), len(names), features.shape[1], requires_grad=True)
    optimiser = torch.optim.Adam([rows], lr=LEARNING_RATE, betas=(0.9, 0.99))
    steps = num_steps(max(map(len, questions)))
    switches = SwitchTable(frame, settings, len(features))
    batches = zip(
        *(balanced_batches(own, steps, seed * len(draws) + fit) for fit, own in enumerate(questions)), strict=True
    )
    dropping = torch.Generator().manual_seed(seed)
    for step, batch in enumerate(batches):
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
        loss = question_loss(features, rows, batch, switches, dropout=DROPOUT, generator=dropping)
        loss = loss + PENALTY * rows.square().sum()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        on_step(step)
    with torch.no_grad():
        scores = F.linear(features, rows.mean(dim=0)) * SHRINK
        scores -= scores.mean(dim=1, keepdim=True)  # a constant per token changes nothing and would cost bits
    ends = answer_ends(frame, draws[0], first_slot=first_slot, num_choices=len(names))
    return PromptGate(scores.half(), frame, settings, _statistics(questions[0], features, len(names)), ends)


def num_steps(num_questions: int) -> int:
    """Of a fit."""
    return max(MIN_STEPS, math.ceil(EPOCHS * num_questions / BATCH_SIZE))


def balanced_batches(questions: Sequence[Question], steps: int, seed: int) -> Iterator[list[Question]]:
    """`steps` batches in which every choice, and questions of more than one, take turns, each question once before any
    twice; long ones are cut to a stretch of `LONGEST` tokens. Deterministic in the seed."""
    groups: dict[int, list[Question]] = {}
    for question in questions:
        own = question[1]
        groups.setdefault(int(own[0]) if (own == own[0]).all() else -1, []).append(question)
    generator = random.Random(f"prompt gate {seed}")
    decks: dict[int, list[Question]] = {group: [] for group in sorted(groups)}
    turns = cycle(decks)
    for _ in range(steps):
        batch = []
        for group in islice(turns, BATCH_SIZE):
            if not decks[group]:
                decks[group] = generator.sample(groups[group], len(groups[group]))
            batch.append(_stretch(decks[group].pop(), generator))
        yield batch


def _stretch(question: Question, generator: random.Random) -> Question:
    tokens, own = question
    spare = len(tokens) - LONGEST
    if spare <= 0:
        return question
    # The beginning half of the time: there, and often only there, stands what is asked.
    start = 0 if generator.random() < 0.5 else generator.randint(0, spare)
    return tokens[start : start + LONGEST], own[start : start + LONGEST]


def normalised(embeddings: Tensor) -> Tensor:
    """(V, d) float32 of root mean square 1, as the first layer's norm makes them up to its own scale."""
    values = embeddings.detach().float()
    return values * torch.rsqrt(values.square().mean(dim=1, keepdim=True) + 1e-5)


class PromptReader:
    """A prompt gate over one roster: the spans of training sequences, each read once."""

    def __init__(self, gate: PromptGate, roster: Roster, *, top_k: int, unguided: Iterable[TokenSequence] = ()) -> None:
        """Of `unguided` sequences the gate says nothing. A column more than adapters is the null expert's."""
        first_slot = BASE_SLOT if gate.scores.shape[1] > len(roster.adapters) else FIRST_SLOT
        self._gate = gate
        index_of_slot = {slot: slot - first_slot for slot in range(first_slot, len(roster.tasks))}
        self._columns = gate.columns(index_of_slot)
        self._answer_ends = gate.ends_of_answers(index_of_slot)
        self._digests = roster.digest_of_slot
        self._num_slots = roster.routed.num_slots
        self._known: dict[tuple[int, ...], tuple[PlanSpan, ...]] = {s.token_ids: () for s in unguided}
        self._plan = GatePlan(Policy.ROUTED, b"", allowed_slots=tuple(self._columns), top_k=top_k)

    def fixed_gates(self, sequences: Sequence[TokenSequence], length: int) -> tuple[Tensor, Tensor]:
        """Gates (T, E) float32 of the sequences padded to `length`, and (T,) bool where they hold."""
        gates = torch.zeros(len(sequences), length, self._num_slots)
        decides = torch.zeros(len(sequences), length, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            start = 0
            for stop, plan in self._spans(sequence):
                if plan is not self._plan:
                    decides[row, start:stop] = True
                    for slot, weight in plan.weights:
                        gates[row, start:stop, slot] = weight
                start = stop
        return gates.flatten(0, 1), decides.flatten()

    def _spans(self, sequence: TokenSequence) -> tuple[PlanSpan, ...]:
        tokens = sequence.token_ids
        if tokens not in self._known:
            self._known[tokens] = prompt_course(
                self._gate, self._plan, self._columns, self._digests, tokens, answer_ends=self._answer_ends
            ).spans
        return self._known[tokens]


def train_prompt_gate(
    loaded: LoadedModel, label_of_task: Mapping[str, int], mixes: Sequence[Mix], settings: TrainingConfig
) -> PromptGate | None:
    """The gate of a training run over its `mixing.draw_question_mixes`, with a progress display; None without any.

    It takes some minutes, so a run that goes on makes it again, with the same result, and no checkpoint keeps it.
    """
    if not mixes:
        return None
    model: Any = loaded.model
    in_order = sorted(label_of_task, key=lambda task: label_of_task[task])
    names = [task for task in in_order if settings.null_expert or task != BASE_TASK]
    whole = question_settings(settings)
    draws = [encode_mix(mix, label_of_task, loaded.tokenizer, loaded.eos_token_ids, whole) for mix in mixes]
    with Progress("prompt gate", total=num_steps(max(map(len, draws))), unit="step") as progress:
        return fit_prompt_gate(
            model.get_input_embeddings().weight,
            draws,
            chat_frame(loaded.tokenizer),
            first_slot=BASE_SLOT if settings.null_expert else FIRST_SLOT,
            names=names,
            seed=settings.seed,
            on_step=lambda _: progress.advance(1),
        )


def guide_of(
    gate: PromptGate | None, roster: Roster, sequences: Sequence[TokenSequence], *, top_k: int
) -> Guide | None:
    """What a trainer of these sequences is guided by: the gate, but for one chat in `UNGUIDED_EVERY`."""
    if gate is None:
        return None
    unguided = sequences[UNGUIDED_EVERY - 1 :: UNGUIDED_EVERY]
    return PromptReader(gate, roster, top_k=top_k, unguided=unguided).fixed_gates


def _statistics(questions: Sequence[Question], features: Tensor, num_choices: int) -> QuestionStatistics | None:
    """Of the questions that belong to one choice from end to end."""
    whole = [(tokens.tolist(), int(own[0])) for tokens, own in questions if (own == own[0]).all()]
    return summarise_questions(whole, features, num_choices) if whole else None


def _questions(frame: ChatFrame, sequences: Sequence[TokenSequence], first_slot: int) -> list[Question]:
    return [found for sequence in sequences if (found := _question(frame, sequence, first_slot)) is not None]


def _question(frame: ChatFrame, sequence: TokenSequence, first_slot: int) -> Question | None:
    found = frame.question(sequence.token_ids)
    if found is None:
        return None
    start, stop = found
    labels = torch.full((len(sequence),), sequence.label)
    for position, label in sequence.label_changes:
        labels[position:] = label
    return torch.tensor(sequence.token_ids[start:stop]), labels[start:stop] - first_slot
