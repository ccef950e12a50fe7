"""The K/V cache as tensors: per layer, blocks of tokens. Which block belongs to whom is the engine's business.

Models without attention (Mamba and kin) would keep one state per sequence instead; they would add their own cache class
beside this one and are refused until then (`attention.attach_paged_attention`).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

SCRATCH_BLOCK = 0
"""Padding tokens write here; no sequence owns it."""


class LayerShape(NamedTuple):
    """Heads and widths of one attention layer's keys and values."""

    num_heads: int
    key_dim: int
    value_dim: int

    @property
    def values_per_token(self) -> int:
        return self.num_heads * (self.key_dim + self.value_dim)


class KvCache:
    """Keys and values of every attention layer in blocks of `block_size` tokens."""

    def __init__(
        self,
        shapes: Mapping[int, LayerShape],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        # Zeros, not empty memory: masked positions still enter products, and NaN times zero is NaN.
        self.keys = {
            layer: torch.zeros(num_blocks, block_size, shape.num_heads, shape.key_dim, dtype=dtype, device=device)
            for layer, shape in shapes.items()
        }
        self.values = {
            layer: torch.zeros(num_blocks, block_size, shape.num_heads, shape.value_dim, dtype=dtype, device=device)
            for layer, shape in shapes.items()
        }

    def write(self, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Store key (T, H, Dk) and value (T, H, Dv) at flat token slots (T,) = block * block_size + offset."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, key)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, value)

    def read(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Gather blocks (S, N) into keys (S, H, N * block_size, Dk) and values (S, H, N * block_size, Dv)."""
        return self._gather(self.keys[layer], blocks), self._gather(self.values[layer], blocks)

    def clear(self, blocks: Tensor) -> None:
        """Zero the given blocks (N,) in every layer, so that non-finite content cannot leak to their next owner."""
        for tensor in (*self.keys.values(), *self.values.values()):
            tensor.index_fill_(0, blocks, 0)

    @staticmethod
    def _gather(cache: Tensor, blocks: Tensor) -> Tensor:
        gathered = cache.index_select(0, blocks.flatten())  # (S * N, block_size, H, D)
        return gathered.view(blocks.shape[0], -1, *cache.shape[2:]).transpose(1, 2)


def bytes_per_block(shapes: Mapping[int, LayerShape], *, block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block over all layers, in bytes."""
    return block_size * dtype.itemsize * sum(shape.values_per_token for shape in shapes.values())
