"""Gate and delta maths against their plain references and closed forms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.routing import ops


def random_case(seed: int, num_tokens: int = 12, num_slots: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_slots, generator=generator) * 3
    allowed = torch.rand(num_tokens, num_slots, generator=generator) > 0.4
    top_k = torch.randint(1, num_slots + 1, (num_tokens,), generator=generator)
    return logits, allowed, top_k


@given(st.integers(0, 10_000), st.floats(0.1, 10.0))
def test_top_k_gates_equal_the_token_by_token_reference(seed: int, temperature: float) -> None:
    logits, allowed, top_k = random_case(seed)
    fast = ops.top_k_gates(logits, allowed, top_k, temperature)
    plain = ops.top_k_gates_reference(logits, allowed, top_k, temperature)
    torch.testing.assert_close(fast, plain, atol=1e-6, rtol=0)


@given(st.integers(0, 10_000))
def test_gates_are_a_sparse_distribution_over_allowed_slots(seed: int) -> None:
    logits, allowed, top_k = random_case(seed)
    gates = ops.top_k_gates(logits, allowed, top_k)
    assert (gates >= 0).all()
    assert ((gates > 0).sum(dim=-1) <= top_k).all()
    assert not gates[~allowed].any()
    sums = gates.sum(dim=-1)
    expected = allowed.any(dim=-1).float()
    torch.testing.assert_close(sums, expected, atol=1e-6, rtol=0)


def test_one_kept_slot_weighs_exactly_one() -> None:
    logits, allowed, _ = random_case(1)
    allowed[:, 0] = True
    gates = ops.top_k_gates(logits, allowed, torch.ones(12, dtype=torch.int64))
    assert gates.max(dim=-1).values.eq(1.0).all()
    assert gates.sum(dim=-1).eq(1.0).all()


def test_keeping_every_slot_is_plain_softmax() -> None:
    logits, _, _ = random_case(2)
    everything = torch.ones_like(logits, dtype=torch.bool)
    gates = ops.top_k_gates(logits, everything, torch.full((12,), 9))
    torch.testing.assert_close(gates, torch.softmax(logits, dim=-1), atol=1e-6, rtol=0)


def test_ties_go_to_the_lower_slot() -> None:
    gates = ops.top_k_gates(torch.zeros(1, 70), torch.ones(1, 70, dtype=torch.bool), torch.tensor([2]))
    assert gates[0, :2].tolist() == [0.5, 0.5]
    assert not gates[0, 2:].any()


def test_a_slot_outside_the_mask_has_no_influence() -> None:
    logits, allowed, top_k = random_case(3)
    louder = torch.where(allowed, logits, torch.full_like(logits, 1e4))
    assert torch.equal(ops.top_k_gates(logits, allowed, top_k), ops.top_k_gates(louder, allowed, top_k))


def test_permuting_slots_permutes_gates() -> None:
    logits, allowed, top_k = random_case(4)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    permuted = ops.top_k_gates(logits[:, order], allowed[:, order], top_k)
    torch.testing.assert_close(permuted, ops.top_k_gates(logits, allowed, top_k)[:, order], atol=1e-7, rtol=0)


def test_a_token_with_nothing_allowed_gets_zero_gates() -> None:
    gates = ops.top_k_gates(torch.randn(2, 4), torch.zeros(2, 4, dtype=torch.bool), torch.tensor([2, 2]))
    assert torch.equal(gates, torch.zeros(2, 4))


def test_a_token_whose_greatest_logit_is_not_finite_gets_zero_gates() -> None:
    """Of a router that has left float32: sums over many tokens, which outlive them, must stay numbers."""
    logits = torch.tensor([[torch.inf, 3, 2], [3, torch.nan, 2], [2, torch.nan, torch.inf]])
    gates = ops.top_k_gates(logits, torch.ones(3, 3, dtype=torch.bool), torch.tensor([2, 2, 1]))
    assert torch.equal(gates, torch.zeros(3, 3))
    quiet = ops.top_k_gates(torch.tensor([[-torch.inf, 1.0, -torch.inf]]), torch.ones(1, 3) > 0, torch.tensor([2]))
    assert quiet.tolist() == [[0.0, 1.0, 0.0]]


def test_straight_through_gates_serve_sparse_and_learn_dense() -> None:
    logits, _, _ = random_case(5)
    logits.requires_grad_(True)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    gates = ops.straight_through_gates(logits, top_k=2)
    everything = torch.ones_like(logits, dtype=torch.bool)
    sparse = ops.top_k_gates(logits.detach(), everything, torch.full((12,), 2))
    torch.testing.assert_close(gates.detach(), sparse, atol=1e-6, rtol=0)
    (through,) = torch.autograd.grad((gates * weight).sum(), logits)
    (dense,) = torch.autograd.grad((ops.dense_gates(logits) * weight).sum(), logits)
    torch.testing.assert_close(through, dense)


@pytest.mark.parametrize("num_slots", [1, 3, 8])
def test_delta_over_concatenated_ranks_is_the_sum_over_adapters(num_slots: int) -> None:
    generator = torch.Generator().manual_seed(num_slots)
    owner = torch.randint(0, num_slots + 1, (24,), generator=generator)
    x = torch.randn(5, 16, generator=generator)
    a, b = torch.randn(24, 16, generator=generator), torch.randn(10, 24, generator=generator)
    gates = torch.rand(5, num_slots + 1, generator=generator)
    fast, plain = ops.lora_delta(x, a, b, owner, gates), ops.lora_delta_reference(x, a, b, owner, gates)
    # Same sums in another order: a few units in the last place of values around 100.
    torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-5)


def test_zero_gates_give_exactly_no_delta() -> None:
    delta = ops.lora_delta(
        torch.randn(3, 8), torch.randn(4, 8), torch.randn(6, 4), torch.tensor([1, 1, 2, 2]), torch.zeros(3, 3)
    )
    assert not delta.any()


def test_entropy_of_gates_is_in_nats() -> None:
    uniform, single = torch.full((1, 8), 1 / 8), torch.eye(8)[:1]
    assert ops.gate_entropy(uniform).item() == pytest.approx(math.log(8), abs=1e-6)
    assert ops.gate_entropy(single).item() == 0.0
