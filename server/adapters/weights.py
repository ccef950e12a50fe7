"""A PEFT LoRA folder -> Adapter: immutable, validated, with PEFT's own numbers and a digest of its content.

Nothing from the folder is ever executed: its config is plain JSON, its weights are safetensors, its patterns run in a
bounded matcher. Knows no registry and no Hub.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from server.adapters.examples import NO_EXAMPLES, ExamplesFile
from server.adapters.matching import TargetSettings, match_targets
from server.adapters.peft_config import CONFIG_NAME, MAX_CONFIG_BYTES, parse_config
from server.adapters.strict_json import StrictJsonError, parse_object
from server.adapters.tensor_file import FileTooLargeError, TensorFile, TensorFileError, open_tensor_file
from server.adapters.validation import WEIGHTS_NAME, TensorPair, capped, check_base_name, check_files, check_tensors
from server.errors import AdapterRefusedError, RefusalReason
from server.routing.bank import LoraWeights, ProjectionInfo

MAX_ABSOLUTE_WEIGHT = 1e4
"""Largest entry of A, or of B with the scaling folded in. Trained ones stay below 10; entries beyond this overflow
half precision within a layer or two, and with routing the victim did not even name the adapter."""

_DIGEST_VERSION = b"lora-mixer adapter digest 1\n"


@dataclass(frozen=True)
class AdapterLimits:
    """What an adapter may cost; the server's settings of the same names."""

    max_rank: int = 512
    max_bytes: int = 2 * 1024**3
    """Bytes of the weights file."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """One LoRA adapter, ready for the bank."""

    name: str
    digest: str
    """sha256 over the weights and the scaling of each projection, in hex; blind to file layout, dtype and names."""
    rank: int
    """Largest rank of any projection."""
    targets: tuple[str, ...]
    """Leaf names of the adapted projections, sorted, e.g. ("q_proj", "v_proj")."""
    weights: Mapping[str, LoraWeights]
    """Projection name -> float32 A (r, d_in) and B (d_out, r) with the scaling folded in."""
    num_bytes: int
    """Bytes of the weights file."""
    source: str
    revision: str | None
    base_model_name: str
    examples: ExamplesFile = NO_EXAMPLES
    """The examples of its source; not checked before somebody wants a gate row from them."""


@dataclass(frozen=True)
class _Content:
    """What the weights file holds."""

    weights: Mapping[str, LoraWeights]
    digest: str
    num_bytes: int


def load_adapter(
    folder: Path,
    name: str,
    *,
    projections: Mapping[str, ProjectionInfo],
    base_model_name: str,
    limits: AdapterLimits = AdapterLimits(),
    source: str | None = None,
    revision: str | None = None,
    link_root: Path | None = None,
) -> Adapter:
    """Read and check one adapter folder for the base model whose projections are given.

    `link_root` is the folder that symlinked files may lie in (a Hub cache); by default the adapter's own folder.
    Raises AdapterRefusedError with every reason found.
    """
    readable, reasons = check_files(folder, link_root or folder)
    targets: dict[str, TargetSettings] = {}
    if CONFIG_NAME in readable:
        targets, problems = _read_targets(folder / CONFIG_NAME, projections, base_model_name, limits)
        reasons += problems
    content = None
    if WEIGHTS_NAME in readable:
        content, problems = _read_content(folder / WEIGHTS_NAME, targets, projections, limits)
        reasons += problems
    if reasons or content is None:
        raise AdapterRefusedError(name, capped(reasons))
    return Adapter(
        name=name,
        digest=content.digest,
        rank=max(settings.rank for settings in targets.values()),
        targets=tuple(sorted({projection.rpartition(".")[2] for projection in targets})),
        weights=content.weights,
        num_bytes=content.num_bytes,
        source=str(folder) if source is None else source,
        revision=revision,
        base_model_name=base_model_name,
    )


def _read_targets(
    path: Path, projections: Mapping[str, ProjectionInfo], base_model_name: str, limits: AdapterLimits
) -> tuple[dict[str, TargetSettings], list[RefusalReason]]:
    """Settings of every adapted projection; none where the config is too broken to tell."""
    try:
        with path.open("rb") as file:
            content = parse_object(file.read(MAX_CONFIG_BYTES + 1), max_bytes=MAX_CONFIG_BYTES)
    except (StrictJsonError, OSError) as error:
        return {}, [RefusalReason("damaged_config", f"the config cannot be used: {error}", CONFIG_NAME)]
    config, reasons = parse_config(content, max_rank=limits.max_rank)
    stated = content.get("base_model_name_or_path")
    reasons += check_base_name(stated if isinstance(stated, str) else None, base_model_name)
    if config is None:
        return {}, reasons
    targets, problems = match_targets(config, tuple(projections))
    return targets, reasons + problems


def _read_content(
    path: Path, targets: Mapping[str, TargetSettings], projections: Mapping[str, ProjectionInfo], limits: AdapterLimits
) -> tuple[_Content | None, list[RefusalReason]]:
    """Weights of the targets. Without targets only the file itself is checked: nothing can be said about tensors."""
    try:
        with open_tensor_file(path, max_bytes=limits.max_bytes) as file:
            if not targets:
                return None, []
            pairs, reasons = check_tensors(file.entries, targets, projections)
            weights, digest, problems = _read_weights(file, pairs)
            return _Content(weights, digest, file.num_bytes), reasons + problems
    except FileTooLargeError as error:
        return None, [RefusalReason("file_too_large", str(error), WEIGHTS_NAME)]
    except (TensorFileError, OSError) as error:
        return None, [RefusalReason("damaged_weights", f"the file cannot be used: {error}", WEIGHTS_NAME)]


def _read_weights(
    file: TensorFile, pairs: Mapping[str, TensorPair]
) -> tuple[dict[str, LoraWeights], str, list[RefusalReason]]:
    """float32 matrices with the scaling folded into B (PEFT merges scaling * (B @ A)), their digest, and reasons."""
    weights = {}
    reasons = []
    sha = hashlib.sha256(_DIGEST_VERSION)
    for module in sorted(pairs):
        pair = pairs[module]
        a, b = file.read(pair.a), file.read(pair.b)
        sha.update(f"{module} {pair.settings.rank} {pair.settings.scaling!r}\n".encode())
        for tensor in (a, b):
            sha.update(tensor.numpy().astype("<f4", copy=False).tobytes())
        weights[module] = LoraWeights(a, b * pair.settings.scaling)
        reasons += _value_problems(a, pair.a)
        reasons += _value_problems(weights[module].B, pair.b)
    return weights, sha.hexdigest(), reasons


def _value_problems(tensor: torch.Tensor, name: str) -> list[RefusalReason]:
    where = f"{WEIGHTS_NAME}: {name}"
    if not torch.isfinite(tensor).all():
        return [RefusalReason("non_finite_weights", "the tensor has values that are not finite", where)]
    if tensor.abs().max() > MAX_ABSOLUTE_WEIGHT:
        message = f"the tensor, with its scaling, has values beyond ±{MAX_ABSOLUTE_WEIGHT:g}; no trained adapter has"
        return [RefusalReason("absurd_weights", message, where)]
    return []
