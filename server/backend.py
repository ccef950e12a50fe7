"""Chooses what computes the steps: the native decoder where it can serve the model, else transformers' own graph.

Part of the composition root. A native decoder is compared with the torch graph once, at start, before it is trusted.
"""

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from server.config import ServerSettings
from server.engine.graph import Graph
from server.engine.native_graph import NativeGraph
from server.engine.native_states import NativeStates, num_state_blocks
from server.engine.torch_graph import TorchGraph
from server.errors import ConfigError, ModelLoadError
from server.machine import has_bfloat16, memory_bytes, within_quota
from server.model.attention import (
    attach_paged_attention,
    refuse_batch_dependent_positions,
    refuse_hidden_windows,
)
from server.model.quantization import Int8Weight
from server.native.library import num_cores
from server.native.model import NativeModel, bytes_per_block, release_weights, why_not
from server.native.routers import NativeRouter
from server.routing.attach import RoutedModel
from server.routing.recording import ExampleStates
from server.self_check import disagreement, own_logits, text_for

logger = logging.getLogger(__name__)

NATIVE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest difference of a logit, relative to the largest logit of all. In bfloat16 transformers' own graph is that far
from its float32 one at the first token of the demo model, an attention sink, and five times nearer elsewhere."""
INT8_TOLERANCE = 0.15
"""The same of int8 weights, in either dtype: the torch graph does not round what they are multiplied with."""
TORCH_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""The same of the torch graph, which differs from the model's own forward pass in its attention alone; where a model
chooses experts, rounding may choose others."""


@dataclass(frozen=True, eq=False)
class Backend:
    """A graph, and the size of its K/V cache."""

    graph: Graph
    num_blocks: int
    max_model_len: int
    name: str
    """`native` or `torch`."""
    states: ExampleStates | None = None
    """Where gate rows get their states from; None: the torch model."""


def build_backend(
    routed: RoutedModel,
    settings: ServerSettings,
    model_limit: int,
    quantized: Mapping[str, Int8Weight] = MappingProxyType({}),
) -> Backend:
    """The graph that `settings.backend` asks for. `model_limit` is the longest sequence the model can take, in tokens;
    `quantized` the int8 weights behind those of `routed`, by module path, if it was loaded with any.

    Raises ConfigError when it asks for the native one, or the weights need it, and that cannot serve, ModelLoadError
    for architectures that no graph serves. With the native graph the torch weights are freed and torch computes with
    one thread: its idle workers would spin on the cores that the step needs.
    """
    if settings.backend == "torch" and settings.speculative_tokens:
        raise ConfigError(
            "server.speculative_tokens needs the native backend, whose tokens do not depend on how many are computed "
            "at once; set it to 0, or server.backend to auto or native",
            param="server.speculative_tokens",
        )
    if settings.backend == "torch" and quantized:
        raise ConfigError(
            "base_model.quantization int8 needs the native backend: on torch it would save nothing; set it to null, or "
            "server.backend to auto or native",
            param="base_model.quantization",
        )
    if settings.backend != "torch":
        backend = _build_native(routed, settings, model_limit, quantized)
        if isinstance(backend, Backend):
            release_weights(routed.model)
            torch.set_num_threads(1)
            return backend
        if settings.backend == "native":
            raise ConfigError(f"server.backend is native, but {backend}; use auto or torch", param="server.backend")
        if quantized:
            raise ConfigError(
                f"base_model.quantization int8 needs the native backend, but {backend}; set it to null",
                param="base_model.quantization",
            )
        logger.info("computing with transformers' graph: %s", backend)
        if settings.speculative_tokens:
            logger.warning("server.speculative_tokens is not used: it needs the native backend")
    return _build_torch(routed, settings, model_limit)


def _build_torch(routed: RoutedModel, settings: ServerSettings, model_limit: int) -> Backend:
    model: Any = routed.model
    dtype, device = routed.bank.dtype, routed.bank.device
    text = text_for(model.config.get_text_config().vocab_size, model_limit)
    expected = own_logits(model, text)
    attention = attach_paged_attention(model)
    if dtype == torch.bfloat16 and device.type == "cpu" and not has_bfloat16():
        logger.warning(
            "this CPU has no bfloat16 arithmetic: with torch, base_model.dtype float32 is several times as fast"
        )
    num_blocks = _num_blocks(settings, attention.bytes_per_block(settings.block_size, dtype), device)
    max_model_len = _max_model_len(settings, model_limit, num_blocks)
    try:
        attention.allocate(num_blocks=num_blocks, block_size=settings.block_size, dtype=dtype, device=device)
    except RuntimeError as error:  # torch's word for no memory
        raise _no_room(settings, error) from error
    refuse_hidden_windows(model, attention, max_model_len)
    graph = TorchGraph(routed, attention, block_size=settings.block_size, device=device)
    text = text[:max_model_len]
    try:
        difference = disagreement(graph, text, expected[: len(text)], TORCH_TOLERANCE[dtype])
    except Exception as error:  # every architecture fails in its own way
        raise ModelLoadError(f"{type(model).__name__} cannot run in steps: {type(error).__name__}: {error}") from error
    if difference is not None:
        raise ModelLoadError(
            f"{type(model).__name__} cannot be served: computed in steps it {difference}. Models whose attention has "
            "masks or positions of its own, or that keep other state than keys and values, are not supported"
        )
    return Backend(graph, num_blocks, max_model_len, "torch")


def _build_native(
    routed: RoutedModel, settings: ServerSettings, model_limit: int, quantized: Mapping[str, Int8Weight]
) -> Backend | str:
    """The native backend, or why there is none."""
    if (reason := why_not(routed.model, block_size=settings.block_size)) is not None:
        return reason
    refuse_batch_dependent_positions(routed.model)  # type: ignore[arg-type]  # the torch graph does it itself
    num_blocks = _num_blocks(settings, bytes_per_block(routed.model, settings.block_size), routed.bank.device)
    max_model_len = _max_model_len(settings, model_limit, num_blocks)
    try:
        native = NativeModel(
            routed,
            block_size=settings.block_size,
            num_blocks=num_blocks + num_state_blocks(settings.block_size),
            max_positions=max_model_len,
            num_threads=settings.num_threads or within_quota(num_cores()),
            quantized=quantized,
        )
    except MemoryError as error:
        raise _no_room(settings, error) from error
    graph = NativeGraph(native, routed)
    model: Any = routed.model
    text = text_for(model.config.vocab_size, max_model_len)
    tolerance = INT8_TOLERANCE if quantized else NATIVE_TOLERANCE[routed.bank.dtype]
    if (difference := disagreement(graph, text, own_logits(model, text), tolerance)) is not None:
        logger.error("the native step %s; please report this with your CPU's model", difference)
        return f"the native step {difference}"
    routed.bank.pack, routed.bank.packed_bytes = native.pack_adapter, native.adapter_bytes
    routed.routers.pack = functools.partial(
        NativeRouter, routed=routed, native=native, shortlist_from=settings.shortlist_from
    )
    spare = range(num_blocks, num_blocks + num_state_blocks(settings.block_size))  # never in a pool
    states = NativeStates(native, routed, spare, max_positions=max_model_len)
    return Backend(graph, num_blocks, max_model_len, "native", states)


def _num_blocks(settings: ServerSettings, block_bytes: int, device: torch.device) -> int:
    # Blocks take memory as they are used: a cache that is too large would start, and end the process hours later.
    if device.type == "cpu" and (memory := memory_bytes()) and settings.kv_cache_mib * 2**20 > memory:
        raise ConfigError(
            f"kv_cache_mib {settings.kv_cache_mib} is more than the memory of this machine or container, "
            f"{memory // 2**20} MiB; lower it",
            param="server.kv_cache_mib",
        )
    return settings.kv_cache_mib * 2**20 // block_bytes


def _no_room(settings: ServerSettings, error: Exception) -> ConfigError:
    reason = str(error).partition("\n")[0]
    return ConfigError(
        f"no memory for kv_cache_mib {settings.kv_cache_mib}; lower it ({reason})", param="server.kv_cache_mib"
    )


def _max_model_len(settings: ServerSettings, model_limit: int, num_blocks: int) -> int:
    """Longest sequence in tokens; the block 0 of the cache is scratch."""
    capacity = (num_blocks - 1) * settings.block_size
    if capacity < 2:
        raise ConfigError(f"kv_cache_mib {settings.kv_cache_mib} holds {max(0, capacity)} tokens; raise it")
    wanted = settings.max_model_len
    if wanted is None:
        return min(model_limit, capacity)
    if wanted > model_limit:
        raise ConfigError(f"max_model_len {wanted} is above the model's own limit of {model_limit} tokens; lower it")
    if wanted > capacity:
        raise ConfigError(
            f"max_model_len {wanted} does not fit the K/V cache of {capacity} tokens; raise kv_cache_mib or lower it"
        )
    return wanted
