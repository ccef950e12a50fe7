"""Weights that are the same for every token of every request, fitted to a few training chats of all tasks together.

LoRA Soups (arXiv 2410.13025): one weight per layer and adapter, by gradient. LoRAHub (2307.13269): one per adapter, by
search without gradients. Both papers fit a set per task; a server does not know the task of a request, so here one set
serves all of them, which is what such a mixture is worth in a router's place.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from router_training.encoding import TokenSequence
from router_training.forward import mean_chat_loss
from router_training.roster import Roster
from router_training.scores import LayerWeightsBatch


@dataclass(frozen=True)
class SoupSettings:
    """Adam on the weights of LoRA Soups, from the uniform mixture, learning rate linear to 0."""

    steps: int = 60
    learning_rate: float = 0.03
    batch_size: int = 8
    """Chats per step; the calibration chats are walked in order, again from the start when they end."""


@dataclass(frozen=True)
class HubSettings:
    """LoRAHub's search with its published budget, bounds and penalty; a plain evolution strategy for its NGOpt."""

    evaluations: int = 40
    bound: float = 1.5
    """Weights lie within ± this."""
    penalty: float = 0.05
    """Of the mean absolute weight."""
    chats_per_task: int = 4
    """Every evaluation runs all of them; the paper has 5 examples of its one task."""
    step: float = 0.3
    """First standard deviation of a mutation."""
    seed: int = 0


PART_CHATS = 8
"""Chats of one forward pass of the search."""

EXPANSION = 1.5
"""Of the mutations after a success; after a failure they shrink by its fourth root, so that one success in five keeps
them (Rechenberg's rule)."""


def learn_layer_weights(
    roster: Roster,
    sequences: Sequence[TokenSequence],
    settings: SoupSettings,
    *,
    on_step: Callable[[float], None] = lambda _: None,
) -> Tensor:
    """Weights (layers, A) float32 of either sign, not normalised, that lower the mean loss of the chats; base model
    and adapters stay as they are. `on_step` gets the loss of each step."""
    num_adapters = len(roster.adapters)
    weights = torch.full((roster.routed.num_layers, num_adapters), 1 / num_adapters, requires_grad=True)
    optimiser = torch.optim.Adam([weights], lr=settings.learning_rate)
    for step in range(settings.steps):
        offsets = range(step * settings.batch_size, (step + 1) * settings.batch_size)
        members = [sequences[offset % len(sequences)] for offset in offsets]
        optimiser.param_groups[0]["lr"] = settings.learning_rate * (1 - step / settings.steps)
        loss = mean_chat_loss(roster.routed, members, LayerWeightsBatch(roster.routed.bank.snapshot, weights))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        on_step(loss.item())
    return weights.detach()


def search_weights(
    roster: Roster,
    sequences: Sequence[TokenSequence],
    settings: HubSettings,
    *,
    on_evaluation: Callable[[float], None] = lambda _: None,
) -> list[float]:
    """One weight per adapter by `minimise` on mean loss of the chats + penalty · mean |w|.

    The delta is the weighted sum of the adapters' deltas; LoRAHub's own code adds up A and B apart, which brings in
    products of one adapter's A with another's B.
    """

    @torch.inference_mode()
    def objective(weights: Sequence[float]) -> float:
        rows = torch.tensor([list(weights)] * roster.routed.num_layers)
        routing = LayerWeightsBatch(roster.routed.bank.snapshot, rows)
        parts = [sequences[start : start + PART_CHATS] for start in range(0, len(sequences), PART_CHATS)]
        losses = [len(part) * float(mean_chat_loss(roster.routed, part, routing)) for part in parts]
        value = sum(losses) / len(sequences) + settings.penalty * sum(map(abs, weights)) / len(weights)
        on_evaluation(value)
        return value

    return minimise(objective, len(roster.adapters), settings)


def minimise(objective: Callable[[Sequence[float]], float], num_weights: int, settings: HubSettings) -> list[float]:
    """The best of `settings.evaluations` points by a (1+1) evolution strategy from all zeros, within the bounds."""
    generator = random.Random(settings.seed)
    best, step = [0.0] * num_weights, settings.step
    value = objective(best)
    for _ in range(settings.evaluations - 1):
        moved = [weight + step * generator.gauss(0, 1) for weight in best]
        candidate = [max(-settings.bound, min(settings.bound, weight)) for weight in moved]
        found = objective(candidate)
        if found < value:
            best, value, step = candidate, found, step * EXPANSION
        else:
            step *= EXPANSION**-0.25
    return best
