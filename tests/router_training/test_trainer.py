"""End-to-end steps: who learns, who stays frozen, determinism, and cutting a run."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from router_training.encoding import TokenBatch, TokenSequence, collate
from router_training.evaluation import gate_batch
from router_training.forward import answer_logits, answer_losses
from router_training.gates import RouterParameters, TrainingBatch
from router_training.roster import Roster
from router_training.settings import TrainingConfig
from router_training.trainer import StepMetrics, Trainer, TrainingDivergedError, chat_weights, learning_rate_at
from server.routing.context import RoutingBatch
from server.routing.router import Granularity

Sequences = Callable[..., list[TokenSequence]]


def make_trainer(
    roster: Roster,
    sequences: list[TokenSequence],
    *,
    granularity: Granularity = "layer",
    prior: Tensor | None = None,
    task_losses: dict[int, float] | None = None,
    teacher: Callable[[TokenBatch], RoutingBatch | None] | None = None,
    **settings: Any,
) -> Trainer:
    config = TrainingConfig.model_validate(
        {
            "granularity": granularity,
            "steps": 6,
            "batch_size": 6,
            "learning_rate": 0.05,
            "straight_through_fraction": 1 / 3,
            **settings,
        }
    )
    router = RouterParameters.zeros(
        roster.gated_projections(),
        granularity,
        len(roster.adapters),
        hidden_size=roster.routed.hidden_size,
        null_expert=config.null_expert,
    )
    return Trainer(roster.routed, router, sequences, config, prior=prior, task_losses=task_losses, teacher=teacher)


def checksum(roster: Roster) -> str:
    """sha256 over every weight of base and adapters."""
    sha = hashlib.sha256()
    for parameter in roster.routed.model.parameters():
        sha.update(parameter.detach().numpy().tobytes())
    for bank in roster.routed.bank.snapshot.projections.values():
        for tensor in (bank.a, bank.b, bank.owner):
            sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


@pytest.mark.parametrize("granularity", ["layer", "projection"])
def test_only_the_router_learns(roster: Roster, make_sequences: Sequences, granularity: Granularity) -> None:
    before = checksum(roster)
    trainer = make_trainer(roster, make_sequences(24), granularity=granularity)
    trainer.run()
    assert checksum(roster) == before
    assert all(parameter.grad is None for parameter in roster.routed.model.parameters())
    assert all(isinstance(row, nn.Parameter) and row.abs().max() > 0 for row in trainer.router.parameters)


def mean_of(name: str, steps: list[StepMetrics]) -> float:
    return sum(float(getattr(metrics, name)) for metrics in steps) / len(steps)


@pytest.mark.parametrize("granularity", ["layer", "projection"])
def test_training_lowers_the_loss_and_ends_on_serving_gates(
    roster: Roster, make_sequences: Sequences, granularity: Granularity
) -> None:
    steps: list[StepMetrics] = []
    make_trainer(roster, make_sequences(24), granularity=granularity, steps=24).run(steps.append)
    assert mean_of("lm_loss", steps[-4:]) < mean_of("lm_loss", steps[:4])  # 4 batches are one pass
    assert [metrics.mode for metrics in steps] == ["dense"] * 16 + ["straight_through"] * 8


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run_and_leaves_the_rows(
    roster: Roster, make_sequences: Sequences, monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    trainer = make_trainer(roster, make_sequences(24))
    trainer.step()
    before = {key: row.clone() for key, row in trainer.router.detached().items()}
    own = trainer._lm_losses
    monkeypatch.setattr(trainer, "_lm_losses", lambda batch, routing: own(batch, routing) * wrong)
    with pytest.raises(TrainingDivergedError, match=r"step 1: .* lower --lr"):
        trainer.run()
    assert trainer.next_step == 1
    assert all(torch.equal(row, before[key]) for key, row in trainer.router.detached().items())


def test_adapter_id_loss_leads_each_token_to_its_own_adapter(roster: Roster, make_sequences: Sequences) -> None:
    steps: list[StepMetrics] = []
    make_trainer(roster, make_sequences(24), steps=24, eta=50.0).run(steps.append)
    assert steps[0].adapter_id == pytest.approx(math.log(3), abs=1e-5)
    assert mean_of("adapter_id", steps[-4:]) < 0.8 * math.log(3)


def test_prompt_positions_get_gradient_from_the_answer_through_attention(
    roster: Roster, make_sequences: Sequences
) -> None:
    batch = collate(make_sequences(1))
    router = RouterParameters.zeros(roster.gated_projections(), "layer", 3, hidden_size=roster.routed.hidden_size)
    training = TrainingBatch(roster.routed.bank.snapshot, router, "dense", top_k=2, temperature=1.0)
    loss = answer_losses(roster.routed, batch, training).sum()
    (gradient,) = torch.autograd.grad(loss, training.logits["layer.0"])
    first_answer = int(batch.answer_positions.nonzero()[0])
    assert first_answer > 0
    assert (gradient[:first_answer].abs().sum(dim=1) > 0).all()


def test_same_seed_same_rows_to_the_bit(make_roster: Callable[[], Roster], make_sequences: Sequences) -> None:
    rows = []
    for _ in range(2):
        trainer = make_trainer(make_roster(), make_sequences(24))
        trainer.run()
        rows.append(trainer.router.detached())
    assert all(torch.equal(rows[0][key], rows[1][key]) for key in rows[0])


def test_a_run_cut_between_steps_continues_to_the_same_rows(roster: Roster, make_sequences: Sequences) -> None:
    sequences = make_sequences(24)
    whole = make_trainer(roster, sequences)
    whole.run()
    first = make_trainer(roster, sequences)
    for _ in range(4):
        first.step()
    second = make_trainer(roster, sequences)
    second.load_state_dict(first.state_dict())
    second.run()
    for key, row in whole.router.rows.items():
        assert torch.equal(row, second.router.rows[key])


def test_sign_steers_the_entropy_of_the_gates(make_roster: Callable[[], Roster], make_sequences: Sequences) -> None:
    entropy = {}
    for sign in (1, -1):
        steps: list[StepMetrics] = []
        settings: dict[str, Any] = {"steps": 20, "sign": sign, "lambda_": 3.0, "lambda_ramp_fraction": 0.0, "eta": 0.0}
        make_trainer(make_roster(), make_sequences(24), straight_through_fraction=0.0, **settings).run(steps.append)
        entropy[sign] = mean_of("entropy", steps[-1:])
    assert entropy[1] < entropy[-1]


def test_each_chat_weighs_the_same_whatever_the_length_of_its_answer(roster: Roster, make_sequences: Sequences) -> None:
    sequences = make_sequences(6)
    together = make_trainer(roster, sequences).step().lm_loss
    alone = [make_trainer(roster, [sequence], batch_size=1).step().lm_loss for sequence in sequences]
    assert together == pytest.approx(sum(alone) / len(alone), abs=1e-4)


def test_each_task_of_a_composite_chat_weighs_the_same() -> None:
    joined = TokenSequence(tuple(range(12)), 4, 1, label_changes=((10, 2),))
    weights = chat_weights([joined, TokenSequence((1, 2, 3), 2, 3)], 4)
    assert joined.answer_labels == [1] * 7 + [2]
    assert torch.allclose(weights, torch.tensor([1 / 56] * 7 + [1 / 8, 1 / 4]))


def test_learning_rate_rises_then_falls_to_a_tenth() -> None:
    config = TrainingConfig(steps=100, learning_rate=1.0, warmup_fraction=0.1)
    rates = [learning_rate_at(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_lambda_ramps_up_and_then_stays() -> None:
    config = TrainingConfig(steps=100, lambda_=0.5, lambda_ramp_fraction=0.2)
    assert config.lambda_at(0) == pytest.approx(0.025)
    assert config.lambda_at(19) == pytest.approx(0.5)
    assert config.lambda_at(99) == pytest.approx(0.5)


def test_relative_weighting_divides_each_chat_by_what_its_own_adapter_reaches(
    roster: Roster, make_sequences: Sequences
) -> None:
    sequences = make_sequences(3)
    alone = [make_trainer(roster, [sequence], batch_size=1).step().lm_loss for sequence in sequences]
    own = {1: 0.5, 2: 4.0, 3: 1.0}
    relative = make_trainer(roster, sequences, batch_size=3, lm_weighting="relative", task_losses=own).step().lm_loss
    assert relative == pytest.approx(sum(loss / own[i + 1] for i, loss in enumerate(alone)) / 3, abs=1e-4)
    with pytest.raises(ValueError, match="own losses"):
        make_trainer(roster, sequences, lm_weighting="relative")


def test_a_prior_lets_an_adapter_have_more_of_the_traffic(
    make_roster: Callable[[], Roster], make_sequences: Sequences
) -> None:
    share = {}
    for favourite in (0, 2):
        prior = torch.full((3,), 0.1)
        prior[favourite] = 0.8
        roster = make_roster()
        trainer = make_trainer(roster, make_sequences(24), prior=prior, steps=20, alpha=5.0, eta=0.0)
        trainer.run()
        batch = collate(make_sequences(12))
        routing = TrainingBatch(roster.routed.bank.snapshot, trainer.router, "dense", top_k=2, temperature=1.0)
        answer_losses(roster.routed, batch, routing)
        share[favourite] = torch.softmax(routing.stacked_logits(batch.answer_positions), -1).mean(dim=(0, 1))
    assert share[0][0] > share[2][0]
    assert share[2][2] > share[0][2]


def test_a_null_expert_is_trained_like_an_adapter(roster: Roster, make_sequences: Sequences) -> None:
    sequences = [replace(sequence, label=0) for sequence in make_sequences(24)]
    steps: list[StepMetrics] = []
    trainer = make_trainer(roster, sequences, null_expert=True, steps=24, eta=20.0)
    trainer.run(steps.append)
    assert steps[0].adapter_id == pytest.approx(math.log(4), abs=1e-5)
    assert mean_of("adapter_id", steps[-4:]) < 0.5 * math.log(4)
    assert all(row.shape[0] == 4 for row in trainer.router.parameters)


def own_gates(roster: Roster) -> Callable[[TokenBatch], RoutingBatch | None]:
    plans = roster.own_adapter_plans()
    return lambda batch: gate_batch(roster.routed, batch, plans)


def test_distillation_measures_the_divergence_from_the_own_adapter(roster: Roster, make_sequences: Sequences) -> None:
    sequences = make_sequences(6)
    trainer = make_trainer(roster, sequences, distil=1.0, teacher=own_gates(roster))
    batch = collate(sorted(sequences, key=len))
    uniform = TrainingBatch(roster.routed.bank.snapshot, trainer.router, "dense", top_k=2, temperature=1.0)
    student = torch.distributions.Categorical(logits=answer_logits(roster.routed, batch, uniform))
    teacher = torch.distributions.Categorical(logits=answer_logits(roster.routed, batch, own_gates(roster)(batch)))
    per_token = torch.distributions.kl_divergence(teacher, student)
    rows = batch.answer_positions.view(batch.token_ids.shape).nonzero()[:, 0]
    expected = float(torch.stack([per_token[rows == row].mean() for row in range(6)]).mean().detach())
    assert trainer.step().lm_loss == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="teacher"):
        make_trainer(roster, sequences, distil=0.5)


def test_distillation_brings_the_router_closer_to_the_own_adapters(roster: Roster, make_sequences: Sequences) -> None:
    before = checksum(roster)
    steps: list[StepMetrics] = []
    options: dict[str, Any] = {"steps": 24, "straight_through_fraction": 0.0, "eta": 0.0, "alpha": 0.0, "lambda_": 0.0}
    make_trainer(roster, make_sequences(24), distil=1.0, teacher=own_gates(roster), **options).run(steps.append)
    assert 0 < mean_of("lm_loss", steps[-4:]) < 0.95 * mean_of("lm_loss", steps[:4])
    assert checksum(roster) == before
