"""The base model's architecture without its weights: enough to say which projections an adapter may target."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from server.config import BaseModelConfig
from server.errors import ModelLoadError
from server.model.compatibility import check_model_folder
from server.model.loader import base_model_folder


def load_skeleton(config: BaseModelConfig, *, cache_folder: Path, root: Path) -> nn.Module:
    """The model that `load_base_model` would load, on torch's meta device: modules and shapes, no numbers.

    The source is found (downloaded, converted) exactly as for serving. Raises ModelLoadError.
    """
    folder = base_model_folder(config, cache_folder=cache_folder, root=root)
    check_model_folder(folder)
    build: Any = AutoModelForCausalLM.from_config
    try:
        architecture = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model: nn.Module = build(architecture)
    except Exception as error:  # The config is foreign content, and every architecture fails in its own way.
        problem = f"{type(error).__name__}: {error}"
        raise ModelLoadError(f"the architecture of the base model in {folder} cannot be built: {problem}") from error
    return model.eval().requires_grad_(False)
