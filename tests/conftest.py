"""Fixtures shared by all tests: tiny seeded models, real PEFT adapters on them, and the demo base model.

Imports of torch, transformers and peft stand inside the fixtures, so that tests without a model start quickly.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

    from server.model.loader import LoadedModel

settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
settings.load_profile("deterministic")


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """Threads only add noise and contention at these sizes."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llama() -> "Callable[..., LlamaForCausalLM]":
    """`tiny_llama(seed=0, **config)`: a fresh random Llama (64 wide, 3 layers, 4 heads, 2 K/V heads), fp32, eval."""

    def build(seed: int = 0, **overrides: Any) -> "LlamaForCausalLM":
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes: dict[str, Any] = {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 3,
            "intermediate_size": 128,
            "vocab_size": 320,
            "max_position_embeddings": 512,
            # Wide enough that greedy choices differ by far more than rounding.
            "initializer_range": 0.2,
            **overrides,
        }
        return cast("LlamaForCausalLM", _random_model(LlamaForCausalLM, LlamaConfig(**sizes), seed))

    return build


@pytest.fixture(scope="session")
def tiny_gpt2() -> "Callable[..., GPT2LMHeadModel]":
    """`tiny_gpt2(seed=0, **config)`: a fresh random GPT-2 (64 wide, 3 layers, 4 heads; projections are Conv1D)."""

    def build(seed: int = 0, **overrides: Any) -> "GPT2LMHeadModel":
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes: dict[str, Any] = {
            "n_embd": 64,
            "n_head": 4,
            "n_layer": 3,
            "n_inner": 128,
            "vocab_size": 320,
            "n_positions": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.2,
            **overrides,
        }
        return cast("GPT2LMHeadModel", _random_model(GPT2LMHeadModel, GPT2Config(**sizes), seed))

    return build


def _random_model(model_class: Any, config: Any, seed: int) -> Any:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config).float().eval()
    return model.requires_grad_(False)


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., Path]:
    """`make_adapter(folder, model, rank, targets, seed=0, dtype=None, std=0.1, **lora_config)` -> `folder`.

    Trains nothing: PEFT creates the adapter on a copy of `model`, every LoRA matrix (A and B) gets seeded normal
    numbers of deviation `std`, and PEFT's own `save_pretrained` writes it. `dtype` ("bfloat16", ...) is the file's.
    """

    def build(
        folder: Path,
        model: "PreTrainedModel",
        rank: int,
        targets: Sequence[str] | str,
        *,
        seed: int = 0,
        dtype: str | None = None,
        std: float = 0.1,
        **lora_config: Any,
    ) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers.pytorch_utils import Conv1D

        uses_conv1d = any(isinstance(module, Conv1D) for module in model.modules())
        lora_config = {"lora_alpha": 2 * rank, "fan_in_fan_out": uses_conv1d, "task_type": "CAUSAL_LM", **lora_config}
        target_modules = targets if isinstance(targets, str) else list(targets)
        config = LoraConfig(r=rank, target_modules=target_modules, **lora_config)
        adapted = get_peft_model(copy.deepcopy(model), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=std, generator=generator)
        if dtype is not None:
            adapted = adapted.to(getattr(torch, dtype))
        adapted.save_pretrained(str(folder))
        return folder

    return build


@pytest.fixture(scope="session")
def demo_model_folder() -> Path:
    """Folder of the demo base model (SmolLM2-135M-Instruct), converted once into the user's cache."""
    from server.config import BaseModelConfig, cache_folder
    from server.model.loader import base_model_folder

    return base_model_folder(BaseModelConfig(), cache_folder=cache_folder(), root=Path())


@pytest.fixture(scope="session")
def demo_base(demo_model_folder: Path) -> "Callable[[Literal['bfloat16', 'float32']], LoadedModel]":
    """`demo_base("float32")`: the demo base model, loaded anew on every call, so tests may change its modules."""

    def load(dtype: Literal["bfloat16", "float32"] = "float32") -> "LoadedModel":
        from server.config import BaseModelConfig, cache_folder
        from server.model.loader import load_base_model

        config = BaseModelConfig(dtype=dtype)
        return load_base_model(config, device="cpu", cache_folder=cache_folder(), root=demo_model_folder)

    return load
