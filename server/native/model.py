"""A base model packed for the native step, with its K/V cache and packed adapters. Knows no requests and no plans."""

import ctypes
import hashlib
import logging
import weakref
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from server.errors import AdapterMemoryError, ModelLoadError, OverloadedError
from server.model.quantization import Int8Weight
from server.native.library import NUM_PROJECTIONS, Router, Shape, Step, libraries
from server.native.memory import lazy_zeros
from server.routing.attach import RoutedModel
from server.routing.bank import LoraWeights

logger = logging.getLogger(__name__)

PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""Projections of a decoder layer in the order of the C interface."""

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
"""The Llama family: RMSNorm, rotary positions, grouped attention, SwiGLU; biases optional."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
NO_MEMORY = b"bad_alloc"
"""What the C++ library says then."""
TOKENS_PER_VECTOR = 16
"""Block sizes are multiples of this: keys of 16 tokens lie side by side."""


def why_not(model: nn.Module, *, block_size: int) -> str | None:
    """Why the native step cannot serve this model with blocks of this size; None if it can."""
    config: Any = model.config
    parameter = next(model.parameters())
    if type(model).__name__ not in ARCHITECTURES:
        return f"{type(model).__name__} is not of the Llama family"
    if parameter.device.type != "cpu" or parameter.dtype not in DTYPES:
        return f"it computes on CPUs in float32 or bfloat16, not on {parameter.device.type} in {parameter.dtype}"
    if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        return "the model uses a sliding window"
    if config.hidden_act != "silu":
        return f"the model's activation is {config.hidden_act}, not silu"
    if _head_dim(config) % TOKENS_PER_VECTOR:
        return f"heads of {_head_dim(config)} are not a multiple of {TOKENS_PER_VECTOR} wide"
    if block_size % TOKENS_PER_VECTOR:
        return f"block_size {block_size} is not a multiple of {TOKENS_PER_VECTOR}"
    cosine, sine = _rotary(model, 2)
    half = cosine.shape[1] // 2
    if cosine.shape[1] != _head_dim(config) or not all(torch.equal(t[:, :half], t[:, half:]) for t in (cosine, sine)):
        return "the model's rotary encoding is not Llama's"
    if not libraries():
        return "no compiled library fits this CPU (it needs AVX2, and a C++ compiler at installation)"
    return None


def bytes_per_block(model: nn.Module, block_size: int) -> int:
    """Memory of one block of the K/V cache over all layers, in bytes."""
    config: Any = model.config
    width = 2 * config.num_key_value_heads * _head_dim(config) * next(model.parameters()).dtype.itemsize
    return int(config.num_hidden_layers * block_size * width)


class PackedAdapter:
    """One adapter in the layout of the native step; its memory is freed with the last reference."""

    def __init__(self, owner: "NativeModel", pointer: int, num_bytes: int, content: bytes) -> None:
        self.pointer = pointer
        self.num_bytes = num_bytes
        self.content = content
        """Digest of what it holds. Updates are added up in the order of these: another order changes last bits, and
        slots are given anew when an adapter comes back from disk."""
        # The owner stays alive as long as its adapters: freeing needs it.
        weakref.finalize(self, _free_adapter, owner, pointer).atexit = False


class NativeModel:
    """Packs the weights of `routed.model`, which must pass `why_not`; the torch weights are no longer needed then.

    `library` is the best one for this CPU unless given. `quantized` are the int8 weights that the model's stand for, by
    module path: of all its linear layers, or of none.
    """

    def __init__(
        self,
        routed: RoutedModel,
        *,
        block_size: int,
        num_blocks: int,
        max_positions: int,
        num_threads: int,
        library: ctypes.CDLL | None = None,
        quantized: Mapping[str, Int8Weight] = MappingProxyType({}),
    ) -> None:
        model: Any = routed.model
        config = model.config
        self.block_size = block_size
        self.num_layers: int = config.num_hidden_layers
        self.vocab_size: int = config.vocab_size
        self.hidden_size: int = config.hidden_size
        self.projections = [f"model.layers.{layer}.{name}" for layer in range(self.num_layers) for name in PROJECTIONS]
        """Module path of every projection, by layer and in the order of the C interface."""
        self._dtype = next(model.parameters()).dtype
        library = self._library = library or libraries()[0]
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        shape = Shape(
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=_head_dim(config),
            intermediate=config.intermediate_size,
            vocab=config.vocab_size,
            block_size=block_size,
            max_positions=max_positions,
            is_tied=embedding.data_ptr() == head.data_ptr(),
            is_int8=bool(quantized),
            norm_eps=config.rms_norm_eps,
            attention_scale=model.model.layers[0].self_attn.scaling,
        )
        pointer = ctypes.c_void_p()
        self._check(library.lm_engine_new(shape, DTYPES[self._dtype], num_threads, pointer))
        self._engine = pointer
        # Not at exit: the engine thread may still be in a step then, and the memory goes with the process anyway.
        weakref.finalize(self, library.lm_engine_free, pointer).atexit = False
        self._pack(model, max_positions, quantized)
        # Zeros, not empty memory: masked positions still enter products, and NaN times zero is NaN. Blocks cost memory
        # once they are used, not before; torch's zeros would be written at once.
        self._tile = block_size * _head_dim(config)
        self._cache_shape = (self.num_layers, num_blocks, config.num_key_value_heads * 2 * self._tile)
        num_values = self._cache_shape[0] * self._cache_shape[1] * self._cache_shape[2]
        self._cache = lazy_zeros(num_values * self._dtype.itemsize).view(self._dtype)
        self._check(library.lm_set_cache(self._engine, self._cache.data_ptr(), num_blocks))

    def run(self, step: Step) -> None:
        """Compute one step; see `lm::Step`. Not thread-safe. Raises MemoryError, after which the next step may run."""
        if (error := self._library.lm_run(self._engine, step)) is not None:
            if NO_MEMORY in error:
                raise MemoryError(f"no memory for a step of {step.num_tokens} tokens")
            raise RuntimeError(f"the native step failed: {error.decode()}")

    def clear(self, blocks: list[int]) -> None:
        """Zero the given cache blocks in every layer."""
        self._cache.view(self._cache_shape)[:, blocks] = 0

    def pack_adapter(self, weights: Mapping[str, LoraWeights]) -> PackedAdapter:
        """An adapter's weights (by module path) in the compute dtype. Safe on any thread. Raises AdapterMemoryError."""
        count = len(self.projections)
        ranks = (ctypes.c_int32 * count)()
        a, b = (ctypes.c_void_p * count)(), (ctypes.c_void_p * count)()
        alive, content = [], hashlib.blake2b(digest_size=16)
        for index, name in enumerate(self.projections):
            lora = weights.get(name)
            if lora is None:
                continue
            # Through the compute dtype first, as the torch bank rounds.
            pair = [x.to(self._dtype).float().contiguous() for x in (lora.A, lora.B)]
            alive += pair
            content.update(name.encode())
            for x in pair:
                content.update(x.numpy().tobytes())
            ranks[index] = lora.A.shape[0]
            a[index], b[index] = (x.data_ptr() for x in pair)
        pointer = ctypes.c_void_p()
        try:
            self._check(self._library.lm_adapter_new(self._engine, ranks, a, b, pointer))
        except MemoryError as error:
            message = "no memory for the adapter; lower server.adapter_memory_mib or server.kv_cache_mib"
            raise AdapterMemoryError(message) from error
        assert pointer.value is not None
        return PackedAdapter(self, pointer.value, self.adapter_bytes(weights), content.digest())

    def adapter_bytes(self, weights: Mapping[str, LoraWeights]) -> int:
        """Memory of the adapter that `pack_adapter` makes of these, in bytes: narrow matrices are padded."""
        ranks = [weights[name].A.shape[0] if name in weights else 0 for name in self.projections]
        return int(self._library.lm_adapter_bytes(self._engine, (ctypes.c_int32 * len(ranks))(*ranks)))

    def make_shortlist(self, router: Router, slots: Sequence[int]) -> int:
        """Prototypes of these slots of a router, for `drop_shortlist` to free. Safe on any thread. Raises
        OverloadedError without the memory for them."""
        numbers = (ctypes.c_int32 * len(slots))(*slots)
        pointer = ctypes.c_void_p()
        try:
            self._check(self._library.lm_shortlist_new(self._engine, router, numbers, len(slots), pointer))
        except MemoryError as error:
            message = "no memory for the router's shortlists; set server.shortlist_from to null"
            raise OverloadedError(message) from error
        assert pointer.value is not None
        return pointer.value

    def drop_shortlist(self, pointer: int) -> None:
        """No step may use it any more."""
        self._library.lm_shortlist_free(self._engine, pointer)

    def _pack(self, model: Any, max_positions: int, quantized: Mapping[str, Int8Weight]) -> None:
        set_linear, set_norm = self._library.lm_set_linear, self._library.lm_set_norm

        def stored(name: str) -> tuple[Tensor, Tensor | None]:
            if not quantized:
                return model.get_submodule(name).weight.contiguous(), None
            return quantized[name].values, quantized[name].scales

        for index, name in enumerate(self.projections):
            bias = model.get_submodule(name).bias
            bias = None if bias is None else bias.float().contiguous()
            weight, scales = stored(name)
            place = divmod(index, NUM_PROJECTIONS)
            self._check(set_linear(self._engine, *place, *map(_pointer, (weight, scales, bias))))
        norms = {(-1, 0): model.model.norm}
        for number, layer in enumerate(model.model.layers):
            norms |= {(number, 0): layer.input_layernorm, (number, 1): layer.post_attention_layernorm}
        for place, norm in norms.items():
            scale = norm.weight.float().contiguous()
            self._check(set_norm(self._engine, *place, scale.data_ptr()))
        embedding = model.model.embed_tokens.weight.contiguous()
        weight, scales = stored("lm_head")  # named: a copy must outlive the pointer to it
        self._check(self._library.lm_set_head(self._engine, *map(_pointer, (weight, scales, embedding))))
        cosine, sine = (table[:, : table.shape[1] // 2].contiguous() for table in _rotary(model, max_positions))
        self._check(self._library.lm_set_rotary(self._engine, cosine.data_ptr(), sine.data_ptr()))

    @staticmethod
    def _check(error: bytes | None) -> None:
        """Raises MemoryError, or ModelLoadError for what cannot be otherwise."""
        if error is not None:
            if NO_MEMORY in error:
                raise MemoryError("no memory for the native step")
            raise ModelLoadError(f"the native step failed: {error.decode()}; server.backend: torch runs without it")


def release_weights(model: nn.Module) -> None:
    """Free a model's torch weights; what remains are shapes, names and dtype. Its forward cannot run afterwards."""
    for parameter in model.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype)


def _free_adapter(owner: NativeModel, pointer: int) -> None:
    owner._library.lm_adapter_free(owner._engine, pointer)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rotary(model: Any, num_positions: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine (num_positions, head_dim) float32 of the model's own rotary embedding."""
    with torch.inference_mode():
        positions = torch.arange(num_positions)[None]
        cosine, sine = model.model.rotary_emb(torch.zeros(1, dtype=torch.float32), positions)
    return cosine[0].float(), sine[0].float()
