"""Chats to token sequences with an answer mask, and sequences to padded batches. Knows no model.

Letters: S sequences, L padded length, T = S * L token positions.
"""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from router_training.data import Chat, TrainingDataError
from server.errors import InvalidRequestError

IGNORED = -100
"""Target of a position whose prediction does not count (torch's `cross_entropy` convention)."""


class ChatRenderer(Protocol):
    """What encoding needs of `server.model.tokenizer.ChatTokenizer`."""

    def render_chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class TokenSequence:
    """One rendered chat. The answer is everything from `answer_start` on, its end-of-turn token included."""

    token_ids: tuple[int, ...]
    answer_start: int
    label: int
    """Slot of its adapter, 0 for the base model."""
    label_changes: tuple[tuple[int, int], ...] = ()
    """(position, label) in order: from there on the tokens belong to another adapter. Composite chats have some."""
    unscored: tuple[int, ...] = ()
    """Token positions from `answer_start` on that are nobody's answer: separators, later questions."""

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_answer_tokens(self) -> int:
        return len(self.token_ids) - self.answer_start - len(self.unscored)

    @property
    def answer_labels(self) -> list[int]:
        """Label of each answer token that counts: that of the position which predicts it."""
        labels, changes = [self.label] * len(self), [*self.label_changes, (len(self), self.label)]
        for (start, label), (stop, _) in itertools.pairwise(changes):
            labels[start:stop] = [label] * (stop - start)
        tokens = range(self.answer_start, len(self))
        return [labels[token - 1] for token in tokens if token not in self.unscored]


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Sequences padded on the right. Causal attention keeps padding from reaching real tokens, so no mask is needed."""

    token_ids: Tensor
    """(S, L) int64."""
    targets: Tensor
    """(S, L) int64: the next token where it belongs to the answer, else `IGNORED`."""
    lengths: Tensor
    """(S,) int64."""
    labels: Tensor
    """(S, L) int64: slot that each position belongs to."""

    @property
    def answer_positions(self) -> Tensor:
        """(T,) bool: positions that predict an answer token, from the last prompt token on."""
        return (self.targets != IGNORED).flatten()

    @property
    def token_labels(self) -> Tensor:
        """(T,) int64: slot that each position belongs to."""
        return self.labels.flatten()


def encode_chats(
    chats: Sequence[Chat],
    label_of_task: Mapping[str, int],
    tokenizer: ChatRenderer,
    eos_token_ids: Collection[int],
    *,
    max_length: int | None = None,
    too_long: Literal["refuse", "cut"] = "cut",
) -> list[TokenSequence]:
    """Render with the model's chat template, exactly as a request is; the answer ends with its end-of-turn token.

    Raises TrainingDataError naming every chat whose answer the template does not put right behind the prompt and,
    where `too_long` is `refuse`, every chat of more than `max_length` tokens, and every chat that the template refuses.
    """
    sequences, problems = [], []
    for chat in chats:
        messages = [dict(message) for message in chat.messages]
        try:
            prompt = tokenizer.render_chat(messages[:-1], add_generation_prompt=True)
            whole = tokenizer.render_chat(messages, add_generation_prompt=False)
        except InvalidRequestError as error:
            problems.append(f"{chat.origin}: {error.message}")
            continue
        if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
            problems.append(f"{chat.origin}: the rendered chat does not begin with its rendered prompt")
            continue
        answer = up_to_last(whole[len(prompt) :], eos_token_ids)
        if max_length is not None and too_long == "refuse" and len(prompt) + len(answer) > max_length:
            problems.append(
                f"{chat.origin}: {len(prompt) + len(answer)} tokens, and the longest allowed is {max_length}"
            )
            continue
        prompt, answer = truncate(prompt, answer, max_length)
        sequences.append(TokenSequence((*prompt, *answer), len(prompt), label_of_task[chat.task]))
    if problems:
        raise TrainingDataError(problems)
    return sequences


def truncate(prompt: list[int], answer: list[int], max_length: int | None) -> tuple[list[int], list[int]]:
    """Cut to `max_length` tokens: the answer loses its end, but keeps at least half of the length if it needs it;
    then the prompt loses its middle, so that the template's beginning and the generation prompt stay."""
    if max_length is None or len(prompt) + len(answer) <= max_length:
        return prompt, answer
    answer = answer[: max(max_length // 2, max_length - len(prompt))]
    kept = max_length - len(answer)
    if len(prompt) > kept:
        head = kept // 2
        prompt = prompt[:head] + prompt[len(prompt) - (kept - head) :]
    return prompt, answer


def collate(sequences: Sequence[TokenSequence]) -> TokenBatch:
    """Pad to the longest. The pad id is 0: it is never a target and never attended to."""
    longest = max(map(len, sequences))
    token_ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    targets = torch.full((len(sequences), longest), IGNORED, dtype=torch.int64)
    labels = torch.empty(len(sequences), longest, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids = torch.tensor(sequence.token_ids)
        token_ids[row, : len(ids)] = ids
        targets[row, sequence.answer_start - 1 : len(ids) - 1] = ids[sequence.answer_start :]
        targets[row, [position - 1 for position in sequence.unscored]] = IGNORED
        labels[row] = sequence.label
        for position, label in sequence.label_changes:
            labels[row, position:] = label
    return TokenBatch(token_ids, targets, torch.tensor([len(sequence) for sequence in sequences]), labels)


def batches_by_length(sequences: Sequence[TokenSequence], max_tokens: int) -> Iterator[list[int]]:
    """Indices grouped into batches of similar length and at most `max_tokens` padded tokens (one sequence at least)."""
    group: list[int] = []
    for index in sorted(range(len(sequences)), key=lambda index: (-len(sequences[index]), index)):
        if group and (len(group) + 1) * len(sequences[group[0]]) > max_tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def up_to_last(tokens: list[int], ends: Collection[int]) -> list[int]:
    """Drop what the template prints behind the last end-of-turn token."""
    last = max((index for index, token in enumerate(tokens) if token in ends), default=len(tokens) - 1)
    return tokens[: last + 1]


def around_words(tokenizer: ChatRenderer, system: str | None = None) -> tuple[list[int], list[int]]:
    """Tokens that the chat template puts before and behind a user's first words; either may be none.

    `system` None leaves the system message to the template. Raises InvalidRequestError where it refuses the messages.
    """

    def render(text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return tokenizer.render_chat(messages, add_generation_prompt=True)

    first, second = render("A"), render("7")
    return first[: common_length(first, second)], first[::-1][: common_length(first[::-1], second[::-1])][::-1]


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of leading tokens that both share."""
    for position, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return position
    return min(len(first), len(second))
