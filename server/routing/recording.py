"""Router inputs of chosen tokens, caught while a routed forward pass runs. Changes nothing of the pass."""

from collections.abc import Container, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from server.routing.bank import BankSnapshot, LoraWeights, ProjectionInfo
from server.routing.context import RoutingBatch
from server.routing.policy import GatePlan
from server.routing.router import Granularity, RouterArtefact, gate_key
from server.routing.router_bank import RouterBank


class ExampleStates(Protocol):
    """What making a gate row needs of the model as it is served. Only on the thread that runs it, between two steps."""

    def inputs(
        self,
        token_ids: Sequence[int],
        positions: Tensor,
        plan: GatePlan,
        routers: RouterBank,
        artefact: RouterArtefact,
    ) -> dict[str, Tensor]:
        """gate key -> (N, d) float32 on the CPU, what the artefact's gates read at `positions` (T,) bool of one text.

        The text runs from its beginning under `plan`, whose router is in `routers`; nothing of it reaches a request.
        Raises LoraMixerError when this server cannot tell.
        """
        ...

    def weights(self, slot: int, artefact: RouterArtefact) -> Mapping[str, Sequence[LoraWeights]]:
        """gate key -> the weights in `slot` of the projections that read the very tensor that the gate reads.

        Raises LoraMixerError when this server cannot tell.
        """
        ...


class InputRecorder:
    """A routing batch that leaves the gates to another one (None: no adapter acts) and keeps what each gate reads."""

    def __init__(
        self,
        inner: RoutingBatch | None,
        bank: BankSnapshot,
        *,
        granularity: Granularity,
        keys: Container[str],
        positions: Tensor,
    ) -> None:
        """`keys` are the gates to record, `positions` (T,) bool the tokens to keep."""
        self.bank = bank
        self.inputs: dict[str, Tensor] = {}
        """gate key -> (N, d) float32 on the CPU."""
        self._inner = inner
        self._granularity: Granularity = granularity
        self._keys = keys
        self._positions = positions

    def gates(self, info: ProjectionInfo, tokens: Tensor) -> Tensor | None:
        """See `RoutingBatch`; a per-layer gate reads the input of the first projection called in its layer."""
        key = gate_key(self._granularity, info)
        if key in self._keys and key not in self.inputs:
            self.inputs[key] = tokens[self._positions].float().cpu()
        return None if self._inner is None else self._inner.gates(info, tokens)


class InputProbe:
    """A routing batch without adapters that finds out which projections read the very tensor that their gate reads."""

    def __init__(self, bank: BankSnapshot, granularity: Granularity) -> None:
        self.bank = bank
        self.readers: dict[str, list[ProjectionInfo]] = {}
        """gate key -> projections, in order of computation."""
        self._granularity: Granularity = granularity
        self._inputs: dict[str, Tensor] = {}  # kept until the end, so that no later tensor takes an address over

    def gates(self, info: ProjectionInfo, tokens: Tensor) -> None:
        """See `RoutingBatch`."""
        key = gate_key(self._granularity, info)
        first = self._inputs.setdefault(key, tokens)
        if first.data_ptr() == tokens.data_ptr() and first.shape == tokens.shape:
            self.readers.setdefault(key, []).append(info)
