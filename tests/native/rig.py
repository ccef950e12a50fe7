"""A tiny model on both graphs, with adapters and routers, and small drivers to compare them."""

import copy
import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from server.engine.graph import Graph, GraphOutput
from server.engine.layout import lay_out
from server.engine.native_graph import NativeGraph
from server.engine.sequence import SamplingParams, ScheduledBatch, ScheduledSequence
from server.engine.sequence import Sequence as EngineSequence
from server.engine.torch_graph import TorchGraph
from server.model.attention import attach_paged_attention
from server.model.quantization import Int8Weight
from server.native.model import NativeModel
from server.routing.attach import RoutedModel, attach_routing
from server.routing.bank import LoraWeights
from server.routing.policy import BASE_PLAN, GatePlan
from server.routing.router import ArtefactAdapter, Granularity, RouterArtefact, gate_key

NUM_SLOTS = 6
BLOCK_SIZE = 16
RANKS = {1: 1, 2: 5, 3: 16, 4: 33}
"""Rank by slot: below, at and above the widths of vectors and panels, odd ones included."""


@dataclass
class Side:
    """One graph over its own copy of the model."""

    routed: RoutedModel
    graph: Graph


def random_weights(routed: RoutedModel, slot: int, targets: Sequence[str] | None = None) -> dict[str, LoraWeights]:
    """Seeded LoRA weights of the slot's rank, on the named projections (all by default)."""
    generator = torch.Generator().manual_seed(slot)
    rank = RANKS[slot]
    return {
        name: LoraWeights(
            torch.randn(rank, info.d_in, generator=generator) * 0.2,
            torch.randn(info.d_out, rank, generator=generator) * 0.2,
        )
        for name, info in routed.projections.items()
        if targets is None or name.rpartition(".")[2] in targets
    }


def random_artefact(
    routed: RoutedModel, granularity: Granularity, *, seed: int = 0, skip_layers: int = 0, temperature: float = 1.0
) -> RouterArtefact:
    """Gate rows for slots 1..4 (digests `d1`..`d4`) and the base; none in the first `skip_layers` layers."""
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, Tensor] = {}
    for info in routed.projections.values():
        key = gate_key(granularity, info)
        if key not in rows and info.layer >= skip_layers:
            rows[key] = torch.randn(5, info.d_in, generator=generator) * 0.3
    adapters = [ArtefactAdapter("base", "base"), *(ArtefactAdapter(f"d{s}", f"d{s}") for s in RANKS)]
    return RouterArtefact(
        "tiny", routed.hidden_size, routed.num_layers, granularity, 2, temperature, tuple(adapters), rows
    )


def torch_side(model: Any, num_blocks: int = 64) -> Side:
    """The reference."""
    routed = attach_routing(copy.deepcopy(model), num_slots=NUM_SLOTS)
    attention = attach_paged_attention(routed.model)  # type: ignore[arg-type]
    cpu = torch.device("cpu")
    attention.allocate(num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=routed.bank.dtype, device=cpu)
    return Side(routed, TorchGraph(routed, attention, block_size=BLOCK_SIZE, device=cpu))


def native_side(
    model: Any,
    num_blocks: int = 64,
    *,
    num_threads: int = 2,
    library: ctypes.CDLL | None = None,
    block_size: int = BLOCK_SIZE,
    quantized: Mapping[str, Int8Weight] = MappingProxyType({}),
) -> Side:
    """The native step; the model must pass `why_not`, and hold what `quantized` stands for."""
    routed = attach_routing(copy.deepcopy(model), num_slots=NUM_SLOTS)
    native = NativeModel(
        routed,
        block_size=block_size,
        num_blocks=num_blocks,
        max_positions=256,
        num_threads=num_threads,
        library=library,
        quantized=quantized,
    )
    routed.bank.pack = native.pack_adapter
    return Side(routed, NativeGraph(native, routed))


def equip(
    side: Side, routers: Mapping[int, RouterArtefact], targets: Mapping[int, Sequence[str]] | None = None
) -> None:
    """Register the adapters of `RANKS` and the routers by generation."""
    for slot in RANKS:
        weights = random_weights(side.routed, slot, (targets or {}).get(slot))
        side.routed.bank.publish(side.routed.bank.with_adapter(slot, weights))
    slots = {f"d{slot}": slot for slot in RANKS}
    for generation, artefact in routers.items():
        side.routed.routers.publish(side.routed.routers.stage(generation, artefact, slots))


def make_sequence(prompt: list[int], first_block: int = 1, plan: GatePlan = BASE_PLAN) -> EngineSequence:
    """A sequence with ten blocks of its own."""
    sequence = EngineSequence(id=first_block, prompt_token_ids=prompt, params=SamplingParams(), plan=plan)
    sequence.block_table = list(range(first_block, first_block + 10))
    return sequence


def step(side: Side, rows: Sequence[tuple[EngineSequence, int]], *, collect_layers: bool = False) -> GraphOutput:
    """One step; logits at every token of every row, in the layout's order. Advances the sequences."""
    layout = lay_out(ScheduledBatch(tuple(ScheduledSequence(sequence, count) for sequence, count in rows)))
    with torch.inference_mode():
        output = side.graph.forward(layout, range(layout.num_tokens), collect_layers=collect_layers)
    for sequence, count in rows:
        sequence.num_computed_tokens += count
    return GraphOutput(output.logits.clone(), output.gates, output.greatest)


def prefill(side: Side, prompt: list[int], chunks: Sequence[int], plan: GatePlan = BASE_PLAN) -> Tensor:
    """Logits (T, V) of one prompt computed in chunks."""
    sequence = make_sequence(prompt, plan=plan)
    return torch.cat([step(side, [(sequence, count)]).logits for count in chunks])
