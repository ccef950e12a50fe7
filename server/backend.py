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
from server.engine.layout import lay_out
from server.engine.native_graph import NativeGraph
from server.engine.native_states import NativeStates, num_state_blocks
from server.engine.sequence import SamplingParams, ScheduledBatch, ScheduledSequence, Sequence
from server.engine.torch_graph import TorchGraph
from server.errors import ConfigError
from server.machine import has_bfloat16, memory_bytes
from server.model.attention import attach_paged_attention
from server.model.quantization import Int8Weight
from server.native.library import num_cores
from server.native.model import NativeModel, bytes_per_block, release_weights, why_not
from server.native.routers import NativeRouter
from server.routing.attach import RoutedModel
from server.routing.recording import ExampleStates

logger = logging.getLogger(__name__)

CHECK_PREFILL, CHECK_DECODE = 32, 8
"""Tokens of the comparison at start: a prefill that fills blocks and tiles, then decoding."""
CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest difference of a logit, relative to the largest logit of all. In bfloat16 transformers' own graph is that far
from its float32 one at the first token of the demo model, an attention sink, and five times nearer elsewhere."""
INT8_TOLERANCE = 0.15
"""The same of int8 weights, in either dtype: the torch graph does not round what they are multiplied with."""
CHECK_SHARE = 0.15
"""Positions that may differ by more; the decoded ones alone are a fifth."""


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
    attention = attach_paged_attention(routed.model)  # type: ignore[arg-type]
    dtype, device = routed.bank.dtype, routed.bank.device
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
    graph = TorchGraph(routed, attention, block_size=settings.block_size, device=device)
    return Backend(graph, num_blocks, max_model_len, "torch")


def _build_native(
    routed: RoutedModel, settings: ServerSettings, model_limit: int, quantized: Mapping[str, Int8Weight]
) -> Backend | str:
    """The native backend, or why there is none."""
    if (reason := why_not(routed.model, block_size=settings.block_size)) is not None:
        return reason
    num_blocks = _num_blocks(settings, bytes_per_block(routed.model, settings.block_size), routed.bank.device)
    max_model_len = _max_model_len(settings, model_limit, num_blocks)
    try:
        native = NativeModel(
            routed,
            block_size=settings.block_size,
            num_blocks=num_blocks + num_state_blocks(settings.block_size),
            max_positions=max_model_len,
            num_threads=settings.num_threads or num_cores(),
            quantized=quantized,
        )
    except MemoryError as error:
        raise _no_room(settings, error) from error
    graph = NativeGraph(native, routed)
    tolerance = INT8_TOLERANCE if quantized else CHECK_TOLERANCE[routed.bank.dtype]
    if (difference := _difference(graph, routed, max_model_len, tolerance)) is not None:
        logger.error("the native step %s; please report this with your CPU's model", difference)
        return f"the native step {difference}"
    routed.bank.pack = native.pack_adapter
    routed.routers.pack = functools.partial(
        NativeRouter, routed=routed, native=native, shortlist_from=settings.shortlist_from
    )
    spare = range(num_blocks, num_blocks + num_state_blocks(settings.block_size))  # never in a pool
    states = NativeStates(native, routed, spare, max_positions=max_model_len)
    return Backend(graph, num_blocks, max_model_len, "native", states)


def _difference(graph: NativeGraph, routed: RoutedModel, max_model_len: int, tolerance: float) -> str | None:
    """How the native step disagrees with transformers on a fixed text; None if it does not."""
    model: Any = routed.model
    num_tokens = min(CHECK_PREFILL + CHECK_DECODE, max_model_len)
    tokens = [7 * index % model.config.vocab_size for index in range(num_tokens)]
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()  # (num_tokens, V)
    sequence = Sequence(id=0, prompt_token_ids=tokens, params=SamplingParams())
    sequence.block_table = list(range(1, 2 + num_tokens))
    found = []
    prefill = max(1, num_tokens - CHECK_DECODE)
    for count in [prefill] + [1] * (num_tokens - prefill):
        layout = lay_out(ScheduledBatch((ScheduledSequence(sequence, count),)))
        found.append(graph.forward(layout, range(count), collect_layers=False).logits.clone())
        sequence.num_computed_tokens += count
    difference = (torch.cat(found) - expected).abs().amax(-1) / expected.abs().max()  # (num_tokens,)
    # Not a number counts as different.
    share = 1 - float((difference <= tolerance).float().mean())
    if share <= CHECK_SHARE:
        return None
    return f"disagrees with transformers' graph at {share:.0%} of the positions of a test prompt"


def _num_blocks(settings: ServerSettings, block_bytes: int, device: torch.device) -> int:
    # Blocks take memory as they are used: a cache that is too large would start, and end the process hours later.
    if device.type == "cpu" and (memory := memory_bytes()) and settings.kv_cache_mib * 2**20 > memory:
        raise ConfigError(
            f"kv_cache_mib {settings.kv_cache_mib} is more than this machine's memory of {memory // 2**20} MiB; "
            "lower it",
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
