"""What the routed layers need to know about the batch that is running: gates per token, and what was routed where.

`RoutingContext` is the one object every RoutedLinear of a model holds; it carries the current batch for the length of a
forward pass. `GateBatch` turns gate plans into gates. Knows slots and plans, no sequences and no names.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from server.routing import ops
from server.routing.bank import BankSnapshot, ProjectionInfo
from server.routing.policy import GatePlan, Policy
from server.routing.router_bank import RouterBank, RouterGeneration
from server.routing.upload import upload


class RoutingBatch(Protocol):
    """What a RoutedLinear asks of the running batch. Serving and training each have their own."""

    bank: BankSnapshot

    def gates(self, info: ProjectionInfo, tokens: Tensor) -> Tensor | None:
        """Gates (T, E) of one projection whose input is `tokens` (T, d_in); None where no adapter acts."""
        ...


class RoutingContext:
    """Carries the current batch to the layers of one model. Handed to them when they are attached; never global."""

    def __init__(self) -> None:
        self.batch: RoutingBatch | None = None

    @contextmanager
    def running(self, batch: RoutingBatch | None) -> Iterator[None]:
        """Make `batch` current for the length of a forward pass; None runs the bare base model."""
        assert self.batch is None, "a forward pass is already running"
        self.batch = batch
        try:
            yield
        finally:
            self.batch = None


class RoutedGroup:
    """The tokens of a batch that one router generation decides for, and their gates as the layers ask for them."""

    def __init__(self, generation: RouterGeneration, allowed: Tensor, top_k: Tensor, *, collect_layers: bool) -> None:
        self.generation = generation
        self._allowed = allowed  # (T, E) bool; rows of other tokens are all False
        self._top_k = top_k  # (T,) int64
        self._collect_layers = collect_layers
        self._layer = -1
        self._layer_gates: Tensor | None = None
        self._total = torch.zeros(allowed.shape, device=allowed.device)
        self._num_gates = 0
        self.layer_gates: list[Tensor] = []
        """Gates (T, E) of every gated layer or projection in order of computation, when asked for."""

    def gates(self, info: ProjectionInfo, tokens: Tensor) -> Tensor | None:
        """Gates (T, E), zero for tokens of other groups; None where this router has no gate.

        A per-layer router reads the first projection called in a layer; the others of the layer reuse its gates.
        """
        is_per_layer = self.generation.granularity == "layer"
        if is_per_layer and info.layer == self._layer:
            return self._layer_gates
        gates = None
        if (rows := self.generation.rows.get(self.generation.key(info))) is not None:
            logits = F.linear(tokens.float(), rows)  # (T, E)
            if (bias := self.generation.biases.get(self.generation.key(info))) is not None:
                logits = logits + bias
            gates = ops.top_k_gates(logits, self._allowed, self._top_k, self.generation.temperature)
            self._total += gates
            self._num_gates += 1
            if self._collect_layers:
                self.layer_gates.append(gates)
        self._layer, self._layer_gates = info.layer, gates
        return gates

    @property
    def share(self) -> Tensor:
        """(T, E) float32: gate weights averaged over the gated layers (or projections)."""
        return self._total / max(1, self._num_gates)


class GateBatch:
    """Gates of a mixed batch: fixed rows for base, pinned and weighted tokens, router rows for routed ones."""

    def __init__(self, bank: BankSnapshot, fixed: Tensor, groups: Sequence[RoutedGroup]) -> None:
        self.bank = bank
        self._fixed = fixed  # (T, E) float32
        self._groups = groups
        self._is_per_layer = all(group.generation.granularity == "layer" for group in groups)
        self._layer = -1
        self._layer_gates = fixed

    def gates(self, info: ProjectionInfo, tokens: Tensor) -> Tensor:
        """See `RoutingBatch`. Where every router is per layer, the sum is made once per layer, not per projection."""
        if not self._groups or (self._is_per_layer and info.layer == self._layer):
            return self._layer_gates
        gates = self._fixed
        for group in self._groups:
            if (routed := group.gates(info, tokens)) is not None:
                gates = gates + routed
        self._layer, self._layer_gates = info.layer, gates
        return gates

    @property
    def share(self) -> Tensor:
        """(T, E) float32: each token's gate weights, for routed tokens averaged over the gated layers."""
        share = self._fixed
        for group in self._groups:
            share = share + group.share
        return share

    def layer_gates(self, generation: int | None) -> list[Tensor]:
        """Collected gates (T, E) per gated layer of one router generation; empty for fixed policies."""
        return [gates for group in self._groups if group.generation.id == generation for gates in group.layer_gates]


def build_gate_batch(
    plans: Sequence[GatePlan],
    plan_of_token: Tensor,
    *,
    bank: BankSnapshot,
    routers: RouterBank,
    collect_layers: bool = False,
) -> GateBatch | None:
    """Gates for tokens whose plans are `plans[plan_of_token]`; plan_of_token is (T,) int64.

    Padding tokens point at a base plan. None when every plan is `base`: then the bare base model runs.
    """
    if all(not plan.slots for plan in plans):
        return None
    device = plan_of_token.device
    fixed = torch.zeros(len(plans), routers.num_slots)
    for row, plan in enumerate(plans):
        for slot, weight in plan.weights:
            fixed[row, slot] = weight
    groups = []
    for generation in sorted({p.router_generation for p in plans if p.router_generation is not None}):
        allowed, top_k = _routed_rows(plans, generation, routers.num_slots)
        groups.append(
            RoutedGroup(
                routers.generations[generation],
                upload(allowed, device).index_select(0, plan_of_token),
                upload(top_k, device).index_select(0, plan_of_token),
                collect_layers=collect_layers,
            )
        )
    return GateBatch(bank, upload(fixed, device).index_select(0, plan_of_token), groups)


def _routed_rows(plans: Sequence[GatePlan], generation: int, num_slots: int) -> tuple[Tensor, Tensor]:
    allowed = torch.zeros(len(plans), num_slots, dtype=torch.bool)
    top_k = torch.ones(len(plans), dtype=torch.int64)
    for row, plan in enumerate(plans):
        if plan.policy is Policy.ROUTED and plan.router_generation == generation:
            allowed[row, list(plan.allowed_slots)] = True
            top_k[row] = plan.top_k
    return allowed, top_k
