"""Loads the frozen base model and its tokenizer from a Hub id, a folder, a GGUF file or an installed package.

Knows nothing about adapters or routing; whoever attaches those gets the plain transformers model.
"""

import logging
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from server.config import BaseModelConfig
from server.errors import ModelLoadError
from server.model.compatibility import check_model_folder
from server.model.conversion import convert_once
from server.model.loader_hub import download_model
from server.model.progress import quiet_transformers
from server.model.quantization import Int8Weight, quantize_model
from server.model.sources import FolderSource, HubSource, locate
from server.model.tokenizer import ChatTokenizer

logger = logging.getLogger(__name__)

UNLIMITED_MODEL_LEN = 1 << 20
"""Context length, in tokens, of models that state none (ALiBi, state-space models); the K/V cache is the limit then."""

_DEVICE = re.compile(r"cpu|cuda(:(?P<index>\d+))?")


@dataclass(frozen=True)
class LoadedModel:
    """A base model ready to serve: on its device, in eval mode, no parameter requires gradients."""

    model: PreTrainedModel
    tokenizer: ChatTokenizer
    config: PretrainedConfig
    name: str
    """Identity that adapters must have been trained on."""
    revision: str | None
    """Commit of a Hub source."""
    source_sha256: str | None
    """Digest of the GGUF file the weights come from; None for safetensors sources."""
    max_model_len: int
    """Longest prompt plus output the model itself allows, in tokens."""
    eos_token_ids: frozenset[int]
    vocab_size: int
    """Width of the logits; may exceed the tokenizer's number of tokens."""
    quantized: dict[str, Int8Weight] = field(default_factory=dict)
    """The int8 weights that the linear layers' stand for, by module path, if they were rounded; else empty. To be
    cleared once they are packed."""


@dataclass(frozen=True)
class ModelFolder:
    """A local model folder and where it came from."""

    path: Path
    revision: str | None = None
    source_sha256: str | None = None


def base_model_folder(config: BaseModelConfig, *, cache_folder: Path, root: Path) -> Path:
    """Folder with the base model's safetensors, config and tokenizer; downloads or converts first where needed."""
    return resolve_model_folder(config, cache_folder=cache_folder, root=root).path


def resolve_model_folder(config: BaseModelConfig, *, cache_folder: Path, root: Path) -> ModelFolder:
    """As `base_model_folder`, with the commit or digest. Relative sources start at `root`. Raises ModelLoadError."""
    source = locate(config, root)
    if isinstance(source, HubSource):
        folder, commit = download_model(source)
        return ModelFolder(folder, revision=commit)
    if isinstance(source, FolderSource):
        return ModelFolder(source.path)
    conversion = convert_once(source, cache_folder)
    return ModelFolder(conversion.folder, source_sha256=conversion.source_sha256)


def load_base_model(config: BaseModelConfig, *, device: str, cache_folder: Path, root: Path) -> LoadedModel:
    """Load model and tokenizer. `device` is `cpu`, `cuda` or `cuda:N`. Raises ModelLoadError, saying what to do."""
    started = time.monotonic()
    torch_device = parse_device(device)
    folder = resolve_model_folder(config, cache_folder=cache_folder, root=root)
    check_model_folder(folder.path)
    tokenizer = ChatTokenizer.from_folder(folder.path)
    model = _load_weights(folder.path, getattr(torch, config.dtype), torch_device)
    quantized = quantize_model(model) if config.quantization else {}
    model.name_or_path = model.config.name_or_path = config.name
    text_config = model.config.get_text_config()
    loaded = LoadedModel(
        model=model,
        tokenizer=tokenizer,
        config=model.config,
        name=config.name,
        revision=folder.revision,
        source_sha256=folder.source_sha256,
        max_model_len=getattr(text_config, "max_position_embeddings", None) or UNLIMITED_MODEL_LEN,
        eos_token_ids=_eos_token_ids(model, tokenizer),
        vocab_size=text_config.vocab_size,
        quantized=quantized,
    )
    precision = f"{config.dtype}, weights {config.quantization}" if config.quantization else config.dtype
    logger.info("loaded %s as %s on %s in %.1f s", config.name, precision, torch_device, time.monotonic() - started)
    return loaded


def parse_device(device: str) -> torch.device:
    """The torch device of a setting. Raises ModelLoadError if it is unknown or not present on this machine."""
    match = _DEVICE.fullmatch(device)
    if match is None:
        raise ModelLoadError(f"unknown device {device!r}: use cpu, cuda or cuda:N", param="server.device")
    if device == "cpu":
        return torch.device(device)
    if not torch.cuda.is_available():
        raise ModelLoadError(
            f"device {device!r}: torch {torch.__version__} sees no CUDA device. Use cpu, or install a CUDA build of "
            "torch and the NVIDIA driver.",
            param="server.device",
        )
    index, count = int(match["index"] or 0), torch.cuda.device_count()
    if index >= count:
        raise ModelLoadError(
            f"device {device!r}: this machine has {count} CUDA devices, numbered from 0", param="server.device"
        )
    return torch.device("cuda", index)


def _load_weights(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    try:
        with quiet_transformers():
            # Annotated because the stub omits that a report comes along.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        model: PreTrainedModel
        model, report = loaded
        _refuse_incomplete(folder, report)
        model.eval().requires_grad_(False)
        torch.nn.Module.to(model, device)  # the override's decorator hides its signature from type checkers
        return model
    except ModelLoadError:
        raise
    except Exception as error:  # The files are foreign content, and every architecture fails in its own way.
        raise ModelLoadError(
            f"the base model in {folder} cannot be loaded: {type(error).__name__}: {error}. If its files are damaged, "
            "delete the folder and start again."
        ) from error


def _refuse_incomplete(folder: Path, report: dict[str, Any]) -> None:
    """transformers fills weights that a checkpoint lacks with random numbers; serving those is silent nonsense."""
    problems = [
        f"{len(report[kind])} {label} (first: {sorted(map(str, report[kind]))[0]})"
        for kind, label in (("missing_keys", "weights missing"), ("mismatched_keys", "weights of another shape"))
        if report.get(kind)
    ]
    if problems:
        raise ModelLoadError(
            f"the safetensors in {folder} do not fill the model of its config.json: {', '.join(problems)}. "
            "Fetch config.json and weights from the same place."
        )
    if unexpected := report.get("unexpected_keys"):
        logger.warning("%s holds %d weights that the model does not use", folder, len(unexpected))


def _eos_token_ids(model: PreTrainedModel, tokenizer: ChatTokenizer) -> frozenset[int]:
    """Generation config, else config; and always the tokenizer's, which is what a chat template ends turns with.

    Raises ModelLoadError for what is no number: such a stop would never match, and answers would not end.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    if configured is None:
        configured = getattr(model.config.get_text_config(), "eos_token_id", None)
    ids = configured if isinstance(configured, list | tuple) else [configured]
    known = [token_id for token_id in (*ids, tokenizer.eos_token_id) if token_id is not None]
    if wrong := [token_id for token_id in known if not isinstance(token_id, int)]:
        raise ModelLoadError(
            f"the base model's eos_token_id holds {wrong[0]!r}, which is no token id; correct generation_config.json"
        )
    return frozenset(known)
