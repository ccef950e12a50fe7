"""Router inputs of chosen tokens, recorded while the frozen model runs under given plans. Fits nothing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from router_training.encoding import TokenBatch, TokenSequence, batches_by_length, collate
from router_training.evaluation import MAX_BATCH_TOKENS, gate_batch
from router_training.forward import last_hidden_states
from server.routing.attach import RoutedModel
from server.routing.bank import BankSnapshot, ProjectionInfo
from server.routing.context import RoutingBatch
from server.routing.policy import GatePlan
from server.routing.router import Granularity, gate_key


@dataclass(frozen=True, eq=False)
class CachedInputs:
    """Router inputs of the chosen tokens."""

    inputs: Mapping[str, Tensor]
    """gate key -> (N, d) in the model's dtype."""
    labels: Tensor
    """(N,) int64."""
    is_answer: Tensor
    """(N,) bool: from the last prompt token on."""


class RecordingBatch:
    """A routing batch that keeps the inputs of every gate at chosen positions and leaves the gates to another one.

    There are gates where adapters act. A layer's reads the input of the first projection called in it, whether or not
    an adapter targets that one.
    """

    def __init__(
        self,
        inner: RoutingBatch | None,
        bank: BankSnapshot,
        gates: frozenset[str],
        granularity: Granularity,
        positions: Tensor,
        from_layer: int = 0,
    ) -> None:
        self.bank = bank
        self.inputs: dict[str, Tensor] = {}
        self._inner = inner
        self._gates = gates
        self._granularity: Granularity = granularity
        self._positions = positions
        self._from_layer = from_layer

    def gates(self, info: ProjectionInfo, tokens: Tensor) -> Tensor | None:
        """See `RoutingBatch`."""
        key = gate_key(self._granularity, info)
        if key in self._gates and key not in self.inputs and info.layer >= self._from_layer:
            self.inputs[key] = tokens[self._positions].clone()
        return None if self._inner is None else self._inner.gates(info, tokens)


@torch.inference_mode()
def cache_inputs(
    routed: RoutedModel,
    sequences: Sequence[TokenSequence],
    plan_of_label: Sequence[GatePlan],
    granularity: Granularity,
    *,
    max_prompt_tokens: int,
    max_answer_tokens: int,
    from_layer: int = 0,
    on_batch: Callable[[int], None] = lambda _: None,
) -> CachedInputs:
    """Run every chat under the plan of its label and keep the router inputs of some of its tokens, for the gates of
    the layers from `from_layer` on."""
    parts: dict[str, list[Tensor]] = {}
    labels, is_answer = [], []
    bank = routed.bank.snapshot
    gates = frozenset(gate_key(granularity, routed.projections[name]) for name in bank.projections)
    for group in batches_by_length(sequences, MAX_BATCH_TOKENS):
        members = [sequences[index] for index in group]
        batch = collate(members)
        positions = chosen_positions(members, batch, max_prompt_tokens, max_answer_tokens)
        inner = gate_batch(routed, batch, plan_of_label)
        recording = RecordingBatch(inner, bank, gates, granularity, positions, from_layer)
        last_hidden_states(routed, batch, recording)
        for key, value in recording.inputs.items():
            parts.setdefault(key, []).append(value)
        labels.append(batch.token_labels[positions])
        is_answer.append(batch.answer_positions[positions])
        on_batch(len(group))
    inputs = {key: torch.cat(values) for key, values in parts.items()}
    return CachedInputs(inputs, torch.cat(labels), torch.cat(is_answer))


def concatenate(parts: Sequence[CachedInputs]) -> CachedInputs:
    """Tokens of several caching passes as one cache."""
    return CachedInputs(
        {key: torch.cat([part.inputs[key] for part in parts]) for key in parts[0].inputs},
        torch.cat([part.labels for part in parts]),
        torch.cat([part.is_answer for part in parts]),
    )


def chosen_positions(
    members: Sequence[TokenSequence], batch: TokenBatch, max_prompt_tokens: int, max_answer_tokens: int
) -> Tensor:
    """(T,) bool: the last prompt token, those from which on tokens belong to another adapter, and evenly spread others
    before and after, never padding."""
    chosen = torch.zeros(batch.token_ids.shape, dtype=torch.bool)
    for row, sequence in enumerate(members):
        last_prompt = sequence.answer_start - 1
        chosen[row, _spread(0, last_prompt, max_prompt_tokens)] = True
        chosen[row, [last_prompt, *(position for position, _ in sequence.label_changes)]] = True
        chosen[row, _spread(last_prompt, len(sequence) - 1, max_answer_tokens)] = True
    return chosen.flatten()


def _spread(start: int, stop: int, count: int) -> Tensor:
    """At most `count` whole numbers of start..stop-1, evenly spread."""
    length = stop - start
    if length <= count:
        return torch.arange(start, stop)
    return start + (torch.arange(count) * length) // count
