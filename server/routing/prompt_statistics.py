"""What the questions of a prompt gate's training look like: what a column for a newcomer is made and judged against.

Made when a gate is trained or by `lora-mixer-train background`, and kept in the artefact beside the gate's scores: how
often each token occurs, and a few whole questions of every choice. Pure data: fits nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

MAX_RETAINED = 16
"""Questions kept per choice for the canary."""
MAX_TOKENS = 64
"""Tokens kept of each: the gate has made up its mind by then. With 8 adapters and the base 40 kB."""


@dataclass(frozen=True, eq=False)
class QuestionStatistics:
    """Letters: V vocabulary, Q questions, N tokens of all of them."""

    frequency: Tensor
    """(V,) float32: share of each token id in first questions, the mean over the choices."""
    tokens: Tensor
    """(N,) int32: the retained questions, one behind the other."""
    lengths: Tensor
    """(Q,) int32."""
    choices: Tensor
    """(Q,) int32: index in the artefact of the adapter that each belongs to."""

    @property
    def questions(self) -> list[tuple[list[int], int]]:
        """(token ids, choice) of every retained question."""
        tokens, found, start = self.tokens.tolist(), [], 0
        for length, choice in zip(self.lengths.tolist(), self.choices.tolist(), strict=True):
            found.append((tokens[start : start + length], choice))
            start += length
        return found

    def tensors(self) -> dict[str, Tensor]:
        """For the artefact, by field name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "QuestionStatistics":
        """Inverse of `tensors`. Raises KeyError for a missing one."""
        return cls(**{field.name: tensors[field.name] for field in fields(cls)})

    def problems(self, vocabulary: int, num_choices: int) -> list[str]:
        """Why they are none of a gate with so many tokens and choices; each begins with `question statistics`."""
        found = []
        if tuple(self.frequency.shape) != (vocabulary,) or not (self.frequency >= 0).all() or self.frequency.sum() > 2:
            found.append(f"frequency is {tuple(self.frequency.shape)}, not the shares of {vocabulary} tokens")
        lengths = self.lengths
        if lengths.shape != self.choices.shape or not (lengths > 0).all() or int(lengths.sum()) != len(self.tokens):
            found.append("tokens, lengths and choices of the retained questions do not fit together")
        for name, values, limit in (("tokens", self.tokens, vocabulary), ("choices", self.choices, num_choices)):
            if not len(values) or not ((values >= 0) & (values < limit)).all():
                found.append(f"{name} are none, or not within 0 and {limit - 1}")
        return [f"question statistics: {problem}" for problem in found]


def summarise_questions(
    questions: Sequence[tuple[Sequence[int], int]], vocabulary: int, num_choices: int
) -> QuestionStatistics:
    """Statistics of (token ids, choice), every choice counting the same however many questions it has.

    There must be a question, and no empty one.
    """
    shares, kept = [], []
    for choice in range(num_choices):
        own = [torch.tensor(tokens) for tokens, label in questions if label == choice]
        if own:
            tokens = torch.cat(own)
            shares.append(torch.bincount(tokens, minlength=vocabulary).double() / len(tokens))
            count = min(MAX_RETAINED, len(own))
            kept += [(own[index * len(own) // count][:MAX_TOKENS], choice) for index in range(count)]
    return QuestionStatistics(
        frequency=torch.stack(shares).mean(dim=0).float(),
        tokens=torch.cat([tokens for tokens, _ in kept]).int(),
        lengths=torch.tensor([len(tokens) for tokens, _ in kept], dtype=torch.int32),
        choices=torch.tensor([choice for _, choice in kept], dtype=torch.int32),
    )
