"""From a scheduled batch to token ids: the one place that builds tensors and runs the model.

Knows sequences, blocks and plans; nothing about queues, budgets or text. Runs on the engine thread only.
"""

from collections.abc import Sequence as List
from typing import Any

import torch
from torch import Tensor

from server.engine.packing import BatchPacker, PackedBatch
from server.engine.sampler import sample, score_tokens
from server.engine.sequence import (
    RoutingStats,
    RunResult,
    ScheduledBatch,
    ScheduledSequence,
    StepOutput,
    TokenLogprobs,
    TokenRouting,
    TraceLevel,
)
from server.model.attention import PagedAttention
from server.routing import ops
from server.routing.attach import RoutedModel
from server.routing.context import GateBatch, build_gate_batch
from server.routing.policy import BASE_SLOT, Policy


class ModelRunner:
    """Runs scheduled batches on a model with routed projections and paged attention attached."""

    def __init__(
        self, routed: RoutedModel, attention: PagedAttention, *, block_size: int, device: torch.device
    ) -> None:
        self._routed = routed
        self._model: Any = routed.model
        self._attention = attention
        self._block_size = block_size
        self._device = device
        self._packer = BatchPacker(block_size=block_size, device=device)

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> RunResult:
        """One forward pass over all rows, then sampling; outputs in the order of `batch.rows`."""
        packed = self._packer.pack(batch)
        gates = self._gates(packed)
        positions, targets = _wanted_positions(packed)
        keep = torch.tensor(positions, dtype=torch.int64, device=self._device)
        with self._routed.context.running(gates), self._attention.running(packed.attention):
            output = self._model(
                input_ids=packed.input_ids, position_ids=packed.positions, use_cache=False, logits_to_keep=keep
            )
        logits = output.logits[0].float()  # (len(positions), vocab)
        outputs = self._outputs(packed, gates, logits, targets)
        stats = _routing_stats(packed, gates) if gates is not None else RoutingStats()
        return RunResult([outputs[row] for row in _inverse(packed.order)], stats)

    def _gates(self, packed: PackedBatch) -> GateBatch | None:
        return build_gate_batch(
            packed.plans,
            packed.plan_of_token,
            bank=self._routed.bank.snapshot,
            routers=self._routed.routers,
            collect_layers=any(row.sequence.params.trace_routing is TraceLevel.LAYERS for row in packed.rows),
        )

    def _outputs(
        self, packed: PackedBatch, gates: GateBatch | None, logits: Tensor, targets: dict[int, list[int]]
    ) -> list[StepOutput]:
        """One output per packed row; `logits` holds each row's prompt-scoring positions, then its last position."""
        last: list[int] = []
        spans: dict[int, slice] = {}
        cursor = 0
        for index in range(len(packed.rows)):
            if index in targets:
                spans[index] = slice(cursor, cursor + len(targets[index]))
                cursor += len(targets[index])
            last.append(cursor)
            cursor += 1
        final = logits if len(last) == logits.shape[0] else logits[last]  # (rows, vocab)
        finite = torch.isfinite(final.sum(dim=-1)).tolist()
        scored = {
            index: self._score(packed.rows[index], logits[span], targets[index])
            for index, span in spans.items()
            if finite[index]
        }
        sampling = [index for index, row in enumerate(packed.rows) if row.samples and finite[index]]
        if len(sampling) < len(packed.rows):
            final = final[sampling]
        tokens = sample(final, [packed.rows[index].sequence for index in sampling]) if sampling else []
        sampled = dict(zip(sampling, tokens, strict=True))
        outputs = []
        for index, row in enumerate(packed.rows):
            if not finite[index]:
                outputs.append(self._poisoned(row))
                continue
            token = sampled.get(index)
            outputs.append(
                StepOutput(
                    token_id=token.token_id if token else None,
                    logprobs=token.logprobs if token else None,
                    routing=self._trace(packed, index, gates) if token else None,
                    prompt_logprobs=scored.get(index, ()),
                )
            )
        return outputs

    def _score(self, row: ScheduledSequence, logits: Tensor, targets: List[int]) -> tuple[TokenLogprobs, ...]:
        num_top = row.sequence.params.prompt_logprobs
        assert num_top is not None
        return tuple(score_tokens(logits, targets, num_top, sequence_id=row.sequence.id))

    def _poisoned(self, row: ScheduledSequence) -> StepOutput:
        """Fail one row and zero the blocks it wrote: masked positions of their next owner must be finite."""
        sequence, size = row.sequence, self._block_size
        first = sequence.num_computed_tokens // size
        stop = -(-(sequence.num_computed_tokens + row.num_tokens) // size)
        assert self._attention.cache is not None
        self._attention.cache.clear(self._tensor(sequence.block_table[first:stop]))
        return StepOutput(token_id=None, error="the model's output is not finite under the adapters of this request")

    def _trace(self, packed: PackedBatch, index: int, gates: GateBatch | None) -> TokenRouting | None:
        row = packed.rows[index]
        level = row.sequence.params.trace_routing
        if level is None:
            return None
        layers: list[tuple[tuple[int, float], ...]] = []
        if gates is None or not row.sequence.plan.slots:
            share: tuple[tuple[int, float], ...] = ((BASE_SLOT, 1.0),)
        else:
            token = packed.starts[index] + row.num_tokens - 1
            share = _pairs(gates.share[token])
            layers = [_pairs(layer[token]) for layer in gates.layer_gates(row.sequence.plan.router_generation)]
        if level is not TraceLevel.LAYERS:
            return TokenRouting(share)
        return TokenRouting(share, tuple(layers) or (share,) * self._routed.num_layers)

    def _tensor(self, values: List[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def _wanted_positions(packed: PackedBatch) -> tuple[list[int], dict[int, list[int]]]:
    """Packed positions whose logits are needed, and per row the next prompt tokens to score there.

    The last position of every row is among them, sampled or not: non-finite keys anywhere in a context make it
    non-finite, so a poisoned sequence is found in the step that poisons it.
    """
    positions: list[int] = []
    targets: dict[int, list[int]] = {}
    for index, (row, start) in enumerate(zip(packed.rows, packed.starts, strict=True)):
        sequence, begin = row.sequence, row.sequence.num_computed_tokens
        if sequence.params.prompt_logprobs is not None:
            wanted = sequence.prompt_token_ids[begin + 1 : begin + row.num_tokens + 1]
            if wanted and len(sequence.prompt_logprobs) < sequence.num_prompt_tokens:
                targets[index] = wanted
                positions += range(start, start + len(wanted))
        positions.append(start + row.num_tokens - 1)
    return positions, targets


def _pairs(weights: Tensor) -> tuple[tuple[int, float], ...]:
    """(E,) -> non-zero (slot, weight), heaviest first."""
    pairs = [(slot, weight) for slot, weight in enumerate(weights.tolist()) if weight]
    return tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))


def _routing_stats(packed: PackedBatch, gates: GateBatch) -> RoutingStats:
    share = gates.share[: packed.num_tokens]  # (T, E)
    is_routed = torch.tensor([plan.policy is Policy.ROUTED for plan in packed.plans], device=share.device)
    entropy = ops.gate_entropy(share)[is_routed[packed.plan_of_token[: packed.num_tokens]]]
    return RoutingStats(gate_mass=_pairs(share.sum(dim=0)), entropies=tuple(entropy.tolist()))


def _inverse(order: tuple[int, ...]) -> list[int]:
    inverse = [0] * len(order)
    for position, original in enumerate(order):
        inverse[original] = position
    return inverse
