"""Where a router sends tokens: mean gates by layer, by position in the text, and along single chats. Judges nothing."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from router_training.encoding import TokenSequence, batches_by_length, collate
from router_training.evaluation import MAX_BATCH_TOKENS, gate_batch
from router_training.forward import last_hidden_states
from router_training.roster import Roster
from server.routing.bank import ProjectionInfo
from server.routing.context import GateBatch, RoutingBatch
from server.routing.policy import GatePlan

OPENING_TOKENS = 64
"""Positions from the beginning of a text over which the own adapter's share is followed."""

DIGITS = 4
"""Decimals kept: the means are over some hundred tokens."""


class LayerRecorder:
    """A routing batch that leaves the gates to another one and sums them per layer. Changes nothing of the pass."""

    def __init__(self, inner: RoutingBatch, num_layers: int) -> None:
        self.bank = inner.bank
        self._inner = inner
        self._sums: list[Tensor | None] = [None] * num_layers
        self._counts = [0] * num_layers

    def gates(self, info: ProjectionInfo, tokens: Tensor) -> Tensor | None:
        """See `RoutingBatch`. Projections that no adapter targets do not count."""
        gates = self._inner.gates(info, tokens)
        if gates is not None and info.name in self.bank.projections:
            earlier = self._sums[info.layer]
            self._sums[info.layer] = gates if earlier is None else earlier + gates
            self._counts[info.layer] += 1
        return gates

    def means(self, like: Tensor) -> Tensor:
        """(layers, T, E): gates averaged over a layer's projections; zero where a layer has none. `like` is (T, E)."""
        layers = zip(self._sums, self._counts, strict=True)
        return torch.stack([torch.zeros_like(like) if total is None else total / count for total, count in layers])


@torch.inference_mode()
def gate_shares(roster: Roster, sequences: Sequence[TokenSequence], plans: Sequence[GatePlan]) -> dict[str, Any]:
    """`layers`: per task, (layers, E) mean gates over answer positions; a row of zeros has no gate.

    `opening`: per task, the own adapter's share at each of the first `OPENING_TOKENS` positions, as far as every chat
    of the task reaches.
    """
    routed = roster.routed
    layer_sums = torch.zeros(len(roster.tasks), routed.num_layers, routed.num_slots)
    answer_tokens = torch.zeros(len(roster.tasks))
    openings: dict[int, list[Tensor]] = {}
    for group in batches_by_length(sequences, MAX_BATCH_TOKENS):
        batch = collate([sequences[index] for index in group])
        gates = gate_batch(routed, batch, plans)
        assert gates is not None, "a routed plan has gates"
        recorder = LayerRecorder(gates, routed.num_layers)
        last_hidden_states(routed, batch, recorder)
        labels, means = batch.token_labels, recorder.means(gates.share)
        for label in sorted(set(labels.tolist())):
            chosen = batch.answer_positions & (labels == label)
            layer_sums[label] += means[:, chosen].sum(dim=1)
            answer_tokens[label] += chosen.sum()
        own = gates.share.gather(1, labels[:, None]).view(batch.token_ids.shape)  # (S, L)
        for row, length in enumerate(batch.lengths.tolist()):
            openings.setdefault(int(batch.labels[row, 0]), []).append(own[row, : min(length, OPENING_TOKENS)])
    found = [label for label in range(len(roster.tasks)) if answer_tokens[label]]
    return {
        "choices": roster.tasks,
        "layers": {roster.tasks[label]: rounded(layer_sums[label] / answer_tokens[label]) for label in found},
        "opening": {roster.tasks[label]: rounded(_mean_opening(openings[label])) for label in found},
    }


@torch.inference_mode()
def shares_along(roster: Roster, sequence: TokenSequence, plans: Sequence[GatePlan]) -> dict[str, Any]:
    """One chat token by token: whose each position is (`tasks`), whether it predicts an answer token (`answer`), and
    the gates there averaged over the gated layers (`share`, one row of E per position)."""
    batch = collate([sequence])
    gates = gate_batch(roster.routed, batch, plans)
    assert isinstance(gates, GateBatch), "a routed plan has gates"
    last_hidden_states(roster.routed, batch, gates)
    return {
        "tasks": [roster.tasks[label] for label in batch.token_labels.tolist()],
        "answer": batch.answer_positions.int().tolist(),
        "share": rounded(gates.share),
    }


def rounded(values: Tensor) -> Any:
    """Nested lists of few decimals."""
    if values.ndim > 1:
        return [rounded(row) for row in values]
    return [round(value, DIGITS) for value in values.tolist()]


def _mean_opening(shares: Sequence[Tensor]) -> Tensor:
    """(P,), P the shortest chat's length: every position is a mean over the same chats."""
    shortest = min(map(len, shares))
    return torch.stack([share[:shortest] for share in shares]).mean(dim=0)
