"""Adapters as parameters: they are the server's adapters, and a soft step moves them, the router, and nothing else."""

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from router_training.encoding import TokenSequence
from router_training.gates import RouterParameters
from router_training.roster import Roster
from router_training.settings import TrainingConfig
from router_training.trainable import Preservation, TrainableAdapters, fresh_adapters, loaded_adapters
from router_training.trainer import SoftAdapters, StepMetrics, Trainer
from server.errors import ConfigError
from server.routing import ops

Sequences = Callable[..., list[TokenSequence]]


def soft_trainer(
    roster: Roster,
    sequences: list[TokenSequence],
    *,
    beta: float = 0.0,
    constrained: tuple[str, ...] = ("alpha", "beta", "gamma"),
    **settings: Any,
) -> tuple[Trainer, TrainableAdapters]:
    config = TrainingConfig.model_validate({"steps": 6, "batch_size": 6, "learning_rate": 0.05, **settings})
    router = RouterParameters.zeros(
        roster.gated_projections(), "layer", len(roster.adapters), hidden_size=roster.routed.hidden_size
    )
    adapters = loaded_adapters(roster.adapters)
    soft = SoftAdapters(adapters, 0.01, Preservation(adapters.state(), constrained, beta))
    return Trainer(roster.routed, router, sequences, config, soft=soft), adapters


def checksum(roster: Roster) -> str:
    tensors = [*roster.routed.model.state_dict().values()]
    tensors += [t for bank in roster.routed.bank.snapshot.projections.values() for t in (bank.a, bank.b)]
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def test_loaded_adapters_are_laid_out_as_in_the_servers_bank(roster: Roster) -> None:
    snapshot = loaded_adapters(roster.adapters).snapshot(torch.float32)
    served = roster.routed.bank.snapshot
    assert snapshot.projections.keys() == served.projections.keys()
    for name, bank in snapshot.projections.items():
        rows = served.projections[name].num_rows
        assert bank.slots == served.projections[name].slots
        assert torch.equal(bank.owner, served.projections[name].owner[:rows])
        assert torch.equal(bank.a, served.projections[name].a[:rows])
        assert torch.equal(bank.b, served.projections[name].b[:, :rows])


def test_fresh_adapters_begin_as_pefts_do(roster: Roster) -> None:
    infos = list(roster.routed.projections.values())

    def fresh(seed: int) -> TrainableAdapters:
        return fresh_adapters(["one", "two"], infos, targets=["q_proj"], rank=4, scaling=2.0, seed=seed)

    adapters = fresh(0).adapters
    assert [len(adapter.a) for adapter in adapters] == [3, 3]
    for adapter in adapters:
        for name, a in adapter.a.items():
            bound = 1 / a.shape[1] ** 0.5  # Kaiming-uniform with a = √5
            assert a.shape == (4, 64)
            assert 0.9 * bound < float(a.detach().abs().max()) <= bound
            assert not adapter.b[name].any()
    again, other = fresh(0).state(), fresh(1).state()
    name = next(iter(adapters[0].a)) + ".A"
    assert torch.equal(again["one"][name], adapters[0].named_parameters()[name])
    assert not torch.equal(again["one"][name], again["two"][name])
    assert not torch.equal(again["one"][name], other["one"][name])


def test_a_target_that_the_base_lacks_is_refused_with_what_it_has(roster: Roster) -> None:
    infos = roster.routed.projections.values()
    with pytest.raises(ConfigError, match=r"no projection 'query'; it has .*q_proj"):
        fresh_adapters(["one"], infos, targets=["query", "q_proj"], rank=4, scaling=2.0, seed=0)


def test_gradients_reach_adapters_and_router_and_nothing_of_the_base(roster: Roster, make_sequences: Sequences) -> None:
    before = checksum(roster)
    trainer, adapters = soft_trainer(roster, make_sequences(12))
    start = adapters.state()
    trainer.step()
    for adapter in adapters.adapters:
        for name, parameter in adapter.named_parameters().items():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
            assert not torch.equal(parameter, start[adapter.name][name]), name
    assert all(row.grad is not None and row.grad.any() for row in trainer.router.parameters)
    assert all(parameter.grad is None for parameter in roster.routed.model.parameters())
    assert checksum(roster) == before


def test_a_soft_gradient_is_that_of_the_plain_sum_over_adapters(roster: Roster) -> None:
    """Σ_e p_e s_e B_e A_e x by autograd against the bank's concatenated products."""
    name = "model.layers.0.self_attn.v_proj"
    adapters = fresh_adapters(
        ["one", "two"], [roster.routed.projections[name]], targets=["v_proj"], rank=3, scaling=0.5, seed=0
    )
    generator = torch.Generator().manual_seed(0)
    for adapter in adapters.adapters:
        adapter.b[name].data.normal_(generator=generator)
    x = torch.randn(5, 64, generator=generator)
    gates = torch.softmax(torch.randn(5, 2, generator=generator), dim=-1)
    weights = torch.randn(5, adapters.adapters[0].b[name].shape[0], generator=generator)

    bank = adapters.snapshot(torch.float32).projections[name]
    (ops.lora_delta(x, bank.a, bank.b, bank.owner, F.pad(gates, (1, 0))) * weights).sum().backward()  # type: ignore[no-untyped-call]
    found = [parameter.grad for parameter in adapters.parameters]
    for parameter in adapters.parameters:
        parameter.grad = None
    parts = [
        gates[:, index, None] * 0.5 * (x @ adapter.a[name].T @ adapter.b[name].T)
        for index, adapter in enumerate(adapters.adapters)
    ]
    (torch.stack(parts).sum(dim=0) * weights).sum().backward()  # type: ignore[no-untyped-call]
    for mine, parameter in zip(found, adapters.parameters, strict=True):
        torch.testing.assert_close(mine, parameter.grad, atol=1e-5, rtol=1e-5)


def test_a_huge_beta_keeps_the_constrained_adapters_and_no_other(roster: Roster, make_sequences: Sequences) -> None:
    trainer, adapters = soft_trainer(roster, make_sequences(12), beta=1e12, constrained=("alpha", "gamma"))
    start = adapters.state()
    trainer.run()
    moved = adapters.distances(start)
    assert moved["alpha"] < 1e-12
    assert moved["gamma"] < 1e-12
    assert moved["beta"] > 1e-2


def test_without_beta_every_adapter_moves_and_a_small_one_holds_back(roster: Roster, make_sequences: Sequences) -> None:
    moved = {}
    for beta in (0.0, 20.0):
        trainer, adapters = soft_trainer(roster, make_sequences(12), beta=beta)
        start = adapters.state()
        steps: list[StepMetrics] = []
        trainer.run(steps.append)
        moved[beta] = adapters.distances(start)
        assert steps[0].preservation == 0
        assert (steps[-1].preservation > 0) == (beta > 0)
    assert all(0 < moved[20.0][name] < moved[0.0][name] for name in ("alpha", "beta", "gamma"))


def test_the_pull_is_the_proximal_map_of_the_penalty(roster: Roster) -> None:
    """argmin over u of β‖u - θ₀‖² + ‖u - θ‖² / 2η, found by its zero gradient."""
    adapters = loaded_adapters(roster.adapters)
    start = adapters.state()
    for parameter in adapters.parameters:
        parameter.data += 1.0
    moved = adapters.state()
    beta, rate = 3.0, 0.05
    preservation = Preservation(start, ("alpha",), beta)
    values = sum(value.numel() for value in start["alpha"].values())
    assert preservation.penalty(adapters) == pytest.approx(beta * values, rel=1e-5)
    preservation.pull(adapters, rate)
    for name, value in adapters.state()["alpha"].items():
        gradient = 2 * beta * (value - start["alpha"][name]) + (value - moved["alpha"][name]) / rate
        torch.testing.assert_close(gradient, torch.zeros_like(value), atol=1e-4, rtol=0)
    assert all(torch.equal(value, moved["beta"][name]) for name, value in adapters.state()["beta"].items())


def test_the_loss_falls_in_both_modes(roster: Roster, make_sequences: Sequences) -> None:
    trainer, _ = soft_trainer(roster, make_sequences(6), steps=30, straight_through_fraction=0.5)
    steps: list[StepMetrics] = []
    trainer.run(steps.append)
    assert {step.mode for step in steps} == {"dense", "straight_through"}
    assert steps[14].lm_loss < 0.8 * steps[0].lm_loss
    assert steps[-1].lm_loss < steps[15].lm_loss


def test_a_cut_soft_stage_continues_as_if_never_cut(
    make_roster: Callable[[], Roster], make_sequences: Sequences
) -> None:
    whole, adapters = soft_trainer(make_roster(), make_sequences(12), beta=5.0)
    whole.run()
    first, _ = soft_trainer(make_roster(), make_sequences(12), beta=5.0)
    for _ in range(3):
        first.step()
    second, continued = soft_trainer(make_roster(), make_sequences(12), beta=5.0)
    second.load_state_dict(first.state_dict())
    second.run()
    for mine, other in zip(adapters.parameters, continued.parameters, strict=True):
        assert torch.equal(mine, other)
    assert all(torch.equal(whole.router.rows[key], row) for key, row in second.router.rows.items())
