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
from router_training.encoding import TokenSequence
from router_training.frames import chat_frame
from router_training.mixing import Mix, encode_mix, question_settings
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
BATCH_SIZE = 72
"""Questions per step, as many of each choice as of each other, and of questions that join two as of one choice."""
LONGEST = 96
"""Tokens of a question per step: longer ones give their beginning or a stretch from anywhere."""
LEARNING_RATE = 2e-3
"""Falls to zero over the steps: what the last few batches were matters less."""
PENALTY = 1e-4
"""L2 penalty on the rows."""
SHRINK = 0.6
"""Times the fitted scores. The chain that fits them knows its own phrasings; new ones bear out less than those promise.
All these and the chain's settings: best of a few tried, see docs/prompt-gate.md."""
UNGUIDED_EVERY = 4
"""One chat in so many is trained without the gate, so that the router also learns to find its way alone."""

RECIPE = " ".join(
    map(str, (EPOCHS, BATCH_SIZE, LONGEST, LEARNING_RATE, PENALTY, SHRINK, UNGUIDED_EVERY, PromptGateSettings(), READS))
)
"""All that a fit depends on beside questions and seed; belongs to whatever is kept of training with a prompt gate."""

Question = tuple[Tensor, Tensor]
"""Token ids and labels, both (L,) int64, of a first question."""


def fit_prompt_gate(
    embeddings: Tensor,
    sequences: Sequence[TokenSequence],
    frame: ChatFrame,
    *,
    first_slot: int,
    num_choices: int,
    seed: int,
    settings: PromptGateSettings = PromptGateSettings(),  # noqa: B008  frozen
    on_step: Callable[[int], None] = lambda _: None,
) -> PromptGate:
    """A gate from the first questions of the sequences, with statistics of them. `embeddings` (V, d); column c is slot
    `first_slot` + c.

    `on_step` hears of every step. Deterministic in the seed.
    """
    features = normalised(embeddings)
    questions = [found for sequence in sequences if (found := _question(frame, sequence, first_slot)) is not None]
    if not questions:
        raise ConfigError("the prompt gate found no first question in the training chats; train without it")
    rows = torch.zeros(num_choices, features.shape[1], requires_grad=True)
    optimiser = torch.optim.Adam([rows], lr=LEARNING_RATE, betas=(0.9, 0.99))
    steps = num_steps(len(questions))
    switches = SwitchTable(frame, settings, len(features))
    for step, batch in enumerate(balanced_batches(questions, steps, seed)):
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
        loss = question_loss(features, rows, batch, switches) + PENALTY * rows.square().sum()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        on_step(step)
    with torch.no_grad():
        scores = F.linear(features, rows) * SHRINK
        scores -= scores.mean(dim=1, keepdim=True)  # a constant per token changes nothing and would cost bits
    ends = answer_ends(frame, sequences, first_slot=first_slot, num_choices=num_choices)
    return PromptGate(scores.half(), frame, settings, _statistics(questions, *scores.shape), ends)


def num_steps(num_questions: int) -> int:
    """Of a fit."""
    return math.ceil(EPOCHS * num_questions / BATCH_SIZE)


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


class SwitchTable:
    """For batches the probabilities to change of `PromptGate.posterior`, whose chain is held to this one by a test."""

    def __init__(self, frame: ChatFrame, settings: PromptGateSettings, vocabulary: int) -> None:
        self._ends_line = torch.zeros(vocabulary, dtype=torch.bool)
        self._ends_line[[token for token in frame.newlines if token < vocabulary]] = True
        self._settings = settings

    def of(self, ids: Tensor) -> Tensor:
        """(S, L) float32 for token ids (S, L)."""
        ends = self._ends_line[ids]
        begins = F.pad(ends[:, :-1], (1, 0)) & ~ends
        return torch.where(begins, self._settings.switch_at_lines, self._settings.switch)


def question_loss(features: Tensor, rows: Tensor, batch: Sequence[Question], switches: SwitchTable) -> Tensor:
    """Mean over questions of the mean over their tokens of -log posterior of the token's own choice, a scalar."""
    longest = max(len(tokens) for tokens, _ in batch)
    ids = torch.stack([F.pad(tokens, (0, longest - len(tokens))) for tokens, _ in batch])  # (S, L)
    labels = torch.stack([F.pad(own, (0, longest - len(own))) for _, own in batch])
    lengths = torch.tensor([len(tokens) for tokens, _ in batch])
    is_real = torch.arange(longest)[None] < lengths[:, None]
    posterior = log_posterior(F.linear(features[ids], rows) * is_real[:, :, None], switches.of(ids))
    own = posterior.gather(2, labels[:, :, None])[:, :, 0]
    return -(own * is_real / lengths[:, None]).sum() / len(batch)


def log_posterior(emissions: Tensor, switches: Tensor) -> Tensor:
    """As `task_chain.smoothed` for a batch (S, L, C) with `switches` (S, L), in logarithms and differentiable: the
    same chain, held to it by a test. Padding at the end must have zero emissions: it says nothing."""
    length, count = emissions.shape[1:]
    stays = torch.eye(count, dtype=torch.bool)
    keep, other = torch.log1p(-switches), torch.log(switches / max(1, count - 1))
    transitions = [
        torch.where(stays, keep[:, position, None, None], other[:, position, None, None]) for position in range(length)
    ]
    forward, backward = [emissions[:, 0]], [torch.zeros_like(emissions[:, 0])]
    for position in range(1, length):
        message = torch.logsumexp(forward[-1][:, :, None] + transitions[position], dim=1)
        forward.append(message + emissions[:, position])
    for position in range(length - 1, 0, -1):
        message = backward[-1] + emissions[:, position]
        backward.append(torch.logsumexp(message[:, None, :] + transitions[position], dim=2))
    return torch.log_softmax(torch.stack(forward, dim=1) + torch.stack(backward[::-1], dim=1), dim=2)


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
    loaded: LoadedModel, label_of_task: Mapping[str, int], mix: Mix | None, settings: TrainingConfig
) -> PromptGate | None:
    """The gate of a training run over its `mixing.draw_question_mix`, with a progress display; None without a mix.

    It takes a minute, so a run that goes on makes it again, with the same result, and no checkpoint keeps it.
    """
    if mix is None:
        return None
    model: Any = loaded.model
    num_adapters = len(label_of_task) - (BASE_TASK in label_of_task)
    whole = question_settings(settings)
    sequences = encode_mix(mix, label_of_task, loaded.tokenizer, loaded.eos_token_ids, whole)
    with Progress("prompt gate", total=num_steps(len(sequences)), unit="step") as progress:
        return fit_prompt_gate(
            model.get_input_embeddings().weight,
            sequences,
            chat_frame(loaded.tokenizer),
            first_slot=BASE_SLOT if settings.null_expert else FIRST_SLOT,
            num_choices=num_adapters + settings.null_expert,
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


def _statistics(questions: Sequence[Question], vocabulary: int, num_choices: int) -> QuestionStatistics | None:
    """Of the questions that belong to one choice from end to end."""
    whole = [(tokens.tolist(), int(own[0])) for tokens, own in questions if (own == own[0]).all()]
    return summarise_questions(whole, vocabulary, num_choices) if whole else None


def _question(frame: ChatFrame, sequence: TokenSequence, first_slot: int) -> Question | None:
    found = frame.question(sequence.token_ids)
    if found is None:
        return None
    start, stop = found
    labels = torch.full((len(sequence),), sequence.label)
    for position, label in sequence.label_changes:
        labels[position:] = label
    return torch.tensor(sequence.token_ids[start:stop]), labels[start:stop] - first_slot
