"""Stage B: the router end to end through the frozen model, with LM loss, RSL and adapter-id cross-entropy.

In joint training the adapters learn beside it, under the preservation penalty.

A step is a pure function of (settings, sequences, parameters, optimiser state, step number): batches and learning rate
follow from the step number alone, so a run can be cut and continued at any step.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from router_training.encoding import IGNORED, TokenBatch, TokenSequence, collate
from router_training.forward import answer_logits
from router_training.gates import RouterParameters, TrainingBatch
from router_training.loss import RouterLosses, distilled_losses, router_losses
from router_training.settings import TrainingConfig
from router_training.trainable import Preservation, TrainableAdapters
from server.errors import LoraMixerError
from server.routing.attach import RoutedModel
from server.routing.context import RoutingBatch

MICRO_BATCHES = 2
"""Parts a batch is computed in, sorted by length: halves the padding. The losses are still those of the whole batch."""

FINAL_LEARNING_RATE_RATIO = 0.1
"""The cosine ends here and not at 0, so that the straight-through steps at the end still move the router."""


Guide = Callable[[Sequence[TokenSequence], int], tuple[Tensor, Tensor]]
"""(sequences, padded length) -> gates (T, E) and (T,) bool where they hold; see `gates.TrainingBatch`."""


class TrainingDivergedError(LoraMixerError):
    """The loss or its gradient is not a finite number; router and optimiser are as they were before the step."""

    default_code = "training_diverged"


@dataclass(frozen=True)
class StepMetrics:
    """What one optimiser step did; one line of the metrics file."""

    step: int
    mode: str
    """`dense`, `straight_through`, or in joint training `hard NAME` for the adapter that learns by itself."""
    loss: float
    lm_loss: float
    """Mean over chats of the mean loss of the answer's tokens, in nats or relative: negative log-likelihood, with
    `distil` in part divergence from the own adapter."""
    balance: float | None
    """This and the next two are None in hard steps, which have no router."""
    entropy: float | None
    adapter_id: float | None
    learning_rate: float
    gradient_norm: float
    tokens: int
    """Real tokens of the batch, padding left out."""
    seconds: float
    preservation: float = 0.0
    """β Σ‖θ - θ₀‖² before the step, not part of `loss` because it acts past the optimiser; 0 with frozen adapters."""


@dataclass(frozen=True, eq=False)
class SoftAdapters:
    """Adapters that learn beside the router."""

    adapters: TrainableAdapters
    learning_rate: float
    """Peak step size."""
    preservation: Preservation


class Trainer:
    """Owner of the router's parameters and of the optimiser's state during one run."""

    def __init__(
        self,
        routed: RoutedModel,
        router: RouterParameters,
        sequences: Sequence[TokenSequence],
        config: TrainingConfig,
        *,
        prior: Tensor | None = None,
        task_losses: Mapping[int, float] | None = None,
        teacher: Callable[[TokenBatch], RoutingBatch | None] | None = None,
        guide: Guide | None = None,
        soft: SoftAdapters | None = None,
    ) -> None:
        """`prior` (C,) is the balance term's, uniform by default. `task_losses` holds, for `lm_weighting: relative`,
        the loss by label, in nats per answer token, that a chat's loss is divided by. `teacher` makes, for `distil`,
        the gates that the router is to come close to: each token's own adapter. `guide` has the prompt gate's decisions
        for a batch. With `soft` the adapters learn too;
        without, they are the published bank's and frozen."""
        if config.lm_weighting == "relative" and task_losses is None:
            raise ValueError("relative weighting needs the tasks' own losses")
        if config.distil and teacher is None:
            raise ValueError("distillation needs a teacher's gates")
        self.router = router
        self.next_step = 0
        self._routed = routed
        self._sequences = sequences
        self._config = config
        self._prior = prior
        self._task_losses = task_losses if config.lm_weighting == "relative" else None
        self._teacher = teacher if config.distil else None
        self._guide = guide
        self._soft = soft
        self._peaks = [config.learning_rate, *([soft.learning_rate] if soft else [])]
        groups = [router.parameters, *([soft.adapters.parameters] if soft else [])]
        self._optimiser = torch.optim.AdamW(
            [{"params": group, "lr": peak} for group, peak in zip(groups, self._peaks, strict=True)], weight_decay=0.0
        )

    def run(self, on_step: Callable[[StepMetrics], None] = lambda _: None) -> None:
        """All steps that are left. Raises TrainingDivergedError, after the last one too."""
        while self.next_step < self._config.steps:
            on_step(self.step())
        if not all(rows.isfinite().all() for rows in self.router.detached().values()):
            raise TrainingDivergedError(
                "gate rows are no numbers at the end of training; start again with a lower --lr"
            )

    def step(self) -> StepMetrics:
        """One optimiser step. Raises TrainingDivergedError."""
        started, step, config = time.perf_counter(), self.next_step, self._config
        mode = "straight_through" if step >= config.straight_through_from else "dense"
        members = members_of_step(self._sequences, step, config.batch_size)
        lm_loss, losses = self._losses(members, mode)
        loss = lm_loss + losses.total(
            alpha=config.alpha, lambda_=config.lambda_at(step), sign=config.sign, eta=config.eta
        )
        preservation = self._soft.preservation.penalty(self._soft.adapters) if self._soft else 0.0
        norm = self._update(loss)
        self.next_step += 1
        return StepMetrics(
            step=step,
            mode=mode,
            loss=loss.item(),
            lm_loss=lm_loss.item(),
            balance=losses.balance.item(),
            entropy=losses.entropy.item(),
            adapter_id=losses.adapter_id.item(),
            learning_rate=learning_rate_at(step, config),
            gradient_norm=norm,
            tokens=sum(map(len, members)),
            seconds=time.perf_counter() - started,
            preservation=preservation,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything a later run needs to continue after the last step."""
        return {
            "next_step": self.next_step,
            "rows": self.router.detached(),
            "optimiser": self._optimiser.state_dict(),
            **({"adapters": self._soft.adapters.state()} if self._soft else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.next_step = state["next_step"]
        with torch.no_grad():
            for key, row in self.router.rows.items():
                row.copy_(state["rows"][key])
        if self._soft:
            self._soft.adapters.load_state(state["adapters"])
        self._optimiser.load_state_dict(state["optimiser"])

    def _update(self, loss: Tensor) -> float:
        """One step of the optimiser; the norm of the router's gradient before it is cut. Each group has its own norm:
        the router's gradient is by far the larger and would scale the adapters' down."""
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norms = [
            float(torch.nn.utils.clip_grad_norm_(group["params"], self._config.max_gradient_norm))
            for group in self._optimiser.param_groups
        ]
        check_finite(self.next_step, loss.item(), norms, "--lr")
        for group, peak in zip(self._optimiser.param_groups, self._peaks, strict=True):
            group["lr"] = learning_rate_at(self.next_step, self._config, peak)
        self._optimiser.step()
        if self._soft:
            self._soft.preservation.pull(self._soft.adapters, self._optimiser.param_groups[1]["lr"])
        return norms[0]

    def _losses(self, members: Sequence[TokenSequence], mode: Any) -> tuple[Tensor, RouterLosses]:
        """LM loss and router losses of a whole batch, each chat with the same weight."""
        config, bank = self._config, self._routed.bank
        snapshot = self._soft.adapters.snapshot(bank.dtype) if self._soft else bank.snapshot
        lm_losses, logits, labels, weights, scales = [], [], [], [], []
        for part in micro_batches(members):
            batch = collate(part)
            routing = TrainingBatch(
                snapshot,
                self.router,
                mode,
                top_k=config.top_k,
                temperature=config.temperature,
                fixed=self._guide(part, batch.token_ids.shape[1]) if self._guide else None,
            )
            lm_losses.append(self._lm_losses(batch, routing))
            positions = batch.answer_positions
            logits.append(routing.stacked_logits(positions))
            labels.append(batch.token_labels[positions])
            scales.append(self._scales(labels[-1]))
            weights.append(chat_weights(part, len(members)))
        weight = torch.cat(weights)
        choices = torch.cat(labels) - self.router.first_slot
        losses = router_losses(torch.cat(logits, dim=1), choices, config.top_k, config.temperature, weight, self._prior)
        return (torch.cat(lm_losses) * torch.cat(scales) * weight).sum(), losses

    def _lm_losses(self, batch: TokenBatch, routing: TrainingBatch) -> Tensor:
        """LM loss of every answer token, (N,)."""
        targets = batch.targets[batch.targets != IGNORED]
        if self._teacher is None:
            return F.cross_entropy(answer_logits(self._routed, batch, routing), targets, reduction="none")
        with torch.no_grad():
            wanted = answer_logits(self._routed, batch, self._teacher(batch))
        return distilled_losses(answer_logits(self._routed, batch, routing), targets, wanted, self._config.distil)

    def _scales(self, labels: Tensor) -> Tensor:
        """What the loss of each answer token is multiplied by, (N,)."""
        if self._task_losses is None:
            return torch.ones(len(labels))
        return torch.tensor([1 / self._task_losses[label] for label in labels.tolist()])


def check_finite(step: int, loss: float, norms: Sequence[float], flag: str) -> None:
    """Before an optimiser steps: it would make every row not a number. Raises TrainingDivergedError."""
    if not all(map(math.isfinite, [loss, *norms])):
        raise TrainingDivergedError(
            f"step {step}: the loss ({loss:g}) or its gradient (norm {max(norms):g}) is not a finite number, so "
            f"nothing was learned from it; start again with a lower {flag}, or with whichever setting is far from its "
            "default, in another --out or without the checkpoint in this one"
        )


def members_of_step(sequences: Sequence[TokenSequence], step: int, batch_size: int) -> list[TokenSequence]:
    """The chats of a step, longest last; the sequences are walked in order, again from the start when they end."""
    members = [sequences[(step * batch_size + offset) % len(sequences)] for offset in range(batch_size)]
    return sorted(members, key=len)


def micro_batches(members: Sequence[TokenSequence]) -> Iterator[Sequence[TokenSequence]]:
    """The chats of a step in `MICRO_BATCHES` parts of neighbouring lengths."""
    part_size = math.ceil(len(members) / MICRO_BATCHES)
    for start in range(0, len(members), part_size):
        yield members[start : start + part_size]


def chat_weights(part: Sequence[TokenSequence], num_chats: int) -> Tensor:
    """Weight of each answer token of `part`, (N,), such that every chat of a step of `num_chats` counts the same, and
    within a composite chat every task: a one-word answer behind a long one is as much of a task as that one."""
    weights = []
    for sequence in part:
        labels = sequence.answer_labels
        counts = Counter(labels)
        weights += [1 / (counts[label] * len(counts) * num_chats) for label in labels]
    return torch.tensor(weights)


def learning_rate_at(step: int, config: TrainingConfig, peak: float | None = None) -> float:
    """The schedule of the router, or of another `peak`, over `config.steps`."""
    return scheduled_rate(step, config.steps, config.learning_rate if peak is None else peak, config.warmup_fraction)


def scheduled_rate(step: int, steps: int, peak: float, warmup_fraction: float) -> float:
    """Linear rise over the warm-up, then cosine to `FINAL_LEARNING_RATE_RATIO` of the peak."""
    warmup = round(steps * warmup_fraction)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    ratio = FINAL_LEARNING_RATE_RATIO + (1 - FINAL_LEARNING_RATE_RATIO) * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * ratio
