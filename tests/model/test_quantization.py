"""Weights at 8 bits: what they stand for, and how far it is from what they were."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

from server.errors import ModelLoadError
from server.model.quantization import GROUP, LARGEST, quantize, quantize_model


@given(st.integers(1, 7), st.integers(1, 100), st.integers(-30, 30), st.integers(0, 2**32 - 1))
def test_a_weight_is_off_by_at_most_half_a_scale(d_out: int, d_in: int, exponent: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator) * 2.0**exponent
    found = quantize(weight)
    assert found.values.shape == weight.shape
    assert found.scales.shape == (d_out, -(-d_in // GROUP))
    assert found.values.abs().max() <= LARGEST
    scales = found.scales.float().repeat_interleave(GROUP, dim=1)[:, :d_in]
    assert ((found.expanded(torch.float32) - weight).abs() <= 0.5001 * scales).all()


def test_zeros_and_whole_multiples_stay_what_they_are() -> None:
    weight = torch.zeros(2, 40)
    weight[1, :32] = torch.arange(-16, 16) * 0.5  # the greatest magnitude, 8, is 127 scales
    weight[1, 32:] = torch.tensor([127.0, -127.0, 1.0, 0.0, 64.0, -3.0, 2.0, 126.0])
    expanded = quantize(weight).expanded(torch.float32)
    assert torch.equal(expanded[0], weight[0])
    assert torch.equal(expanded[1, 32:], weight[1, 32:])


def test_a_model_holds_what_its_bytes_stand_for_and_ties_stay() -> None:
    model = nn.Module()
    model.embedding, model.norm = nn.Embedding(40, 48), nn.LayerNorm(48)
    model.inner, model.head = nn.Linear(48, 8), nn.Linear(48, 40, bias=False)
    model.head.weight = model.embedding.weight
    model.bfloat16().requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    quantized = quantize_model(model)
    assert set(quantized) == {"inner", "head"}
    for name, linear in (("inner", model.inner), ("head", model.head)):
        assert torch.equal(linear.weight, quantized[name].expanded(torch.bfloat16))
        assert not torch.equal(linear.weight, before[f"{name}.weight" if name == "inner" else "embedding.weight"])
    assert model.head.weight is model.embedding.weight
    for name in ("norm.weight", "norm.bias", "inner.bias"):
        assert torch.equal(model.get_parameter(name), before[name])


def test_what_has_no_scale_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    model.get_parameter("0.weight")[1, 2] = torch.inf
    with pytest.raises(ModelLoadError, match=r"0\.weight holds values that are not finite"):
        quantize_model(model)
    with pytest.raises(ModelLoadError, match="no linear layers"):
        quantize_model(nn.Sequential(nn.LayerNorm(4)))
