"""Architectures whose numbers would be wrong in steps are refused at start, by name; those that are right are not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from server.backend import build_backend
from server.config import ServerSettings
from server.errors import ModelLoadError
from server.routing.attach import attach_routing

SETTINGS = ServerSettings(kv_cache_mib=4, max_adapters=2)
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
}

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "positions that depend on the length": (
        lambda: transformers.LlamaConfig(**GROUPED, rope_parameters=LONGROPE),
        "rope_type longrope",
    ),
    "state-space layers beside attention": (
        lambda: transformers.FalconH1Config(
            **GROUPED, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, mamba_chunk_size=16
        ),
        "convolves over tokens",
    ),
    "a mask in chunks": (
        lambda: transformers.Llama4TextConfig(
            **GROUPED, num_local_experts=2, intermediate_size_mlp=96, attention_chunk_size=64
        ),
        "has attention_chunk_size 64, which its layers do not pass .*max_model_len to at most 64",
    ),
    "a window in a mask": (
        lambda: transformers.PhimoeConfig(**GROUPED, num_local_experts=2, sliding_window=64),
        "has sliding_window 64",
    ),
    "attention both ways": (
        lambda: transformers.Gemma3TextConfig(**GROUPED, use_bidirectional_attention=True),
        "disagrees with transformers' graph",
    ),
    "an encoder": (lambda: transformers.BertConfig(**SIZES), "disagrees with transformers' graph"),
    "positions that are counted inside": (
        lambda: transformers.BartConfig(
            vocab_size=320,
            d_model=64,
            decoder_layers=2,
            encoder_layers=2,
            decoder_attention_heads=4,
            decoder_ffn_dim=96,
        ),
        "disagrees with transformers' graph",
    ),
}


def model_of(config: Any, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return model.to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_steps_would_compute_wrongly_is_refused(name: str, dtype: torch.dtype) -> None:
    make, words = REFUSED[name]
    with pytest.raises(ModelLoadError, match=words):
        build_backend(attach_routing(model_of(make(), dtype), num_slots=3), SETTINGS, 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda: transformers.MistralConfig(**GROUPED, sliding_window=11),
        lambda: transformers.Gemma3TextConfig(**GROUPED, sliding_window=11),
        lambda: transformers.Qwen2Config(**{**SIZES, "num_key_value_heads": 2}, sliding_window=11),
        lambda: transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=320),
        lambda: transformers.PhimoeConfig(**GROUPED, num_local_experts=2, sliding_window=128),
    ],
    ids=["window", "some windows", "a window that is off", "learned positions", "a window nobody outgrows"],
)
def test_a_model_that_steps_compute_rightly_is_not(make: Callable[[], Any], dtype: torch.dtype) -> None:
    build_backend(attach_routing(model_of(make(), dtype), num_slots=3), SETTINGS, 128)


def test_a_model_whose_forward_pass_fails_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=320), torch.float32)
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: None)
    with pytest.raises(ModelLoadError, match="GPT2LMHeadModel cannot compute a text: AttributeError"):
        build_backend(attach_routing(model, num_slots=3), SETTINGS, 128)
