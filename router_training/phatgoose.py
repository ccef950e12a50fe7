"""PHATGOOSE (arXiv 2402.05859): a gate vector per adapter and projection, each adapter's trained alone on its own data.

With everything else frozen an adapter's delta is scaled by σ(v·x), and v learns where the delta helps. Routing compares
the vectors of all adapters, see `linear_scores.PrototypeScorer`. Knows nothing of other adapters and no labels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from router_training.encoding import TokenSequence
from router_training.forward import mean_chat_loss
from router_training.roster import FIRST_SLOT, Roster
from server.routing.bank import BankSnapshot, ProjectionInfo


@dataclass(frozen=True)
class GateSettings:
    """Adam from v = 0 at the paper's learning rate. The paper trains 100 steps; these are a quarter of them, since
    every adapter pays for its own on two cores."""

    steps: int = 25
    learning_rate: float = 5e-3
    batch_size: int = 4
    """Chats per step; the adapter's chats are walked in order, again from the start when they end."""


class SigmoidBatch:
    """Implements `routing.context.RoutingBatch`: one adapter's delta times σ(v·x), differentiable in v."""

    def __init__(self, bank: BankSnapshot, vectors: Mapping[str, Tensor], slot: int, num_slots: int) -> None:
        """`vectors` (d,) by projection."""
        self.bank = bank
        self._vectors = vectors
        self._padding = (slot, num_slots - slot - 1)

    def gates(self, info: ProjectionInfo, tokens: Tensor) -> Tensor | None:
        """See `RoutingBatch`; None where the adapter has nothing."""
        if (vector := self._vectors.get(info.name)) is None:
            return None
        return F.pad(torch.sigmoid(tokens.float() @ vector)[:, None], self._padding)  # (T, E)


def train_vectors(
    roster: Roster,
    index: int,
    sequences: Sequence[TokenSequence],
    settings: GateSettings,
    *,
    on_step: Callable[[float], None] = lambda _: None,
) -> dict[str, Tensor]:
    """projection -> v (d,) of the adapter at `index`, from its own chats; base model and adapters stay as they are."""
    routed = roster.routed
    targeted = [routed.projections[name] for name in roster.adapters[index].weights]
    vectors = {info.name: torch.zeros(info.d_in, requires_grad=True) for info in targeted}
    optimiser = torch.optim.Adam(list(vectors.values()), lr=settings.learning_rate)
    for step in range(settings.steps):
        offsets = range(step * settings.batch_size, (step + 1) * settings.batch_size)
        members = [sequences[offset % len(sequences)] for offset in offsets]
        gated = SigmoidBatch(routed.bank.snapshot, vectors, index + FIRST_SLOT, routed.num_slots)
        loss = mean_chat_loss(routed, members, gated)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        on_step(loss.item())
    return {name: vector.detach() for name, vector in vectors.items()}


def stacked(roster: Roster, vectors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """projection -> (A, d): the vectors of all adapters in their order, zero where an adapter has none."""
    return {
        info.name: torch.stack([own.get(info.name, torch.zeros(info.d_in)) for own in vectors])
        for info in roster.gated_projections()
    }
