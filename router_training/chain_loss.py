"""The prompt gate's chain as a loss: batches of questions, of several fits at once, differentiable in their rows.

Letters: M fits, S questions a fit, L padded length, C choices, d embedding width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from server.routing.chat_frame import ChatFrame
from server.routing.prompt_gate import PromptGateSettings

Question = tuple[Tensor, Tensor]
"""Token ids and labels, both (L,) int64, of a first question."""


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


def question_loss(
    features: Tensor,
    rows: Tensor,
    batches: Sequence[Sequence[Question]],
    switches: SwitchTable,
    *,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean over a fit's questions of the mean over their tokens of -log posterior of the token's own choice, summed
    over the fits, a scalar.

    features (V, d); rows (M, C, d); M batches of as many questions each. Fits share no gradient. Of the tokens a share
    `dropout`, drawn with `generator`, says nothing; their own choice counts as any.
    """
    questions = [question for batch in batches for question in batch]
    ids = pad_sequence([tokens for tokens, _ in questions], batch_first=True)  # (M * S, L)
    labels = pad_sequence([own for _, own in questions], batch_first=True)
    lengths = torch.tensor([len(tokens) for tokens, _ in questions])
    is_real = torch.arange(ids.shape[1])[None] < lengths[:, None]
    speaks = is_real & (torch.rand(ids.shape, generator=generator) >= dropout)
    emissions = _emissions(features, rows, ids) * speaks[:, :, None]
    own = log_posterior(emissions, switches.of(ids)).gather(2, labels[:, :, None])[:, :, 0]
    return -(own * is_real / lengths[:, None]).sum() / len(batches[0])


def _emissions(features: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """(M * S, L, C). Each token that occurs is scored once, for all fits: most occur many times."""
    tokens, places = torch.unique(ids, return_inverse=True)
    scores = features[tokens] @ rows.transpose(1, 2)  # (M, U, C)
    fit = torch.arange(len(rows)).repeat_interleave(len(ids) // len(rows))
    # An embedding, since the gradient of indexing is summed in no fixed order.
    return F.embedding(places + (fit * len(tokens))[:, None], scores.flatten(0, 1))


def log_posterior(emissions: Tensor, switches: Tensor) -> Tensor:
    """As `task_chain.smoothed` for a batch (S, L, C) with `switches` (S, L), in logarithms and differentiable: the
    same chain, held to it by a test. Padding at the end must have zero emissions: it says nothing.

    All changes are as likely, so a message needs no sum over pairs of choices: of a message x with sum one, what goes
    on is (keep - other) x + other. That is so in either direction; both run side by side.
    """
    count = emissions.shape[2]
    arrival = switches / max(1, count - 1)
    ahead = emissions.permute(1, 2, 0)  # (L, C, S): choices before questions, so that sums over choices are vectorised
    evidence = torch.cat([ahead, ahead.flip(0)], dim=2).unbind(0)
    other = _both_ways(arrival.T).unbind(0)
    rest = _both_ways((1 - switches - arrival).T).unbind(0)
    message = torch.zeros_like(evidence[0])
    messages = [message]
    for position in range(1, len(evidence)):
        shares = F.softmax(message + evidence[position - 1], dim=0)
        message = torch.log(other[position] + rest[position] * shares)
        messages.append(message)
    forward, backward = torch.stack(messages).chunk(2, dim=2)
    return torch.log_softmax((forward + ahead + backward.flip(0)).permute(2, 0, 1), dim=2)


def _both_ways(values: Tensor) -> Tensor:
    """(L, 1, 2 * S) of (L, S): those of the change to a position, and of the change that is left on the way back."""
    return torch.cat([values, values.flip(0).roll(1, 0)], dim=1)[:, None]
