"""The trainable router on the server's own routed layers: parameters per gate, and the training-time routing batch.

All maths is `server.routing.ops`, so training and serving cannot drift apart.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from server.routing import ops
from server.routing.bank import BankSnapshot, ProjectionInfo
from server.routing.router import Granularity, gate_key

GateMode = Literal["dense", "straight_through"]


class RouterParameters:
    """Gate rows (C, d) float32 per gate key: C choices in slot order, that is the adapters, behind the base model if
    there is a null expert. The only thing that is trained."""

    def __init__(self, rows: Mapping[str, Tensor], granularity: Granularity, *, null_expert: bool = False) -> None:
        self.granularity: Granularity = granularity
        self.first_slot = 0 if null_expert else 1
        """Slot of the first choice."""
        self.rows = {key: nn.Parameter(value.float()) for key, value in rows.items()}

    @classmethod
    def zeros(
        cls,
        projections: Iterable[ProjectionInfo],
        granularity: Granularity,
        num_adapters: int,
        *,
        hidden_size: int,
        null_expert: bool = False,
        device: torch.device | None = None,
    ) -> "RouterParameters":
        """All-zero rows (uniform gates) for `projections`, those that at least one adapter targets. A layer's gate
        reads the input of its attention, of `hidden_size`, whichever of its projections these are."""
        num_choices = num_adapters + null_expert
        rows: dict[str, Tensor] = {}
        for info in sorted(projections, key=lambda info: (info.layer, info.name)):
            width = hidden_size if granularity == "layer" else info.d_in
            rows.setdefault(gate_key(granularity, info), torch.zeros(num_choices, width, device=device))
        return cls(rows, granularity, null_expert=null_expert)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.rows.values())

    @property
    def num_parameters(self) -> int:
        return sum(row.numel() for row in self.rows.values())

    def detached(self) -> dict[str, Tensor]:
        """The rows as plain tensors that share memory with the parameters: what the artefact is made of."""
        return {key: row.detach() for key, row in self.rows.items()}


class TrainingBatch:
    """Implements `routing.context.RoutingBatch` with differentiable gates over all choices.

    `dense`: softmax over all adapters, as the paper trains. `straight_through`: the forward pass is serving's top-k.
    Keeps the logits of every gate for the losses. `fixed`, gates (T, E) and where they hold (T,) bool, is what a prompt
    gate has decided: there the router has no say and gets no gradient.
    """

    def __init__(
        self,
        bank: BankSnapshot,
        router: RouterParameters,
        mode: GateMode,
        *,
        top_k: int,
        temperature: float,
        fixed: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.bank = bank
        self.logits: dict[str, Tensor] = {}
        """gate key -> (T, C) float32, in order of computation."""
        self._router = router
        self._mode: GateMode = mode
        self._top_k = top_k
        self._temperature = temperature
        self._fixed = fixed
        self._gates: dict[str, Tensor] = {}

    def gates(self, info: ProjectionInfo, tokens: Tensor) -> Tensor | None:
        """See `RoutingBatch`; a per-layer gate reads the input of the first projection called in its layer."""
        key = gate_key(self._router.granularity, info)
        if key not in self._router.rows:
            return None if self._fixed is None else self._fixed[0]
        if key not in self._gates:
            logits = F.linear(tokens.float(), self._router.rows[key])  # (T, C)
            self.logits[key] = logits
            gates = F.pad(self._activate(logits), (self._router.first_slot, 0))  # (T, E)
            self._gates[key] = (
                gates if self._fixed is None else torch.where(self._fixed[1][:, None], self._fixed[0], gates)
            )
        return self._gates[key]

    def stacked_logits(self, positions: Tensor) -> Tensor:
        """(G, T', C): logits of all gates at the positions, (T,) bool, that count."""
        return torch.stack([logits[positions] for logits in self.logits.values()])

    def _activate(self, logits: Tensor) -> Tensor:
        if self._mode == "dense":
            return ops.dense_gates(logits, None, self._temperature)
        return ops.straight_through_gates(logits, self._top_k, self._temperature)
