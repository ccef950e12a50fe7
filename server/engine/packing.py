"""From the layout of a step to its tensors for the torch graph: packed tokens, cache slots, block tables and plans.

Shapes are padded to buckets, so that few ever run. Knows sequences and blocks; runs no model.
"""

from collections.abc import Sequence as List
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.layout import StepLayout
from server.engine.sequence import ScheduledSequence
from server.model.attention import AttentionBatch, PrefillRow
from server.model.kv_cache import SCRATCH_BLOCK
from server.routing.policy import BASE_PLAN
from server.routing.upload import upload

TOKEN_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
"""Packed batches are padded to one of these sizes, then to multiples of 64, so that few shapes ever run."""
CONTEXT_BUCKET_TOKENS = 64
"""Decode context is padded to multiples of this many tokens, for the same reason."""


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """The tensors of one step: the tokens of a layout, then padding."""

    input_ids: Tensor  # (1, T)
    positions: Tensor  # (1, T)
    attention: AttentionBatch
    plan_of_token: Tensor  # (T,)


class BatchPacker:
    """Builds a `PackedBatch` from a `StepLayout`."""

    def __init__(self, *, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device

    def pack(self, layout: StepLayout) -> PackedBatch:
        """Tensors of one step."""
        padding = pad_tokens(layout.num_tokens) - layout.num_tokens
        return PackedBatch(
            input_ids=self._tensor(layout.token_ids() + [0] * padding)[None],
            positions=self._tensor(layout.positions() + [0] * padding)[None],
            attention=self._attention_batch(layout.rows, layout.starts, padding),
            plan_of_token=self._tensor(layout.plan_of_token() + [layout.plans.index(BASE_PLAN)] * padding),
        )

    def _attention_batch(self, rows: List[ScheduledSequence], starts: List[int], padding: int) -> AttentionBatch:
        size = self._block_size
        slots: list[int] = []
        prefills = []
        decoding: list[ScheduledSequence] = []
        for row, start in zip(rows, starts, strict=True):
            table, begin = row.sequence.block_table, row.sequence.num_computed_tokens
            end = begin + row.num_tokens
            slots += [table[position // size] * size + position % size for position in range(begin, end)]
            if row.num_tokens == 1:
                decoding.append(row)
            else:
                blocks = self._tensor(table[: -(-end // size)])
                prefills.append(PrefillRow(start, row.num_tokens, end, blocks))
        lengths = [row.sequence.num_computed_tokens + 1 for row in decoding]
        # A batch of decode rows alone keeps its padding inside the decode group: one shape per bucket.
        lengths += [1] * (padding if not prefills else 0)
        context = -(-max(lengths, default=0) // CONTEXT_BUCKET_TOKENS) * CONTEXT_BUCKET_TOKENS
        blocks_wide = -(-context // size)
        tables = [
            row.sequence.block_table[: -(-length // size)] for row, length in zip(decoding, lengths, strict=False)
        ]
        tables += [[]] * (len(lengths) - len(tables))
        return AttentionBatch(
            slots=self._tensor(slots + [0] * padding),
            decode_blocks=self._tensor([table + [SCRATCH_BLOCK] * (blocks_wide - len(table)) for table in tables]).view(
                len(lengths), blocks_wide
            ),
            decode_lengths=self._tensor(lengths),
            prefills=prefills,
        )

    def _tensor(self, values: List[int] | List[List[int]]) -> Tensor:
        return upload(torch.tensor(values, dtype=torch.int64), self._device)


def pad_tokens(num_tokens: int) -> int:
    """Smallest bucket that holds `num_tokens`."""
    for bucket in TOKEN_BUCKETS:
        if num_tokens <= bucket:
            return bucket
    return -(-num_tokens // TOKEN_BUCKETS[-1]) * TOKEN_BUCKETS[-1]
