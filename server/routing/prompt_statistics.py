"""What the questions of a prompt gate's training look like: what a column for a newcomer is made and judged against.

Made when a gate is trained or by `lora-mixer-train background`, and kept in the artefact beside the gate's scores: how
often each token occurs, what tokens are like, and a few whole questions of every choice. Pure data: fits nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from server.routing.token_features import NUM_FEATURES, token_features

MAX_RETAINED = 16
"""Questions kept per choice for the canary."""
MAX_TOKENS = 64
"""Tokens kept of each: the gate has made up its mind by then. With 8 adapters and the base 40 kB."""
UNIFORM_SHARE = 0.4
"""Share of an ordinary question that may be any token. Much, so that the words of a few hundred training questions do
not pass for all words that others use. The best of what was tried: see docs/hot-routing.md."""


@dataclass(frozen=True, eq=False)
class QuestionStatistics:
    """Letters: V vocabulary, Q questions, N tokens of all of them, D features."""

    frequency: Tensor
    """(V,) float32: share of each token id in first questions, the mean over the choices."""
    tokens: Tensor
    """(N,) int32: the retained questions, one behind the other."""
    lengths: Tensor
    """(Q,) int32."""
    choices: Tensor
    """(Q,) int32: index in the artefact of the adapter that each belongs to."""
    features: Tensor | None = None
    """(V, D) float16: what tokens are like (`routing.token_features`). None in artefacts of earlier trainers."""

    @property
    def ordinary(self) -> Tensor:
        """(V,) float64: share of each token id in an ordinary question, whoever asks; none is zero."""
        return ordinary_shares(self.frequency)

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
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "QuestionStatistics":
        """Inverse of `tensors`. Raises KeyError for a missing one, but for `features`."""
        needed = {field.name: tensors[field.name] for field in fields(cls) if field.name != "features"}
        return cls(**needed, features=tensors.get("features"))

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
        if (features := self.features) is not None:
            if features.dtype is not torch.float16 or features.ndim != 2 or len(features) != vocabulary:
                shape = tuple(features.shape)
                found.append(f"features is {features.dtype} {shape}, not float16 ({vocabulary}, number of features)")
            elif features.shape[1] > NUM_FEATURES or not torch.isfinite(features).all():
                found.append(f"features are more than {NUM_FEATURES}, or not finite")
        return [f"question statistics: {problem}" for problem in found]


def ordinary_shares(frequency: Tensor) -> Tensor:
    """(V,) float64 from `QuestionStatistics.frequency`."""
    return (1 - UNIFORM_SHARE) * frequency.double() + UNIFORM_SHARE / len(frequency)


def summarise_questions(
    questions: Sequence[tuple[Sequence[int], int]], embeddings: Tensor, num_choices: int
) -> QuestionStatistics:
    """Statistics of (token ids, choice), every choice counting the same however many questions it has. `embeddings`
    (V, d) are normalised as the gate's own features are.

    There must be a question, and no empty one.
    """
    vocabulary = len(embeddings)
    shares, kept = [], []
    for choice in range(num_choices):
        own = [torch.tensor(tokens) for tokens, label in questions if label == choice]
        if own:
            tokens = torch.cat(own)
            shares.append(torch.bincount(tokens, minlength=vocabulary).double() / len(tokens))
            count = min(MAX_RETAINED, len(own))
            kept += [(own[index * len(own) // count][:MAX_TOKENS], choice) for index in range(count)]
    frequency = torch.stack(shares).mean(dim=0).float()
    return QuestionStatistics(
        frequency=frequency,
        tokens=torch.cat([tokens for tokens, _ in kept]).int(),
        lengths=torch.tensor([len(tokens) for tokens, _ in kept], dtype=torch.int32),
        choices=torch.tensor([choice for _, choice in kept], dtype=torch.int32),
        features=token_features(embeddings, ordinary_shares(frequency)),
    )
