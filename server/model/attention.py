"""Attention over the block cache, plugged into a transformers model through its attention interface.

The graph runs on packed tokens, (1, T): the tokens of all scheduled sequences behind one another, decode rows first.
`PagedAttention` is handed to the attention modules when it is attached; a step gives it an `AttentionBatch`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from server.errors import ModelLoadError
from server.model.kv_cache import KvCache, LayerShape, bytes_per_block

IMPLEMENTATION = "lora_mixer_paged"
_UNSUPPORTED_ARGUMENTS = ("softcap", "s_aux", "position_bias", "head_mask")
"""What some architectures pass to their attention and this one does not compute: refused at load, by name."""


@dataclass(frozen=True, eq=False)
class PrefillRow:
    """Several tokens of one sequence computed in one step."""

    start: int
    """First token in the packed batch."""
    num_tokens: int
    context_length: int
    """Tokens of the sequence after this step, cached prefix included."""
    blocks: Tensor
    """(N,) int64, covering `context_length` tokens."""


@dataclass(eq=False)
class AttentionBatch:
    """Where the tokens of one step read and write the cache."""

    slots: Tensor
    """(T,) int64 flat cache slot of each token; padding writes to the scratch block."""
    decode_blocks: Tensor
    """(S, N) int64: blocks of the S sequences that compute one token, padded with the scratch block."""
    decode_lengths: Tensor
    """(S,) int64: their context lengths after this step."""
    prefills: Sequence[PrefillRow]
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    def decode_mask(self, block_size: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive mask (S, 1, 1, L): 0 where a key is visible, -inf elsewhere. Made once per step and window."""
        if (-1, window) not in self._masks:
            length = self.decode_blocks.shape[1] * block_size
            position = torch.arange(length, device=self.slots.device)
            visible = position < self.decode_lengths[:, None]
            if window is not None:
                visible &= position >= self.decode_lengths[:, None] - window
            self._masks[-1, window] = _additive(visible, dtype)[:, None, None, :]
        return self._masks[-1, window]

    def prefill_mask(self, index: int, length: int, group: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive causal mask (group * q, length) of prefill row `index`, repeated for each query head of a group."""
        if (index, window) not in self._masks:
            row = self.prefills[index]
            position = torch.arange(length, device=self.slots.device)
            query = torch.arange(row.context_length - row.num_tokens, row.context_length, device=self.slots.device)
            visible = position <= query[:, None]
            if window is not None:
                visible &= position > query[:, None] - window
            self._masks[index, window] = _additive(visible, dtype).repeat(group, 1)
        return self._masks[index, window]


class PagedAttention:
    """Attention of one model over its block cache. Handed to the model's attention modules; never global."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}
        """Per attention layer, found by the probing pass of `attach_paged_attention`."""
        self.windows: set[int] = set()
        """Sliding windows that layers named in that pass."""
        self.cache: KvCache | None = None
        self._batch: AttentionBatch | None = None

    def allocate(self, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate the cache; `num_blocks` counts the scratch block."""
        self.cache = KvCache(self.shapes, num_blocks=num_blocks, block_size=block_size, dtype=dtype, device=device)

    def bytes_per_block(self, block_size: int, dtype: torch.dtype) -> int:
        """Memory of one block over all layers, in bytes."""
        return bytes_per_block(self.shapes, block_size=block_size, dtype=dtype)

    @contextmanager
    def running(self, batch: AttentionBatch) -> Iterator[None]:
        """Make `batch` current for the length of a forward pass."""
        assert self._batch is None, "a forward pass is already running"
        self._batch = batch
        try:
            yield
        finally:
            self._batch = None

    def forward(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """query (1, H, T, D), key and value (1, H_kv, T, D) of the packed tokens -> output (1, T, H, D)."""
        if self._batch is None or self.cache is None:
            if window is not None:
                self.windows.add(window)
            return self._probe(layer, query, key, value, scale)
        batch, cache = self._batch, self.cache
        cache.write(layer, key[0].transpose(0, 1), value[0].transpose(0, 1), batch.slots)
        output = query.new_zeros(query.shape[2], query.shape[1], value.shape[3])  # (T, H, D)
        if num_decode := batch.decode_blocks.shape[0]:
            cached = cache.read(layer, batch.decode_blocks)
            mask = batch.decode_mask(cache.block_size, window, query.dtype)
            output[:num_decode] = _decode(query[0, :, :num_decode], *cached, mask, scale)
        for index, row in enumerate(batch.prefills):
            rows = slice(row.start, row.start + row.num_tokens)
            if row.context_length == row.num_tokens and (window is None or row.context_length <= window):
                attended = _whole_prompt(query[:, :, rows], key[:, :, rows], value[:, :, rows], scale)
            else:
                cached = cache.read(layer, row.blocks[None])
                group = query.shape[1] // key.shape[1]
                mask = batch.prefill_mask(index, cached[0].shape[2], group, window, query.dtype)
                attended = _chunk(query[:, :, rows], *cached, mask, scale)
            output[rows] = attended[0].transpose(0, 1)
        return output[None]

    def _probe(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        self.shapes[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        return _whole_prompt(query, key, value, scale).transpose(1, 2)


def attach_paged_attention(model: PreTrainedModel) -> PagedAttention:
    """Make `model` compute attention over a block cache; finds each layer's shapes with one two-token pass.

    Raises ModelLoadError for architectures this cannot serve: layers without attention, attention that bypasses the
    attention interface or needs terms that are not computed here, position encodings that depend on the batch.
    """
    refuse_batch_dependent_positions(model)
    _refuse_convolutions(model)
    attention = PagedAttention()
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attention_forward)
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.paged_attention = attention  # type: ignore[assignment]
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
    except Exception as error:  # every architecture fails in its own way
        reason = str(error) if isinstance(error, ValueError | AttributeError) else f"{type(error).__name__}: {error}"
        raise ModelLoadError(f"{type(model).__name__} cannot run on the block cache: {reason}") from error
    num_layers = model.config.get_text_config().num_hidden_layers
    if len(attention.shapes) != num_layers:
        raise ModelLoadError(
            f"{type(model).__name__} has {num_layers} layers but only {len(attention.shapes)} go through transformers' "
            "attention interface; architectures with state-space or custom attention layers are not supported"
        )
    return attention


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - packed batches bring their own masks
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Signature of transformers' attention interface; finds the model's PagedAttention on the module."""
    for name in _UNSUPPORTED_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise ValueError(f"its attention needs {name!r}, which is not supported")
    attention = module.paged_attention
    layer = module.layer_idx
    assert isinstance(attention, PagedAttention)
    assert isinstance(layer, int)
    return attention.forward(layer, query, key, value, scaling, sliding_window), None


def _whole_prompt(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """A prompt with nothing cached before it: the very call transformers makes, so results agree bit for bit.

    query (1, H, q, D), key and value (1, H_kv, q, D) -> (1, H, q, D).
    """
    is_grouped = query.shape[1] != key.shape[1]
    is_causal = query.shape[2] > 1
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=is_grouped)


def _chunk(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Tokens of one sequence against its cached context: query (1, H, q, D), key (1, H_kv, L, D) -> (1, H, q, D).

    Query heads that share a key head stand in the query dimension: grouped attention without repeating keys.
    """
    packed = query.reshape(1, key.shape[1], -1, query.shape[3])  # (1, H_kv, group * q, D)
    attended = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scale)
    return attended.reshape(1, query.shape[1], query.shape[2], -1)


def _decode(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """One query per sequence: query (H, S, D), key (S, H_kv, L, D), mask (S, 1, 1, L) -> (S, H, D_v)."""
    num_heads, num_sequences, head_dim = query.shape
    packed = query.transpose(0, 1).reshape(num_sequences, key.shape[1], -1, head_dim)  # (S, H_kv, group, D)
    attended = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scale)
    return attended.reshape(num_sequences, num_heads, -1)


def refuse_batch_dependent_positions(model: PreTrainedModel) -> None:
    """Raises ModelLoadError for position encodings of which a request's depend on its batch mates or its length."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {value.get("rope_type") for value in rope.values() if isinstance(value, dict)}
    if batch_dependent := kinds & {"dynamic", "longrope"}:
        raise ModelLoadError(
            f"rope_type {', '.join(sorted(map(str, batch_dependent)))} rescales positions by the longest sequence of a "
            "batch, so a request's tokens would depend on its batch mates; it is not supported"
        )


def refuse_hidden_windows(model: PreTrainedModel, attention: PagedAttention, max_model_len: int) -> None:
    """Raises ModelLoadError where the config has an attention window that layers keep in masks of their own, which
    packed batches do not have, and sequences may outgrow it."""
    config: Any = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    windows = {"attention_chunk_size": getattr(config, "attention_chunk_size", None)}
    if getattr(config, "use_sliding_window", True) and (kinds is None or "sliding_attention" in kinds):
        windows["sliding_window"] = getattr(config, "sliding_window", None)
    for name, window in windows.items():
        if isinstance(window, int) and window < max_model_len and window not in attention.windows:
            raise ModelLoadError(
                f"{type(model).__name__} has {name} {window}, which its layers do not pass to their attention; such "
                f"windows are not supported beyond their length: set server.max_model_len to at most {window}"
            )


def _refuse_convolutions(model: PreTrainedModel) -> None:
    """State-space and convolution layers may stand beside attention: what they remember is not in the cache."""
    if found := next((name for name, module in model.named_modules() if isinstance(module, nn.Conv1d)), None):
        raise ModelLoadError(
            f"{type(model).__name__} convolves over tokens ({found}), so it keeps other state than keys and values; "
            "state-space and convolution layers are not supported"
        )


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, -torch.inf)
