"""Gate rows for adapters that the router was not trained with, in closed form, and the canary that judges them.

Pure maths over one artefact's trained rows and background statistics. What a row depends on holds no other hot row, so
registrations commute and nobody's row changes. Letters: N tokens, d width of a gate's input, A trained rows.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from server.routing import ops
from server.routing.background import Background, GateBackground, soft_maximum
from server.routing.bank import LoraWeights

OWN_MARGIN = 12.0
"""How far above the trained rows a newcomer's logit is aimed on its own examples. A linear row gets nowhere near that;
aiming far is what keeps the mean squared error from being content with a row that hardly moves."""
BACKGROUND_MARGIN = 30.0
"""How far below them on the background; more, since most tokens that a server sees are not the newcomer's."""
OWN_WEIGHT = 0.5
"""Weight of the examples in the fit; the background has the rest."""
PENALTY = 0.1
"""L2 penalty on a row, per mean background variance of an input. Margins, weight and penalty are the best of what was
tried: see docs/hot-routing.md."""
MIN_OWN_WIN_RATE = 0.5
"""Canary: a row with examples must win at least half of their tokens, counted over all gates."""
MAX_HIT_RATE_DROP = 0.02
"""Canary: trained adapters may drop out of the top k on at most this much more of their own tokens."""
MAX_DOMAIN_SHARE = 0.1
"""Canary: of no trained adapter's tokens may it take more gate weight than this on average. The hit rate does not see
a newcomer that comes second beside the right adapter, and one domain's loss disappears in the mean of all."""


class GateColumn(NamedTuple):
    """A row of one gate: logit = row · x + bias."""

    row: Tensor
    """(d,) float32."""
    bias: float

    def logits(self, inputs: Tensor) -> Tensor:
        """(N, d) -> (N,)."""
        return torch.mv(inputs, self.row) + self.bias


@dataclass(frozen=True, eq=False)
class HotRow:
    """One adapter's columns over all gates of a router."""

    columns: Mapping[str, GateColumn]
    prompt_column: Tensor | None = None
    """(V,) float16: its scores in the router's prompt gate. Where there is one, the registry routes to no row without
    them: the gate would be silent for all requests that may choose it."""

    @cached_property
    def digest(self) -> str:
        """sha256 over rows and biases in key order and the prompt gate's scores; part of prefix-cache fingerprints."""
        sha = hashlib.sha256(b"hot row\n")
        for key in sorted(self.columns):
            column = self.columns[key]
            sha.update(f"{key} {column.bias!r}\n".encode())
            sha.update(column.row.contiguous().numpy().tobytes())
        if self.prompt_column is not None:
            sha.update(b"prompt gate\n" + self.prompt_column.contiguous().numpy().tobytes())
        return sha.hexdigest()


def column_from_examples(
    inputs: Tensor, rows: Tensor, background: GateBackground, *, temperature: float = 1.0
) -> GateColumn:
    """Ridge regression of the margin over the trained rows, in closed form.

    Minimises (1-π) E_background (w·x + b - s(x) + m₀)² + π E_examples (w·x + b - s(x) - m₁)² + ρ|w|², where s is
    `soft_maximum` of the trained rows. With a constant s it is Fisher's discriminant (Σ + ρI)⁻¹(c - c̄); the term s(x)
    and the two margins are what match gain and bias to the trained rows. inputs (N, d) of the examples, rows (A, d).
    """
    scores = soft_maximum(inputs @ rows.T, temperature) + OWN_MARGIN * temperature  # (N,)
    background_score = background.score_mean - BACKGROUND_MARGIN * temperature  # (1,)
    mean = (1 - OWN_WEIGHT) * background.mean + OWN_WEIGHT * inputs.mean(dim=0)
    score = (1 - OWN_WEIGHT) * background_score + OWN_WEIGHT * scores.mean()
    own = inputs - mean
    shift = background.mean - mean
    covariance = background.covariance
    gram = (1 - OWN_WEIGHT) * (covariance + torch.outer(shift, shift)) + OWN_WEIGHT * (own.T @ own) / len(own)
    gram.diagonal().add_(PENALTY * covariance.diagonal().mean())
    target = (1 - OWN_WEIGHT) * (background.score_covariance + shift * (background_score - score))
    target += OWN_WEIGHT * (own.T @ (scores - score)) / len(own)
    row = torch.linalg.solve(gram, target)
    return GateColumn(row, float(score - mean @ row))


def norm_factor(weights: Sequence[LoraWeights]) -> Tensor:
    """F (r, d) with |F x|² = Σ |B A x|² over projections that read the same input, exactly (SEQR, arXiv 2509.18093).

    By thin QR of B, since |B A x| = |R A x|, then one SVD of the stacked factors, whose rows are ordered by size.
    """
    stacked = torch.cat([torch.linalg.qr(lora.B.double()).R @ lora.A.double() for lora in weights])
    _, values, directions = torch.linalg.svd(stacked, full_matrices=False)
    factor: Tensor = (values[:, None] * directions).float()
    return factor


def column_from_weights(
    weights: Sequence[LoraWeights], rows: Tensor, background: GateBackground, *, temperature: float = 1.0
) -> GateColumn:
    """The linear map nearest to the adapter's norm score on the background, for newcomers without examples.

    The score |B A x| is even in x, so no row equals it; the regression of the score on x, Σ⁻¹ cov(x, |B A x|), ranks
    tokens nearly as well (docs/hot-routing.md) and needs no second kind of gate. The score is z-scored on the
    background, spread like the trained rows' own, and lowered until it wins at most 1/(A + 1) of background tokens.
    """
    factor = norm_factor(weights)
    states = background.states
    norms = torch.linalg.vector_norm(states @ factor.T, dim=1)  # (N,)
    centred = states - states.mean(dim=0)
    covariance = background.covariance
    covariance.diagonal().add_(PENALTY * covariance.diagonal().mean())
    direction = torch.linalg.solve(covariance, centred.T @ (norms - norms.mean()) / len(norms))
    logits = states @ rows.T
    winners = soft_maximum(logits, temperature)  # (N,)
    spread = (centred @ direction).std().clamp_min(torch.finfo(torch.float32).tiny)
    row = direction * (winners.std() / spread)
    bias = -torch.quantile(states @ row - winners, 1 - 1 / (len(rows) + 1))
    return GateColumn(row, float(bias))


@dataclass(frozen=True)
class CanaryReport:
    """How a newcomer's row does against the trained rows, in shares from 0 to 1 of (token, gate) pairs."""

    own_win_rate: float | None
    """Its own examples' tokens where it beats every trained row; None without examples."""
    old_hit_rate_before: float
    """Retained background tokens whose own adapter is among the top k of the trained rows."""
    old_hit_rate_after: float
    """The same once the newcomer takes part."""
    expected_background_share: float
    """Mean gate weight it takes of background tokens: what traffic that is not its own should give it."""
    most_captured: str
    """The trained adapter of whose tokens it takes most."""
    most_captured_share: float
    """Mean gate weight it takes of that adapter's tokens."""

    @property
    def hit_rate_drop(self) -> float:
        return self.old_hit_rate_before - self.old_hit_rate_after

    @property
    def own_problems(self) -> tuple[str, ...]:
        """Those of `problems` that its own examples have."""
        if self.own_win_rate is None or self.own_win_rate >= MIN_OWN_WIN_RATE:
            return ()
        return (
            f"its gate row wins {100 * self.own_win_rate:.0f} % of its own examples' tokens, "
            f"below {100 * MIN_OWN_WIN_RATE:.0f} %",
        )

    @property
    def problems(self) -> tuple[str, ...]:
        """Why it may not be routed, with numbers; empty when it may."""
        found = [*self.own_problems]
        if self.hit_rate_drop > MAX_HIT_RATE_DROP:
            found.append(
                f"it would lower the other adapters' top-k hit rate by {100 * self.hit_rate_drop:.1f} points, from "
                f"{100 * self.old_hit_rate_before:.1f} % to {100 * self.old_hit_rate_after:.1f} %, more than "
                f"{100 * MAX_HIT_RATE_DROP:.0f} allowed"
            )
        if self.most_captured_share > MAX_DOMAIN_SHARE:
            found.append(
                f"it would take {100 * self.most_captured_share:.1f} % of the gate weight on the tokens of "
                f"{self.most_captured!r}, more than {100 * MAX_DOMAIN_SHARE:.0f} % allowed"
            )
        return tuple(found)


def judge(
    row: HotRow,
    rows: Mapping[str, Tensor],
    background: Background,
    names: Sequence[str],
    *,
    top_k: int,
    temperature: float = 1.0,
    own_win_rate: float | None = None,
) -> CanaryReport:
    """The canary over all gates of a router with trained `rows` (A, d) per gate, of adapters with these `names`."""
    before, after, share = [], [], []
    for key, column in row.columns.items():
        states = background.gates[key].states
        trained = states @ rows[key].T  # (N, A)
        newcomer = column.logits(states)  # (N,)
        own = trained.gather(1, background.domains[:, None])[:, 0]
        rank = (trained > own[:, None]).sum(dim=1)
        before.append((rank < top_k).float().mean())
        after.append((rank + (newcomer > own) < top_k).float().mean())
        share.append(_newcomer_share(trained, newcomer, top_k, temperature))
    hits_before, hits_after, mean_share = (float(torch.stack(values).mean()) for values in (before, after, share))
    of_token = torch.stack(share).mean(dim=0)  # (N,)
    of_domain = {index: float(of_token[background.domains == index].mean()) for index in background.domains.tolist()}
    captured = max(of_domain, key=lambda index: of_domain[index])
    return CanaryReport(own_win_rate, hits_before, hits_after, mean_share, names[captured], of_domain[captured])


def win_rate(row: HotRow, inputs: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> float:
    """Share of (token, gate) pairs of the inputs (N, d) where the row beats every trained one."""
    wins = [(row.columns[key].logits(x) > (x @ rows[key].T).amax(dim=1)).float().mean() for key, x in inputs.items()]
    return float(torch.stack(wins).mean())


def _newcomer_share(trained: Tensor, newcomer: Tensor, top_k: int, temperature: float) -> Tensor:
    """(N,) gate weight of the newcomer beside the trained logits (N, A), exactly as a step computes it."""
    logits = torch.cat([trained, newcomer[:, None]], dim=1)
    allowed = torch.ones_like(logits, dtype=torch.bool)
    counts = torch.full((len(logits),), top_k)
    return ops.top_k_gates(logits, allowed, counts, temperature)[:, -1]
