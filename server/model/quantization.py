"""Weights of a frozen model rounded to 8 bits. Knows torch modules, not what computes with them.

Symmetric rounding to nearest with one scale for 32 neighbouring inputs of an output: llama.cpp's Q8_0, but for scales
in bfloat16. The native step multiplies the bytes with inputs that it rounds in the same way
(`server/native/src/int8.h`); the torch graph, against which it is checked at start, has the rounded weights in the
model's dtype and leaves inputs alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from server.errors import ModelLoadError

GROUP = 32
"""Inputs of an output that share a scale."""
LARGEST = 127
"""Of the values; -128 is not used."""


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """`values` (d_out, d_in) int8, `scales` (d_out, groups) bfloat16; the last group may be narrower."""

    values: Tensor
    scales: Tensor

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """The weight (d_out, d_in) that this stands for, rounded once."""
        scales = self.scales.float().repeat_interleave(GROUP, dim=1)[:, : self.values.shape[1]]
        return (self.values.float() * scales).to(dtype)


def quantize(weight: Tensor) -> Int8Weight:
    """`weight` (d_out, d_in), finite, at 8 bits: off by at most half a scale, which is the group's greatest magnitude
    over 127, itself rounded."""
    d_out, d_in = weight.shape
    groups = nn.functional.pad(weight.float(), (0, -d_in % GROUP)).view(d_out, -1, GROUP)
    scales = (groups.abs().amax(-1) / LARGEST).bfloat16()  # (d_out, groups)
    # A scale rounded down would put the greatest value at 127.5 at most: clamped.
    divisor = scales.float().masked_fill(scales == 0, 1).unsqueeze(-1)
    values = (groups / divisor).round().clamp(-LARGEST, LARGEST).to(torch.int8)
    return Int8Weight(values.view(d_out, -1)[:, :d_in].contiguous(), scales)


def quantize_model(model: nn.Module) -> dict[str, Int8Weight]:
    """Round the weights of every linear layer of `model` in place, the output head included, and return what they now
    stand for by module path. An embedding that is tied to the head is rounded with it.

    Raises ModelLoadError for weights that are not finite: they have no scale.
    """
    quantized: dict[str, Int8Weight] = {}
    for name, linear in _linears(model):
        if not torch.isfinite(linear.weight).all():
            raise ModelLoadError(f"base_model.quantization int8: {name}.weight holds values that are not finite")
        quantized[name] = quantize(linear.weight)
        linear.weight.data.copy_(quantized[name].expanded(linear.weight.dtype))
    if not quantized:
        raise ModelLoadError("base_model.quantization int8: the model has no linear layers to round")
    return quantized


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
