"""Decides from a model folder's JSON files whether we may and can serve it, before any code of a model class runs.

Remote code is never run: whatever asks for it is refused here, whatever transformers would make of it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from server.errors import ModelLoadError

WEIGHTS_INDEX = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"

_IMPLEMENTATIONS = {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "grouped_mm"}
"""Values of `*_implementation` keys that name code inside transformers. Anything else may be a Hub repository of
kernels, which transformers downloads and runs (CVE-2026-4372)."""

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
"""How architectures call their number of decoder layers."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check_model_folder(folder: Path) -> dict[str, Any]:
    """Return config.json of a servable model folder. Raises ModelLoadError with every problem found."""
    config = _read_json(folder / "config.json")
    problems = [*_remote_code(config, "config.json"), *_unservable(config), *_missing_files(folder)]
    tokenizer_config = folder / "tokenizer_config.json"
    if tokenizer_config.exists():
        problems += _remote_code(_read_json(tokenizer_config), tokenizer_config.name)
    if problems:
        raise ModelLoadError(f"{folder} cannot be served: " + "; ".join(problems))
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(
            f"{path.parent} has no {path.name}. A model folder holds config.json, tokenizer files and *.safetensors; "
            "set base_model.source to such a folder."
        ) from None
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"cannot read {path}: {error}. Fetch the file again.") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path} must hold a JSON object. Fetch the file again.")
    return content


def _remote_code(config: dict[str, Any], file: str) -> Iterator[str]:
    for place, key, value in _entries(config):
        where = f"{file}, key {place!r}"
        if key == "auto_map" and value:
            yield f"{where}: the model needs its own Python code (trust_remote_code), which this server never runs"
        elif key.endswith("_implementation_internal") and value is not None:
            yield f"{where}: private setting that makes transformers download and run code; remove the key"
        elif key.endswith("_implementation") and value is not None and not _is_built_in(value):
            yield f"{where}: {value!r} is not an implementation inside transformers; remove the key"


def _is_built_in(value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else [value]
    return all(entry is None or entry in _IMPLEMENTATIONS for entry in values)


def _entries(content: Any, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """(dotted place, key, value) of every key at any depth."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield f"{prefix}{key}", str(key), value
            yield from _entries(value, f"{prefix}{key}.")
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from _entries(value, f"{prefix}{index}.")


def _unservable(config: dict[str, Any]) -> Iterator[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.get("model_type")
    causal_class = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) if isinstance(model_type, str) else None
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        architectures = [architectures]
    if causal_class is None:
        yield f"config.json, key 'model_type': transformers knows no causal language model of type {model_type!r}"
    elif architectures and causal_class not in architectures:
        yield (
            f"config.json, key 'architectures': {', '.join(map(str, architectures))} is not the causal language model "
            f"of type {model_type!r}, {causal_class}"
        )
    for key in _LAYER_COUNTS:
        if isinstance(count := config.get(key), int) and count < 1:
            yield f"config.json, key {key!r}: a model of {count} layers has nothing to serve or to adapt"
    if config.get("is_encoder_decoder"):
        yield "config.json, key 'is_encoder_decoder': encoder-decoder models are not served, only decoders"
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        yield (
            f"config.json, key 'quantization_config': weights quantised with {method!r} are not served; "
            "use the unquantised model, or a .gguf file, which is unpacked"
        )


def _missing_files(folder: Path) -> Iterator[str]:
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        yield f"no tokenizer files ({', '.join(_TOKENIZER_FILES)})"
    index = folder / WEIGHTS_INDEX
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        shards = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
        if not shards:
            yield f"{WEIGHTS_INDEX} has no weight_map of tensors to files; fetch it again"
        elif outside := sorted(shard for shard in shards if Path(shard).name != shard):
            yield f"{WEIGHTS_INDEX} names files outside the folder: {', '.join(outside)}"
        elif missing := sorted(shard for shard in shards if not (folder / shard).exists()):
            yield f"{WEIGHTS_INDEX} names files that are missing: {', '.join(missing)}; fetch them again"
    elif not (folder / WEIGHTS_FILE).exists():
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth"})
        because = f"; {', '.join(pickled)} is pickle, which can run code and is never read" if pickled else ""
        yield f"no {WEIGHTS_FILE}{because}; convert the weights to safetensors"
