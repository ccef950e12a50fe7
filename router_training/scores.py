"""Routers made of nothing but adapter weights: how strongly each adapter responds to a token, per projection.

Arrow (arXiv 2405.11157), SpectR (2504.03454), SEQR (2509.18093) and LAG (2507.05346), with exact singular vectors from
thin QR instead of power iteration. None is linear in the token, so none fits the artefact; they are baselines.

Letters: T tokens, A adapters, r rank, d width of the projection's input.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from server.routing import ops
from server.routing.bank import BankSnapshot, LoraWeights, ProjectionInfo
from server.routing.router import Granularity, gate_key

WeightScore = Literal["arrow", "spectr", "norm", "lag"]


class Scorer(Protocol):
    """Scores of all adapters for the tokens of one projection."""

    def scores(self, info: ProjectionInfo, tokens: Tensor) -> Tensor | None:
        """(T, A) float32, -inf where an adapter has nothing there; None where the projection has no gate."""
        ...


@dataclass(frozen=True, eq=False)
class Directions:
    """The input side of one adapter's update of one projection, delta = U S Vᵀ x."""

    right: Tensor
    """(r, d) float32: Vᵀ, orthonormal rows, strongest first."""
    strength: Tensor
    """(r,) float32: singular values."""


def directions(weights: LoraWeights) -> Directions:
    """Exact singular value decomposition of B A in rank space: QR of Aᵀ and of B, then an (r, r) decomposition."""
    q_a, r_a = torch.linalg.qr(weights.A.float().T)  # (d, r), (r, r)
    _, r_b = torch.linalg.qr(weights.B.float())
    _, strength, right = torch.linalg.svd(r_b @ r_a.T)
    return Directions(right @ q_a.T, strength)


class WeightScorer:
    """One of the four scores over all adapters.

    `arrow` |v₁·x|; `spectr` ‖Vᵀx‖; `norm` ‖B A x‖ = ‖S Vᵀ x‖ (SEQR), standardised per adapter and projection when
    `calibrate` has been called; `lag` keeps the `shortlist` best by `arrow` and ranks them by `spectr`.
    """

    def __init__(self, adapters: Sequence[Mapping[str, LoraWeights]], kind: WeightScore, *, shortlist: int = 5) -> None:
        self._kind: WeightScore = kind
        self._shortlist = min(shortlist, len(adapters))
        names = sorted({name for weights in adapters for name in weights})
        self._directions = {
            name: [directions(weights[name]) if name in weights else None for weights in adapters] for name in names
        }
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}

    def calibrate(self, inputs: Mapping[str, Tensor]) -> None:
        """Standardise by mean and deviation over calibration inputs, projection name -> (N, d)."""
        for name, x in inputs.items():
            scores = self._raw(name, x.float(), self._kind)
            self._moments[name] = (scores.mean(dim=0), scores.std(dim=0).clamp_min(torch.finfo(torch.float32).tiny))

    def scores(self, info: ProjectionInfo, tokens: Tensor) -> Tensor | None:
        """See `Scorer`."""
        if info.name not in self._directions:
            return None
        x = tokens.float()
        if self._kind == "lag":
            arrow, spectr = self._raw(info.name, x, "arrow"), self._raw(info.name, x, "spectr")
            listed = arrow.topk(self._shortlist, dim=-1).indices
            return torch.full_like(arrow, -torch.inf).scatter(-1, listed, spectr.gather(-1, listed))
        scores = self._raw(info.name, x, self._kind)
        if (moments := self._moments.get(info.name)) is not None:
            absent = scores == -torch.inf
            scores = ((scores - moments[0]) / moments[1]).masked_fill(absent, -torch.inf)
        return scores

    def _raw(self, name: str, x: Tensor, kind: WeightScore) -> Tensor:
        columns = []
        for found in self._directions[name]:
            if found is None:
                columns.append(x.new_full((len(x),), -torch.inf))
            elif kind == "arrow":
                columns.append((x @ found.right[0]).abs())
            else:
                parts = x @ found.right.T  # (T, r)
                columns.append((parts if kind == "spectr" else parts * found.strength).norm(dim=-1))
        return torch.stack(columns, dim=-1)


class ScoredBatch:
    """Implements `routing.context.RoutingBatch`: top-k softmax gates, serving's own, of any scorer's scores.

    With granularity `layer` the first projection called in a layer decides for all of it, as in serving.
    """

    def __init__(
        self,
        bank: BankSnapshot,
        scorer: Scorer,
        num_slots: int,
        *,
        top_k: int,
        temperature: float,
        granularity: Granularity = "projection",
    ) -> None:
        self.bank = bank
        self._granularity: Granularity = granularity
        self._key = ""
        self._gates: Tensor | None = None
        self._scorer = scorer
        self._num_slots = num_slots
        self._top_k = top_k
        self._temperature = temperature

    def gates(self, info: ProjectionInfo, tokens: Tensor) -> Tensor | None:
        """See `RoutingBatch`; adapter i sits in slot i + 1."""
        key = gate_key(self._granularity, info)
        if key != self._key:
            self._key, self._gates = key, self._computed(info, tokens)
        return self._gates

    def _computed(self, info: ProjectionInfo, tokens: Tensor) -> Tensor | None:
        scores = self._scorer.scores(info, tokens)
        if scores is None:
            return None
        logits = F.pad(scores, (1, self._num_slots - 1 - scores.shape[1]), value=-torch.inf)  # (T, E)
        top_k = torch.full((len(tokens),), self._top_k)
        return ops.top_k_gates(logits, logits > -torch.inf, top_k, self._temperature)


class LayerWeightsBatch:
    """Implements `RoutingBatch`: fixed weights per layer for every token (LoRA Soups, arXiv 2410.13025)."""

    def __init__(self, bank: BankSnapshot, weights: Tensor) -> None:
        self.bank = bank
        self._weights = weights  # (layers, A)

    def gates(self, info: ProjectionInfo, tokens: Tensor) -> Tensor:
        """See `RoutingBatch`; adapter i sits in slot i + 1."""
        return F.pad(self._weights[info.layer], (1, 0)).expand(len(tokens), -1)  # (T, E)
