"""Stage A: first gate rows in minutes, from adapter labels on cached router inputs. No gradient through the model.

A chat that runs under its own adapter carries that adapter's mark in its hidden states, which a router at work never
sees; rows fitted on such states fail when routed. So the first pass caches inputs under the uniform mixture, which
tells nothing, and later passes under the router fitted so far (as DAgger does), always keeping the earlier tokens.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from router_training.artefact import build_artefact
from router_training.encoding import TokenSequence
from router_training.gates import RouterParameters
from router_training.roster import Roster
from router_training.router_inputs import CachedInputs, cache_inputs, concatenate
from router_training.settings import TrainingConfig

RIDGE_GAINS = tuple(2.0**power for power in range(1, 8))
"""Regression scores live near 0..1; logits need a gain, chosen per gate by cross-entropy."""


def warm_start(
    roster: Roster,
    sequences: Sequence[TokenSequence],
    config: TrainingConfig,
    *,
    on_round: Callable[[int, dict[str, Tensor]], None] = lambda *_: None,
    on_batch: Callable[[int], None] = lambda _: None,
) -> RouterParameters:
    """The router that end-to-end training starts from; `on_round` sees the rows after each round, from 0."""
    num_adapters, null_expert = len(roster.adapters), config.null_expert
    if config.warm_start == "none":
        projections = [info for info in roster.gated_projections() if info.layer >= config.routed_from_layer]
        return RouterParameters.zeros(
            projections,
            config.granularity,
            num_adapters,
            hidden_size=roster.routed.hidden_size,
            null_expert=null_expert,
        )
    parts: list[CachedInputs] = []
    plans = roster.uniform_plans()
    rows: dict[str, Tensor] = {}
    for number in range(config.warm_start_rounds):
        parts.append(
            cache_inputs(
                roster.routed,
                sequences[: config.warm_start_samples],
                plans,
                config.granularity,
                max_prompt_tokens=config.warm_start_prompt_tokens,
                max_answer_tokens=config.warm_start_answer_tokens,
                from_layer=config.routed_from_layer,
                on_batch=on_batch,
            )
        )
        rows = fit_rows(concatenate(parts), num_adapters, config)
        on_round(number, rows)
        plans = roster.routed_plans(build_artefact(rows, roster, config))
    return RouterParameters(rows, config.granularity, null_expert=null_expert)


def fit_rows(cached: CachedInputs, num_adapters: int, config: TrainingConfig) -> dict[str, Tensor]:
    """Gate rows (C, d) float32 for every gate of the cache, by the method `config.warm_start` names."""
    weights = torch.where(cached.is_answer, 1.0, config.warm_start_prompt_weight)
    first_slot, num_choices = int(not config.null_expert), num_adapters + config.null_expert
    labels = cached.labels - first_slot
    rows = {}
    for key, inputs in cached.inputs.items():
        x = inputs.float()
        row = fit_ridge(x, labels, weights, num_choices, config.warm_start_penalty)
        if config.warm_start == "softmax":
            row = fit_softmax(x, labels, weights, row, config.warm_start_penalty, config.warm_start_iterations)
        rows[key] = row * config.temperature
    return rows


def fit_ridge(inputs: Tensor, labels: Tensor, weights: Tensor, num_adapters: int, penalty: float) -> Tensor:
    """W = gain · Yᵀ D X (Xᵀ D X + ρ I)⁻¹ with centred one-hot Y: closed form, (A, d).

    inputs (N, d) float32, labels (N,), weights (N,); ρ = penalty · mean square of the inputs · Σ weights. The gain is
    the one of `RIDGE_GAINS` with the least cross-entropy.
    """
    targets = F.one_hot(labels, num_adapters).float() - 1 / num_adapters
    weighted = inputs * weights[:, None]
    gram = weighted.T @ inputs
    scale = gram.diagonal().mean()
    gram.diagonal().add_(penalty * scale)
    rows: Tensor = torch.linalg.solve(gram, weighted.T @ targets).T.contiguous()
    losses = [float(_weighted_loss(gain * rows, inputs, labels, weights)) for gain in RIDGE_GAINS]
    return RIDGE_GAINS[losses.index(min(losses))] * rows


def fit_softmax(
    inputs: Tensor, labels: Tensor, weights: Tensor, start: Tensor, penalty: float, iterations: int
) -> Tensor:
    """Multinomial logistic regression with an L2 penalty by full-batch L-BFGS from `start`, (A, d). Deterministic."""
    rows = start.clone().requires_grad_()
    scale = inputs.square().mean()
    optimiser = torch.optim.LBFGS([rows], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = _weighted_loss(rows, inputs, labels, weights) + 0.5 * penalty * scale * rows.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimiser.step(closure)  # type: ignore[no-untyped-call]
    return rows.detach()


def _weighted_loss(rows: Tensor, inputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    losses = F.cross_entropy(inputs @ rows.T, labels, reduction="none")
    mean: Tensor = (losses * weights).sum() / weights.sum()
    return mean
