"""A step on the model's own transformers graph, with routed projections and paged attention attached.

Serves every architecture; where the native step exists, this is the plain reference it is held to.
"""

from collections.abc import Sequence as List
from typing import Any

import torch

from server.engine.graph import GraphOutput
from server.engine.layout import StepLayout
from server.engine.packing import BatchPacker
from server.model.attention import PagedAttention
from server.routing.attach import RoutedModel
from server.routing.context import build_gate_batch
from server.routing.upload import upload


class TorchGraph:
    """See `Graph`. The logits of a step are its own tensor."""

    def __init__(
        self, routed: RoutedModel, attention: PagedAttention, *, block_size: int, device: torch.device
    ) -> None:
        self.num_layers = routed.num_layers
        self._routed = routed
        self._model: Any = routed.model
        self._attention = attention
        self._device = device
        self._packer = BatchPacker(block_size=block_size, device=device)

    def forward(
        self, layout: StepLayout, positions: List[int], *, checks: List[int] = (), collect_layers: bool
    ) -> GraphOutput:
        """See `Graph`. Gates have rows for padding tokens behind those of the layout."""
        packed = self._packer.pack(layout)
        gates = build_gate_batch(
            layout.plans,
            packed.plan_of_token,
            bank=self._routed.bank.snapshot,
            routers=self._routed.routers,
            collect_layers=collect_layers,
        )
        keep = self._tensor([*positions, *checks])
        with self._routed.context.running(gates), self._attention.running(packed.attention):
            output = self._model(
                input_ids=packed.input_ids, position_ids=packed.positions, use_cache=False, logits_to_keep=keep
            )
        logits, checked = output.logits[0].float().split([len(positions), len(checks)])
        return GraphOutput(logits, gates, finite=checked.isfinite().all(dim=-1) if checks else None)

    def clear(self, blocks: List[int]) -> None:
        """See `Graph`."""
        assert self._attention.cache is not None
        self._attention.cache.clear(self._tensor(blocks))

    def _tensor(self, values: List[int]) -> torch.Tensor:
        return upload(torch.tensor(values, dtype=torch.int64), self._device)
