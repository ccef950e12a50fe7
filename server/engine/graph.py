"""The seam between the runner and what computes a step: the torch graph of any architecture, or the native step.

Knows no sampling and no queues.
"""

from collections.abc import Sequence as List
from typing import NamedTuple, Protocol

from torch import Tensor

from server.engine.layout import StepLayout


class StepGates(Protocol):
    """Gates of a step that routed or pinned anything, for metrics and traces."""

    @property
    def share(self) -> Tensor:
        """(T, E) float32: each token's gate weights, for routed tokens averaged over the gated layers."""
        ...

    def layer_gates(self, generation: int | None) -> list[Tensor]:
        """Collected gates (T, E) per gated layer of one router generation; empty for fixed policies."""
        ...


class GraphOutput(NamedTuple):
    """What a graph computed. Tensors are valid until its next step."""

    logits: Tensor
    """(P, V) float32 at the positions asked for."""
    gates: StepGates | None
    """None when no token of the step had gates."""
    greatest: tuple[list[float], list[int]] | None = None
    """Per position the greatest logit, NaN if any is, and the lowest token that has it; None if nobody looked."""
    finite: Tensor | None = None
    """(C,) bool: whether what the model says at each of the `checks` is finite; None without checks."""


class Graph(Protocol):
    """Computes one step over packed tokens and its K/V cache."""

    num_layers: int

    def forward(
        self, layout: StepLayout, positions: List[int], *, checks: List[int] = (), collect_layers: bool
    ) -> GraphOutput:
        """Logits at the packed `positions`; at `checks` only whether all is finite, which may cost less than logits.

        `collect_layers` keeps every layer's gates.
        """
        ...

    def clear(self, blocks: List[int]) -> None:
        """Zero cache blocks, so that non-finite content cannot leak to their next owner."""
        ...
