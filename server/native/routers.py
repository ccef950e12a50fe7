"""Routers as the native step reads them: pointers to gate rows and, for large pools, prototypes that make shortlists.

A shortlist changes no bit of any gate: it holds every slot that can be among the top k (`src/shortlist.h` has the
proof), and the router decides among them as it would among all.
"""

import ctypes
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.native.library import NUM_PROJECTIONS, Router
from server.native.model import NativeModel
from server.routing.attach import RoutedModel
from server.routing.router import gate_key
from server.routing.router_bank import RouterGeneration


class NativeRouter:
    """One generation in the layout of the native step. Making it reads all rows: not on the thread of the steps."""

    def __init__(
        self,
        generation: RouterGeneration,
        routed: RoutedModel,
        native: NativeModel,
        *,
        shortlist_from: int | None = None,
    ) -> None:
        """Shortlists are made if at least `shortlist_from` slots have gate rows; None: never."""
        self.generation = generation
        self._num_slots = routed.num_slots
        count = len(native.projections)
        self._rows, self._biases = (ctypes.c_void_p * count)(), (ctypes.c_void_p * count)()
        self._gate_index = np.full(count, -1, np.int32)
        self.num_gates = 0
        for index, name in enumerate(native.projections):
            key = gate_key(generation.granularity, routed.projections[name])
            if key not in generation.rows or (generation.granularity == "layer" and index % NUM_PROJECTIONS):
                continue
            rows = generation.rows[key]
            assert rows.is_contiguous()
            assert rows.dtype is torch.float32
            self._rows[index] = rows.data_ptr()
            if (bias := generation.biases.get(key)) is not None:
                assert bias.is_contiguous()
                assert bias.dtype is torch.float32
                self._biases[index] = bias.data_ptr()
            self._gate_index[index] = self.num_gates
            self.num_gates += 1
        self._shortlist: int | None = None
        if shortlist_from is not None and len(generation.slots) >= shortlist_from:
            self._shortlist = native.make_shortlist(self.struct(None), sorted(generation.slots))
            weakref.finalize(self, native.drop_shortlist, self._shortlist).atexit = False

    def struct(self, layer_gates: Tensor | None) -> Any:
        """`lm::Router`; valid as long as this object."""
        return Router(
            is_per_layer=self.generation.granularity == "layer",
            num_gates=self.num_gates,
            temperature=self.generation.temperature,
            num_slots=self._num_slots,
            rows=ctypes.addressof(self._rows),
            biases=ctypes.addressof(self._biases),
            layer_gates=None if layer_gates is None else layer_gates.data_ptr(),
            gate_index=self._gate_index.ctypes.data,
            shortlist=self._shortlist,
        )
