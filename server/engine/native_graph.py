"""A step on the native decoder: turns a layout and its plans into the structs of the C interface.

Knows sequences, plans and routers; the maths and the K/V cache are in `server.native`. Arrays handed to C live as long
as the call; what does not change from step to step is built once.
"""

import ctypes
from collections.abc import Sequence as List
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.engine.graph import GraphOutput
from server.engine.layout import StepLayout
from server.native.library import Plan, Router, Step
from server.native.model import NativeModel
from server.native.routers import NativeRouter
from server.routing.attach import RoutedModel
from server.routing.bank import BankSnapshot
from server.routing.policy import GatePlan
from server.routing.router_bank import RouterGeneration

MAX_KEPT_PLANS = 1024
"""Plans whose C form is kept; requests with weights of their own would otherwise pile up."""


class NativeGates:
    """Gates that the native step wrote; see `StepGates`."""

    def __init__(self, share: Tensor, layers: dict[int, Tensor]) -> None:
        self.share = share
        """(T, E) float32."""
        self._layers = layers

    def layer_gates(self, generation: int | None) -> list[Tensor]:
        """See `StepGates`."""
        return [] if generation is None else list(self._layers.get(generation, ()))


class NativeGraph:
    """See `Graph`. Logits are a view of one buffer that the next step overwrites."""

    def __init__(self, native: NativeModel, routed: RoutedModel) -> None:
        self.num_layers = native.num_layers
        self._native = native
        self._routed = routed
        self._logits = torch.empty(0)
        self._plans: dict[GatePlan, _PlanArrays] = {}
        self._routers: dict[int, NativeRouter] = {}
        self._snapshot: BankSnapshot | None = None
        self._adapters: Any = None
        self._slot_order: Any = None

    def forward(
        self,
        layout: StepLayout,
        positions: List[int],
        *,
        checks: List[int] = (),
        collect_layers: bool,
        inputs: Tensor | None = None,
    ) -> GraphOutput:
        """See `Graph`. `inputs` (layers, T, hidden) float32, if given, takes every layer's attention input."""
        num_tokens, num_slots = layout.num_tokens, self._routed.num_slots
        tables = self._block_tables(layout)
        arrays = {
            "token_ids": _ints(layout.token_ids()),
            "positions": _ints(layout.positions()),
            "plan_of_token": _ints(layout.plan_of_token()),
            "first_token": _ints([*layout.starts, num_tokens]),
            "block_tables": tables,
            "logit_positions": _ints(positions),
            "greatest": np.empty(len(positions), np.float32),
            "greatest_id": np.empty(len(positions), np.int32),
            "check_positions": _ints(checks),
            "finite": np.empty(len(checks), np.int32),
        }
        logits = self._logits_buffer(len(positions))
        has_gates = any(plan.slots for plan in layout.plans)
        share = torch.zeros(num_tokens, num_slots) if has_gates else None
        self._refresh_adapters()
        routers, router_index, layers = self._lay_out_routers(layout, collect_layers)
        # Structs hold addresses of these arrays, which must live until the step has run, whatever leaves the cache.
        kept = [self._plan_arrays(plan) for plan in layout.plans]
        plans = (Plan * len(kept))(
            *(
                arrays.struct(-1 if plan.router_generation is None else router_index[plan.router_generation])
                for plan, arrays in zip(layout.plans, kept, strict=True)
            )
        )
        step = Step(
            num_tokens=num_tokens,
            num_sequences=len(layout.rows),
            num_plans=len(layout.plans),
            num_routers=len(router_index),
            num_slots=num_slots,
            num_logits=len(positions),
            num_checks=len(checks),
            max_blocks=tables.shape[1],
            plans=ctypes.addressof(plans),
            routers=ctypes.addressof(routers),
            adapters=ctypes.addressof(self._adapters),
            slot_order=self._slot_order.ctypes.data,
            logits=logits.data_ptr(),
            share=None if share is None else share.data_ptr(),
            inputs=None if inputs is None else inputs.data_ptr(),
            **{name: array.ctypes.data for name, array in arrays.items()},
        )
        self._native.run(step)
        greatest = arrays["greatest"].tolist(), arrays["greatest_id"].tolist()
        finite = torch.from_numpy(arrays["finite"]).bool() if checks else None
        return GraphOutput(logits, None if share is None else NativeGates(share, layers), greatest, finite)

    def clear(self, blocks: List[int]) -> None:
        """See `Graph`."""
        self._native.clear(list(blocks))

    def _block_tables(self, layout: StepLayout) -> Any:
        size = self._native.block_size
        widths = [-(-(row.sequence.num_computed_tokens + row.num_tokens) // size) for row in layout.rows]
        tables = np.zeros((len(widths), max(widths)), np.int32)
        for index, (row, width) in enumerate(zip(layout.rows, widths, strict=True)):
            tables[index, :width] = row.sequence.block_table[:width]
        return tables

    def _logits_buffer(self, rows: int) -> Tensor:
        if self._logits.shape[0] < rows:
            self._logits = torch.empty(rows, self._native.vocab_size)
        return self._logits[:rows]

    def _refresh_adapters(self) -> None:
        """Pointers by slot of the current bank, null where there is no adapter, and the slots by their content."""
        snapshot = self._routed.bank.snapshot
        if snapshot is self._snapshot:
            return
        table = (ctypes.c_void_p * self._routed.num_slots)()
        for slot, adapter in snapshot.packed.items():
            table[slot] = adapter.pointer
        contents = {slot: adapter.content for slot, adapter in snapshot.packed.items()}
        order = sorted(range(self._routed.num_slots), key=lambda slot: (contents.get(slot, b""), slot))
        self._snapshot, self._adapters, self._slot_order = snapshot, table, _ints(order)

    def _plan_arrays(self, plan: GatePlan) -> "_PlanArrays":
        if plan not in self._plans:
            if len(self._plans) >= MAX_KEPT_PLANS:
                self._plans.clear()
            self._plans[plan] = _PlanArrays(plan)
        return self._plans[plan]

    def _lay_out_routers(
        self, layout: StepLayout, collect_layers: bool
    ) -> tuple[Any, dict[int, int], dict[int, Tensor]]:
        """Structs of the step's routers, their index by generation, and where their gates are to be collected."""
        wanted = sorted({p.router_generation for p in layout.plans if p.router_generation is not None})
        structs = (Router * max(1, len(wanted)))()
        layers: dict[int, Tensor] = {}
        for index, id_ in enumerate(wanted):
            generation = self._routed.routers.generations[id_]
            known = generation.packed if isinstance(generation.packed, NativeRouter) else self._router(generation)
            if collect_layers:
                layers[id_] = torch.zeros(known.num_gates, layout.num_tokens, self._routed.num_slots)
            structs[index] = known.struct(layers.get(id_))
        return structs, {id_: index for index, id_ in enumerate(wanted)}, layers

    def _router(self, generation: RouterGeneration) -> NativeRouter:
        """Of a bank that packs nothing."""
        known = self._routers.get(generation.id)
        if known is None or known.generation is not generation:
            live = self._routed.routers.generations
            self._routers = {key: value for key, value in self._routers.items() if key in live}
            known = self._routers[generation.id] = NativeRouter(generation, self._routed, self._native)
        return known


class _PlanArrays:
    """A plan's slots and weights as C arrays."""

    def __init__(self, plan: GatePlan) -> None:
        pairs = plan.weights or tuple((slot, 0.0) for slot in plan.allowed_slots)
        self._slots = _ints([slot for slot, _ in pairs])
        self._weights = np.array([weight for _, weight in pairs], np.float32)
        self._top_k = plan.top_k

    def struct(self, router: int) -> Plan:
        return Plan(router, self._top_k, len(self._slots), self._slots.ctypes.data, self._weights.ctypes.data)


def _ints(values: List[int]) -> Any:
    return np.array(values, np.int32)
