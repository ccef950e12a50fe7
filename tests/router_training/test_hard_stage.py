"""The hard stage against ordinary LoRA training by PEFT and torch, one adapter by itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from router_training.encoding import IGNORED, TokenSequence, collate
from router_training.forward import prepare_for_training
from router_training.hard_stage import HardTrainer
from router_training.joint_settings import JointConfig
from router_training.roster import Roster
from router_training.trainable import TrainableAdapters, fresh_adapters
from router_training.trainer import StepMetrics, TrainingDivergedError, scheduled_rate
from server.errors import ConfigError

Sequences = Callable[..., list[TokenSequence]]
CONFIG = JointConfig(
    rank=4, lora_alpha=8, targets=("q_proj", "v_proj"), hard_steps=5, hard_learning_rate=0.02, batch_size=4
)


def fresh(roster: Roster, names: tuple[str, ...] = ("alpha", "beta", "gamma")) -> TrainableAdapters:
    infos = roster.routed.projections.values()
    return fresh_adapters(names, infos, targets=CONFIG.targets, rank=4, scaling=2.0, seed=3)


def peft_trained(model: Any, start: dict[str, torch.Tensor], own: list[TokenSequence]) -> dict[str, torch.Tensor]:
    """Train PEFT's adapter from `start` on `own` with plain batches, losses and AdamW."""
    from peft import LoraConfig, get_peft_model

    prepare_for_training(model)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(CONFIG.targets), lora_dropout=0.0)
    adapted: Any = get_peft_model(model, config)
    parameters = {
        name.removeprefix("base_model.model.")
        .replace(".lora_A.default.weight", ".A")
        .replace(".lora_B.default.weight", ".B"): parameter
        for name, parameter in adapted.named_parameters()
        if "lora_" in name
    }
    assert parameters.keys() == start.keys()
    for name, parameter in parameters.items():
        parameter.data.copy_(start[name])
    optimiser = torch.optim.AdamW(parameters.values(), weight_decay=0.0)
    for step in range(CONFIG.hard_steps):
        chats = [own[(step * CONFIG.batch_size + offset) % len(own)] for offset in range(CONFIG.batch_size)]
        loss = torch.zeros(())
        for chat in chats:  # one by one, unpadded
            batch = collate([chat])
            logits = adapted(input_ids=batch.token_ids).logits
            loss = loss + F.cross_entropy(logits[0], batch.targets[0], ignore_index=IGNORED) / len(chats)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), CONFIG.max_gradient_norm)
        optimiser.param_groups[0]["lr"] = scheduled_rate(step, 5, 0.02, CONFIG.warmup_fraction)
        optimiser.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def test_a_loss_that_is_no_number_leaves_the_adapters(roster: Roster, make_sequences: Sequences) -> None:
    adapters = fresh(roster)
    trainer = HardTrainer(roster.routed, adapters, make_sequences(18), CONFIG)
    trainer.step()
    with torch.no_grad():
        next(iter(adapters.adapters[0].parameters)).fill_(torch.inf)
    before = adapters.state()
    with pytest.raises(TrainingDivergedError, match=r"step 1: .* lower --hard-lr"):
        trainer.run()
    for name, state in adapters.state().items():
        assert all(torch.equal(value, before[name][key]) for key, value in state.items())


def test_the_hard_stage_trains_each_adapter_as_peft_trains_it_alone(
    roster: Roster, make_sequences: Sequences, tiny_llama: Callable[..., Any]
) -> None:
    sequences = make_sequences(18)
    adapters = fresh(roster)
    start = adapters.state()
    HardTrainer(roster.routed, adapters, sequences, CONFIG).run()
    for slot, adapter in enumerate(adapters.adapters, start=1):
        own = [sequence for sequence in sequences if sequence.label == slot]
        expected = peft_trained(tiny_llama(), start[adapter.name], own)
        for name, parameter in adapter.named_parameters().items():
            # Adam turns rounding of near-zero gradients into steps; a fiftieth of the way gone is agreement.
            assert (parameter - expected[name]).abs().mean() < 2e-4, name
            assert (expected[name] - start[adapter.name][name]).abs().mean() > 1e-2, name


def test_the_other_adapters_make_no_difference(make_roster: Callable[[], Roster], make_sequences: Sequences) -> None:
    sequences = make_sequences(18)
    together = fresh(roster := make_roster())
    HardTrainer(roster.routed, together, sequences, CONFIG).run()
    alone = fresh(roster := make_roster(), ("alpha",))
    only_own = [sequence for sequence in sequences if sequence.label == 1]
    HardTrainer(roster.routed, alone, only_own, CONFIG).run()
    for mine, other in zip(together.adapters[0].parameters, alone.adapters[0].parameters, strict=True):
        assert torch.equal(mine, other)


def test_the_loss_of_every_adapter_falls_and_the_router_terms_are_absent(
    roster: Roster, make_sequences: Sequences
) -> None:
    steps: list[StepMetrics] = []
    config = CONFIG.model_copy(update={"hard_steps": 20})
    HardTrainer(roster.routed, fresh(roster), make_sequences(12), config).run(steps.append)
    assert [step.step for step in steps] == list(range(60))
    for number, name in enumerate(("alpha", "beta", "gamma")):
        own = steps[20 * number : 20 * number + 20]
        assert {step.mode for step in own} == {f"hard {name}"}
        assert own[-1].lm_loss < 0.8 * own[0].lm_loss
        assert all(step.entropy is None for step in own)


@pytest.mark.parametrize("cut", [3, 5, 7])
def test_a_cut_hard_stage_continues_as_if_never_cut(roster: Roster, make_sequences: Sequences, cut: int) -> None:
    whole, first, second = fresh(roster), fresh(roster), fresh(roster)
    HardTrainer(roster.routed, whole, make_sequences(12), CONFIG).run()
    trainer = HardTrainer(roster.routed, first, make_sequences(12), CONFIG)
    for _ in range(cut):
        trainer.step()
    continued = HardTrainer(roster.routed, second, make_sequences(12), CONFIG)
    continued.load_state_dict(trainer.state_dict())
    continued.run()
    for mine, other in zip(whole.parameters, second.parameters, strict=True):
        assert torch.equal(mine, other)


def test_an_adapter_without_a_chat_of_its_own_is_refused_by_name(roster: Roster, make_sequences: Sequences) -> None:
    with pytest.raises(ConfigError, match="no chat of beta, gamma alone"):
        HardTrainer(roster.routed, fresh(roster), make_sequences(1), CONFIG)
