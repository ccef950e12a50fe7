"""Stage 1 of joint training: hard routing by domain. Every token runs under its own domain's adapter and no other.

One adapter after the other, each with an optimiser of its own, so that each becomes what ordinary LoRA training on its
domain makes of it, whatever the others are. A step is a pure function of (settings, sequences, parameters, optimiser
state, step number), as in `trainer`.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from router_training.encoding import TokenSequence, collate
from router_training.forward import answer_losses
from router_training.joint_settings import JointConfig
from router_training.roster import FIRST_SLOT
from router_training.trainable import TrainableAdapter, TrainableAdapters
from router_training.trainer import (
    StepMetrics,
    chat_weights,
    check_finite,
    members_of_step,
    micro_batches,
    scheduled_rate,
)
from server.errors import ConfigError
from server.routing.attach import RoutedModel
from server.routing.context import build_gate_batch
from server.routing.policy import BASE_PLAN, GatePlan, Policy, fixed_plan


class HardTrainer:
    """Owner of the optimiser's state during the hard stage."""

    def __init__(
        self,
        routed: RoutedModel,
        adapters: TrainableAdapters,
        sequences: Sequence[TokenSequence],
        config: JointConfig,
    ) -> None:
        """Only chats of a single domain count. Raises ConfigError for an adapter without any."""
        self.next_step = 0
        self._routed = routed
        self._adapters = adapters
        self._config = config
        slots = range(FIRST_SLOT, FIRST_SLOT + len(adapters.adapters))
        self._own = {slot: [s for s in sequences if s.label == slot and not s.label_changes] for slot in slots}
        names = {slot: adapter.name for slot, adapter in zip(slots, adapters.adapters, strict=True)}
        if config.hard_steps and (bare := [names[slot] for slot, own in self._own.items() if not own]):
            raise ConfigError(f"the mix has no chat of {', '.join(bare)} alone; raise --samples or lower --composite")
        self._plans: list[GatePlan] = [
            BASE_PLAN,
            *(fixed_plan(Policy.PINNED, {slot: 1.0}, {slot: names[slot]}) for slot in slots),
        ]
        self._optimiser: torch.optim.Optimizer | None = None

    @property
    def num_steps(self) -> int:
        return self._config.hard_steps * len(self._adapters.adapters)

    def run(self, on_step: Callable[[StepMetrics], None] = lambda _: None) -> None:
        """All steps that are left."""
        while self.next_step < self.num_steps:
            on_step(self.step())

    def step(self) -> StepMetrics:
        """One optimiser step of one adapter. Raises TrainingDivergedError."""
        started, config = time.perf_counter(), self._config
        index, step = divmod(self.next_step, config.hard_steps)
        adapter = self._adapters.adapters[index]
        if step == 0 or self._optimiser is None:
            self._optimiser = self._new_optimiser(adapter)
        slot = index + FIRST_SLOT
        members = members_of_step(self._own[slot], step, config.batch_size)
        self._optimiser.zero_grad(set_to_none=True)
        loss = self._backward(members, slot)
        norm = float(torch.nn.utils.clip_grad_norm_(adapter.parameters, config.max_gradient_norm))
        check_finite(self.next_step, loss, [norm], "--hard-lr")
        rate = scheduled_rate(step, config.hard_steps, config.hard_learning_rate, config.warmup_fraction)
        self._optimiser.param_groups[0]["lr"] = rate
        self._optimiser.step()
        self.next_step += 1
        return StepMetrics(
            step=self.next_step - 1,
            mode=f"hard {adapter.name}",
            loss=loss,
            lm_loss=loss,
            balance=None,
            entropy=None,
            adapter_id=None,
            learning_rate=rate,
            gradient_norm=norm,
            tokens=sum(map(len, members)),
            seconds=time.perf_counter() - started,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything a later run needs to continue after the last step."""
        return {
            "next_step": self.next_step,
            "adapters": self._adapters.state(),
            "optimiser": None if self._optimiser is None else self._optimiser.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.next_step = state["next_step"]
        self._adapters.load_state(state["adapters"])
        if state["optimiser"] is not None:
            index = (self.next_step - 1) // self._config.hard_steps
            self._optimiser = self._new_optimiser(self._adapters.adapters[index])
            self._optimiser.load_state_dict(state["optimiser"])

    def _backward(self, members: Sequence[TokenSequence], slot: int) -> float:
        """Gradients of the mean over chats of the mean loss of their answer tokens; that loss."""
        total = 0.0
        for part in micro_batches(members):
            batch = collate(part)
            bank = self._adapters.snapshot(self._routed.bank.dtype, slot)
            gates = build_gate_batch(self._plans, batch.token_labels, bank=bank, routers=self._routed.routers)
            loss = (answer_losses(self._routed, batch, gates) * chat_weights(part, len(members))).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total

    def _new_optimiser(self, adapter: TrainableAdapter) -> torch.optim.Optimizer:
        return torch.optim.AdamW(adapter.parameters, lr=self._config.hard_learning_rate, weight_decay=0.0)
