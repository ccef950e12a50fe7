"""States and weights for gate rows from the torch model and bank; see `routing.recording.ExampleStates`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from server.routing.attach import RoutedModel
from server.routing.bank import BankSnapshot, LoraWeights, ProjectionInfo
from server.routing.context import RoutingBatch, build_gate_batch
from server.routing.policy import GatePlan
from server.routing.recording import InputProbe, InputRecorder
from server.routing.router import RouterArtefact
from server.routing.router_bank import RouterBank


class TorchStates:
    """See `ExampleStates`. Uses no place in the K/V cache."""

    def __init__(self, routed: RoutedModel) -> None:
        self._routed = routed

    @torch.inference_mode()
    def inputs(
        self,
        token_ids: Sequence[int],
        positions: Tensor,
        plan: GatePlan,
        routers: RouterBank,
        artefact: RouterArtefact,
    ) -> dict[str, Tensor]:
        """See `ExampleStates`."""
        bank = self._routed.bank
        plan_of_token = torch.zeros(len(token_ids), dtype=torch.int64, device=bank.device)
        gates = build_gate_batch([plan], plan_of_token, bank=bank.snapshot, routers=routers) if plan.slots else None
        recorder = InputRecorder(
            gates,
            bank.snapshot,
            granularity=artefact.granularity,
            keys=artefact.rows,
            positions=positions.to(bank.device),
        )
        self._run(recorder, token_ids)
        return recorder.inputs

    @torch.inference_mode()
    def weights(self, slot: int, artefact: RouterArtefact) -> dict[str, list[LoraWeights]]:
        """See `ExampleStates`."""
        bank = self._routed.bank.snapshot
        probe = InputProbe(bank, artefact.granularity)
        self._run(probe, (0, 0))
        return {key: _weights_of(slot, probe.readers.get(key, ()), bank) for key in artefact.rows}

    def _run(self, batch: RoutingBatch, token_ids: Sequence[int]) -> None:
        """One text from its beginning, without its output head and without a place in the K/V cache."""
        model: Any = self._routed.model
        with self._routed.context.running(batch):
            model.base_model(input_ids=torch.tensor([token_ids], device=self._routed.bank.device), use_cache=False)


def _weights_of(slot: int, readers: Sequence[ProjectionInfo], bank: BankSnapshot) -> list[LoraWeights]:
    """The adapter's rows of these projections, as the bank holds them."""
    weights = []
    for info in readers:
        if (projection := bank.projections.get(info.name)) is not None and (projection.owner == slot).any():
            mine = projection.owner == slot
            weights.append(LoraWeights(projection.a[mine].float().cpu(), projection.b[:, mine].float().cpu()))
    return weights
