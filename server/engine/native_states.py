"""States for gate rows from the native step, in cache blocks of its own; see `routing.recording.ExampleStates`."""

import dataclasses
from collections.abc import Sequence as List

import torch
from torch import Tensor

from server.engine.layout import lay_out
from server.engine.native_graph import NativeGraph
from server.engine.sequence import SamplingParams, ScheduledBatch, ScheduledSequence, Sequence
from server.errors import LoraMixerError
from server.native.model import NativeModel
from server.routing.attach import RoutedModel
from server.routing.bank import LoraWeights
from server.routing.policy import GatePlan
from server.routing.router import RouterArtefact, gate_key
from server.routing.router_bank import RouterBank

MAX_STATE_TOKENS = 256
"""Longest text; an example of an adapter has fewer (`adapters.examples.MAX_TOKENS`)."""


def num_state_blocks(block_size: int) -> int:
    """Cache blocks that `NativeStates` needs."""
    return -(-MAX_STATE_TOKENS // block_size)


class NativeStates:
    """See `ExampleStates`."""

    def __init__(self, native: NativeModel, routed: RoutedModel, blocks: List[int], *, max_positions: int) -> None:
        """`blocks` are `num_state_blocks` of the cache that nobody else uses; `max_positions` the model's own limit."""
        self._native = native
        self._routed = routed
        self._blocks = list(blocks)
        self._max_tokens = min(max_positions, len(blocks) * native.block_size)

    @torch.inference_mode()
    def inputs(
        self, token_ids: List[int], positions: Tensor, plan: GatePlan, routers: RouterBank, artefact: RouterArtefact
    ) -> dict[str, Tensor]:
        """See `ExampleStates`."""
        if artefact.granularity != "layer":
            message = f"a gate row for a router of granularity {artefact.granularity} cannot be made on the native "
            raise LoraMixerError(message + "backend, which tells what layers read only; use server.backend: torch")
        if len(token_ids) > self._max_tokens:
            message = f"an example has {len(token_ids)} tokens, and this server computes {self._max_tokens}"
            raise LoraMixerError(f"{message}; raise server.max_model_len or send shorter examples")
        # Its own arrays around the same weights and adapters: the engine's graph knows other routers by the same ids.
        graph = NativeGraph(self._native, dataclasses.replace(self._routed, routers=routers))
        graph.clear(self._blocks)  # what an adapter left here may be not finite, and masked positions must be
        sequence = Sequence(id=0, prompt_token_ids=list(token_ids), params=SamplingParams(), plan=plan)
        sequence.block_table = list(self._blocks)
        layout = lay_out(ScheduledBatch((ScheduledSequence(sequence, len(token_ids)),)))
        states = torch.empty(self._native.num_layers, len(token_ids), self._native.hidden_size)
        graph.forward(layout, [len(token_ids) - 1], collect_layers=False, inputs=states)
        layer_of_key = {gate_key("layer", info): info.layer for info in self._routed.projections.values()}
        return {key: states[layer_of_key[key]][positions] for key in artefact.rows}

    def weights(self, slot: int, artefact: RouterArtefact) -> dict[str, list[LoraWeights]]:
        """See `ExampleStates`: packed adapters have no rows to read."""
        del slot, artefact
        message = "a gate row cannot be made from the weights alone on the native backend, which packs them; give "
        raise LoraMixerError(f"{message}examples, or start the server with server.backend: torch")
