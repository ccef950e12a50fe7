"""Background statistics of a router's inputs: what a gate row for a newcomer is fitted and judged against.

Made once, when a router is trained or by `lora-mixer-train background`, and kept in the artefact. Per gate: the mean
and covariance of the inputs, how the trained rows score them, and a small sample of inputs labelled with the adapter
that they belong to. Pure data: fits nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from server.errors import RouterArtefactError

COVARIANCE_RANK = 64
"""Directions of the covariance kept apart from its diagonal."""
MAX_RETAINED = 96
"""Inputs kept per gate for the canary; in float16, with the above, 6 MB for 30 gates of width 576."""

_FIELDS = ("mean", "factor", "diagonal", "score_mean", "score_covariance", "states")
_DOMAINS = "domains"


@dataclass(frozen=True, eq=False)
class GateBackground:
    """One gate's inputs x and their scores s(x), see `soft_maximum`."""

    mean: Tensor
    """(d,) float32."""
    factor: Tensor
    """(r, d) float32: covariance = factorᵀ factor + diag(diagonal)."""
    diagonal: Tensor
    """(d,) float32, not negative."""
    score_mean: Tensor
    """(1,) float32."""
    score_covariance: Tensor
    """(d,) float32: covariance of x and s."""
    states: Tensor
    """(N, d) float32: retained inputs, the same tokens at every gate."""

    @property
    def covariance(self) -> Tensor:
        """(d, d) float32."""
        return self.factor.T @ self.factor + torch.diag(self.diagonal)


@dataclass(frozen=True, eq=False)
class Background:
    """The statistics of every gate of one artefact."""

    gates: Mapping[str, GateBackground]
    domains: Tensor
    """(N,) int64: for each retained token, the index in the artefact of the adapter that its chat belongs to."""


def soft_maximum(logits: Tensor, temperature: float) -> Tensor:
    """τ log Σ exp(z/τ) over the rows, (N, A) -> (N,): the logit that a newcomer has to reach for half of the weight."""
    return temperature * torch.logsumexp(logits / temperature, dim=-1)


def summarise_gate(inputs: Tensor, retained: Tensor, rows: Tensor, temperature: float) -> GateBackground:
    """Statistics of inputs (N, d) float32 under trained rows (A, d); `retained` (M,) indexes what to keep."""
    scores = soft_maximum(inputs @ rows.T, temperature)  # (N,)
    mean = inputs.mean(dim=0)
    centred = inputs - mean
    covariance = centred.T @ centred / len(inputs)
    values, vectors = torch.linalg.eigh(covariance)
    kept = min(COVARIANCE_RANK, len(values))
    factor = (vectors[:, -kept:] * values[-kept:].clamp_min(0).sqrt()).T  # (r, d)
    return GateBackground(
        mean=mean,
        factor=factor,
        diagonal=(covariance.diagonal() - factor.square().sum(dim=0)).clamp_min(0),
        score_mean=scores.mean()[None],
        score_covariance=centred.T @ (scores - scores.mean()) / len(inputs),
        states=inputs[retained],
    )


def to_tensors(background: Background) -> dict[str, Tensor]:
    """For `RouterArtefact.background`; the two large fields in float16, whose rounding is far below sampling error."""
    tensors = {_DOMAINS: background.domains}
    for key, gate in background.gates.items():
        for name in _FIELDS:
            value: Tensor = getattr(gate, name)
            tensors[f"{name}/{key}"] = value.half() if name in ("factor", "states") else value
    return tensors


def from_tensors(tensors: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> Background:
    """Read `RouterArtefact.background` of the router with these rows.

    Raises RouterArtefactError when the statistics are missing, as in artefacts of format 1, or do not fit the rows.
    """
    if _DOMAINS not in tensors:
        raise RouterArtefactError(
            "the router artefact has no background statistics, so a gate row cannot be made without retraining; add "
            "them with `lora-mixer-train background --router DIR --data DIR`, then load the artefact again"
        )
    if missing := [f"{name}/{key}" for key in rows for name in _FIELDS if f"{name}/{key}" not in tensors]:
        raise RouterArtefactError(f"the router's background statistics lack {missing[0]} and {len(missing) - 1} more")
    gates = {key: GateBackground(*(tensors[f"{name}/{key}"].float() for name in _FIELDS)) for key in rows}
    domains = tensors[_DOMAINS].long()
    for key, gate in gates.items():
        _check_gate(key, gate, width=rows[key].shape[1], num_retained=len(domains))
    num_rows = min(len(values) for values in rows.values())
    if not len(domains) or not ((domains >= 0) & (domains < num_rows)).all():
        raise RouterArtefactError("the router's background statistics name adapters that it has no rows for")
    return Background(gates, domains)


def _check_gate(key: str, gate: GateBackground, *, width: int, num_retained: int) -> None:
    expected = {
        "mean": (width,),
        "factor": (gate.factor.shape[0], width),
        "diagonal": (width,),
        "score_mean": (1,),
        "score_covariance": (width,),
        "states": (num_retained, width),
    }
    for name, shape in expected.items():
        value: Tensor = getattr(gate, name)
        if tuple(value.shape) != shape or not torch.isfinite(value).all():
            raise RouterArtefactError(
                f"the router's background statistics {name}/{key} are {tuple(value.shape)}, not finite {shape}"
            )
