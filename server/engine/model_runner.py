"""From a scheduled batch to token ids: runs the graph, samples, and reports what was routed where.

Knows sequences, blocks and plans; nothing about queues, budgets or text. Runs on the engine thread only.
"""

import math
from collections.abc import Sequence as List

import torch
from torch import Tensor

from server.engine.graph import Graph, GraphOutput, StepGates
from server.engine.layout import StepLayout, lay_out, num_recomputed
from server.engine.sampler import SampledToken, sample, score_tokens
from server.engine.sampling_ops import greatest
from server.engine.sequence import (
    RunResult,
    ScheduledBatch,
    ScheduledSequence,
    StepOutput,
    TokenLogprobs,
    TokenRouting,
    TraceLevel,
)
from server.engine.step_stats import RoutingStats
from server.routing import ops
from server.routing.policy import BASE_SLOT, GatePlan, Policy


class ModelRunner:
    """Runs scheduled batches on a graph whose cache has blocks of `block_size` tokens."""

    def __init__(self, graph: Graph, *, block_size: int) -> None:
        self._graph = graph
        self._block_size = block_size

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> RunResult:
        """One forward pass over all rows, then sampling; outputs in the order of `batch.rows`."""
        layout = lay_out(batch)
        positions, targets, checks = _wanted_positions(layout)
        collect_layers = any(row.sequence.params.trace_routing is TraceLevel.LAYERS for row in layout.rows)
        computed = self._graph.forward(layout, positions, checks=list(checks.values()), collect_layers=collect_layers)
        outputs = self._outputs(layout, computed, targets, checks)
        stats = RoutingStats()
        if computed.gates is not None or any(row.sequence.plan.policy is Policy.ROUTED for row in layout.rows):
            stats = _routing_stats(layout, computed.gates, [len(output.token_ids) for output in outputs])
        return RunResult([outputs[row] for row in _inverse(layout.order)], stats)

    def _outputs(
        self, layout: StepLayout, computed: GraphOutput, targets: dict[int, list[int]], checks: dict[int, int]
    ) -> list[StepOutput]:
        """One output per row; the logits hold each row's prompt-scoring positions, then its last with its drafts, in
        rows' order."""
        logits = computed.logits
        last: dict[int, int] = {}
        spans: dict[int, slice] = {}
        cursor = 0
        for index, row in enumerate(layout.rows):
            if index in checks:
                continue
            if index in targets:
                spans[index] = slice(cursor, cursor + len(targets[index]))
                cursor += len(targets[index])
            last[index] = cursor
            cursor += 1 + row.num_drafts
        best, best_ids = computed.greatest or [found.tolist() for found in greatest(logits)]
        finite = {
            index: all(map(math.isfinite, best[where : where + 1 + layout.rows[index].num_drafts]))
            for index, where in last.items()
        }
        if computed.finite is not None:
            finite |= zip(checks, computed.finite.tolist(), strict=True)
        scored = {
            index: self._score(layout.rows[index], logits[span], targets[index])
            for index, span in spans.items()
            if finite[index]
        }
        rows = {index: row.sequence for index, row in enumerate(layout.rows) if row.samples and finite[index]}
        said = {
            index: _said(best_ids, last[index], sequence.draft_token_ids)
            for index, sequence in rows.items()
            if sequence.is_plainly_greedy
        }
        sampled: dict[int, SampledToken] = {}
        if drawn := [index for index in rows if index not in said]:
            places = [last[index] for index in drawn]
            final = logits if places == list(range(len(logits))) else logits[places]  # (not plainly greedy rows, V)
            sampled |= zip(drawn, sample(final, [rows[index] for index in drawn]), strict=True)
            said |= {index: (token.token_id,) for index, token in sampled.items()}
        outputs = []
        for index, row in enumerate(layout.rows):
            if not finite[index]:
                outputs.append(self._poisoned(row))
                continue
            token_ids = said.get(index, ())
            outputs.append(
                StepOutput(
                    token_ids=token_ids,
                    logprobs=sampled[index].logprobs if index in sampled else None,
                    routing=self._traces(layout, index, len(token_ids), computed.gates),
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
        self._graph.clear(sequence.block_table[first:stop])
        return StepOutput(error="the model's output is not finite under the adapters of this request")

    def _traces(
        self, layout: StepLayout, index: int, num_said: int, gates: StepGates | None
    ) -> tuple[TokenRouting, ...]:
        """At the positions that said a row's tokens, from its last known token on."""
        row = layout.rows[index]
        level = row.sequence.params.trace_routing
        if level is None or not num_said:
            return ()
        # A prompt gate may have decided about the last token of a prompt, or about all that is generated.
        plans = [plan for plan, count in row.sequence.plan_runs(row.num_tokens) for _ in range(count)]
        first = row.num_tokens - row.num_drafts - 1
        return tuple(
            self._trace(plans[place], layout.starts[index] + place, gates, level)
            for place in range(first, first + num_said)
        )

    def _trace(self, plan: GatePlan, token: int, gates: StepGates | None, level: TraceLevel) -> TokenRouting:
        layers: list[tuple[tuple[int, float], ...]] = []
        if gates is None or not plan.slots:
            share: tuple[tuple[int, float], ...] = ((BASE_SLOT, 1.0),)
        else:
            share = _pairs(gates.share[token])
            layers = [_pairs(layer[token]) for layer in gates.layer_gates(plan.router_generation)]
        if level is not TraceLevel.LAYERS:
            return TokenRouting(share)
        return TokenRouting(share, tuple(layers) or (share,) * self._graph.num_layers)


def _said(greatest_ids: List[int], place: int, drafts: List[int]) -> tuple[int, ...]:
    """What greedy decoding says: the right drafts and the token behind them. At `place` the last known token's logits
    have their greatest, then those of the drafts."""
    num_right = 0
    while num_right < len(drafts) and drafts[num_right] == greatest_ids[place + num_right]:
        num_right += 1
    return tuple(greatest_ids[place : place + num_right + 1])


def _wanted_positions(layout: StepLayout) -> tuple[list[int], dict[int, list[int]], dict[int, int]]:
    """Packed positions whose logits are needed, per row the next prompt tokens to score there, and per row that needs
    no logits its last position. A row that samples needs those of its last known token and of every draft.

    That one is looked at all the same: non-finite keys anywhere in a context make it non-finite, so a poisoned sequence
    is found in the step that poisons it.
    """
    positions: list[int] = []
    targets: dict[int, list[int]] = {}
    checks: dict[int, int] = {}
    for index, (row, start) in enumerate(zip(layout.rows, layout.starts, strict=True)):
        sequence, begin = row.sequence, row.sequence.num_computed_tokens
        if sequence.params.prompt_logprobs is not None:
            wanted = sequence.prompt_token_ids[begin + 1 : begin + row.num_tokens + 1]
            if wanted and len(sequence.prompt_logprobs) < sequence.num_prompt_tokens:
                targets[index] = wanted
                positions += range(start, start + len(wanted))
        if row.samples or index in targets:
            stop = start + row.num_tokens
            positions += range(stop - row.num_drafts - 1, stop)
        else:
            checks[index] = start + row.num_tokens - 1
    return positions, targets, checks


def _pairs(weights: Tensor) -> tuple[tuple[int, float], ...]:
    """(E,) -> non-zero (slot, weight), heaviest first."""
    pairs = [(slot, weight) for slot, weight in enumerate(weights.tolist()) if weight]
    return tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))


def _routing_stats(layout: StepLayout, gates: StepGates | None, num_said: List[int]) -> RoutingStats:
    """`num_said` tokens by each row: wrong drafts have not happened. Without gates the base model had all tokens, maybe
    some by a router's prompt gate."""
    share = torch.zeros(layout.num_tokens, 1) if gates is None else gates.share[: layout.num_tokens]  # (T, E)
    again: set[int] = set()
    for row, start, count in zip(layout.rows, layout.starts, num_said, strict=True):
        stop = start + row.num_tokens
        again.update(range(start, start + num_recomputed(row)))
        if row.num_drafts:
            again.update(range(stop - row.num_drafts - 1 + max(1, count), stop))
    if again:
        share = share.index_fill(0, torch.tensor(sorted(again), device=share.device), 0.0)
    routed: list[int] = []
    chosen: list[int] = []  # a prompt gate's decisions are its router's
    for row, start in zip(layout.rows, layout.starts, strict=True):
        if row.sequence.plan.policy is Policy.ROUTED and len(row.sequence.plan.allowed_slots) > 1:
            chosen += range(start, start + row.num_tokens)
    start = 0
    to_base: list[int] = []  # some by a prompt gate, whose plan for nobody's tokens has no slot that could show
    for index, count in layout.runs:
        if layout.plans[index].policy is Policy.ROUTED:
            routed += range(start, start + count)
        elif not layout.plans[index].slots:
            to_base += range(start, start + count)
        start += count
    routed = [position for position in routed if position not in again] if again else routed
    entropy = ops.gate_entropy(share if len(routed) == layout.num_tokens else share[routed])
    mass = routed_mass = _pairs(share.sum(dim=0))
    num_to_base = len(set(to_base).intersection(chosen).difference(again)) if to_base else 0
    if num_to_base or len(chosen) < layout.num_tokens:
        chosen_share = share[chosen].sum(dim=0)
        chosen_share[BASE_SLOT] += num_to_base
        routed_mass = _pairs(chosen_share)
    return RoutingStats(mass, tuple(entropy.tolist()), routed_mass)


def _inverse(order: tuple[int, ...]) -> list[int]:
    inverse = [0] * len(order)
    for position, original in enumerate(order):
        inverse[original] = position
    return inverse
