"""What a server says of the graph that it chose."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from server.backend import build_backend
from server.config import ServerSettings
from server.engine.native_graph import NativeGraph
from server.engine.native_states import NativeStates, num_state_blocks
from server.errors import ConfigError
from server.machine import has_bfloat16
from server.model.quantization import quantize_model
from server.native.library import libraries
from server.routing.attach import attach_routing

NEEDS_NATIVE = pytest.mark.skipif(not libraries(), reason="no compiled library fits this CPU")
SETTINGS = ServerSettings(backend="torch", kv_cache_mib=1, max_adapters=2)


@pytest.mark.parametrize(
    ("dtype", "is_fast", "warns"),
    [(torch.bfloat16, False, True), (torch.bfloat16, True, False), (torch.float32, False, False)],
)
def test_torch_in_bfloat16_on_a_cpu_without_it_is_slow_and_said_so(
    tiny_llama: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    dtype: torch.dtype,
    is_fast: bool,
    warns: bool,
) -> None:
    monkeypatch.setattr("server.backend.has_bfloat16", lambda: is_fast)
    with caplog.at_level(logging.WARNING):
        assert build_backend(attach_routing(tiny_llama().to(dtype), num_slots=3), SETTINGS, 64).name == "torch"
    assert ("base_model.dtype float32" in caplog.text) is warns


@pytest.mark.parametrize("supported", [True, False])
def test_whether_bfloat16_is_fast_is_asked_of_onednn_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, supported: bool
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert has_bfloat16() is supported
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.delattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    assert has_bfloat16()


@pytest.mark.parametrize("backend", [pytest.param("native", marks=NEEDS_NATIVE), "torch"])
def test_a_cache_beyond_the_machines_memory_is_refused_at_start(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr("server.backend.memory_bytes", lambda: 3 << 20)
    settings = ServerSettings(backend=backend, kv_cache_mib=4, max_adapters=2)
    with pytest.raises(ConfigError, match=r"kv_cache_mib 4 is more than the memory .*, 3 MiB"):
        build_backend(attach_routing(tiny_llama(), num_slots=3), settings, 64)


@pytest.mark.parametrize("backend", [pytest.param("native", marks=NEEDS_NATIVE), "torch"])
def test_a_cache_that_the_system_has_no_room_for_is_a_setting_to_lower(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr("server.backend.memory_bytes", lambda: None)
    settings = ServerSettings(backend=backend, kv_cache_mib=1 << 40, max_adapters=2)
    with pytest.raises(ConfigError, match=r"no memory for kv_cache_mib 1099511627776; lower it \(.+\)$"):
        build_backend(attach_routing(tiny_llama(), num_slots=3), settings, 64)


def test_drafts_need_the_backend_whose_tokens_they_cannot_change(tiny_llama: Callable[..., Any]) -> None:
    settings = SETTINGS.model_copy(update={"speculative_tokens": 4})
    with pytest.raises(ConfigError, match=r"speculative_tokens needs the native backend.*; set it to 0, or"):
        build_backend(attach_routing(tiny_llama(), num_slots=3), settings, 64)


def test_drafts_that_are_not_made_are_said_to_be_none(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.backend.why_not", lambda *_, **__: "it is Tuesday")
    settings = SETTINGS.model_copy(update={"backend": "auto", "speculative_tokens": 4})
    with caplog.at_level(logging.WARNING):
        assert build_backend(attach_routing(tiny_llama(), num_slots=3), settings, 64).name == "torch"
    assert "speculative_tokens is not used" in caplog.text


@NEEDS_NATIVE
def test_states_of_examples_have_cache_blocks_that_no_sequence_is_given(tiny_llama: Callable[..., Any]) -> None:
    backend = build_backend(
        attach_routing(tiny_llama(), num_slots=3), SETTINGS.model_copy(update={"backend": "native"}), 64
    )
    assert isinstance(backend.states, NativeStates)
    assert isinstance(backend.graph, NativeGraph)
    num_blocks_of_cache = backend.graph._native._cache_shape[1]
    assert set(backend.states._blocks) == set(range(backend.num_blocks, num_blocks_of_cache))
    assert len(backend.states._blocks) == num_state_blocks(SETTINGS.block_size)


def build_int8(model: Any, settings: ServerSettings) -> Any:
    quantized = quantize_model(model)
    return build_backend(attach_routing(model, num_slots=3), settings, 64, quantized)


@NEEDS_NATIVE
def test_int8_weights_are_computed_with_by_the_native_backend(tiny_llama: Callable[..., Any]) -> None:
    assert build_int8(tiny_llama(), SETTINGS.model_copy(update={"backend": "auto"})).name == "native"


def test_int8_weights_are_refused_where_they_would_save_nothing(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ConfigError, match=r"quantization int8 needs the native backend: .*; set it to null, or"
    ) as error:
        build_int8(tiny_llama(), SETTINGS)
    assert error.value.param == "base_model.quantization"
    monkeypatch.setattr("server.backend.why_not", lambda *_, **__: "it is Tuesday")
    with pytest.raises(ConfigError, match="needs the native backend, but it is Tuesday; set it to null"):
        build_int8(tiny_llama(), SETTINGS.model_copy(update={"backend": "auto"}))
