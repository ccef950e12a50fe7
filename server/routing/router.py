"""Routers at rest and in memory: the artefact folder (design section 3.5), and gate rows laid out by slot.

The artefact is the only thing `router_training` hands to the server. Gate rows belong to adapter digests, not to
positions or names; `RouterBank` places them into slots.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from server.atomic_file import remove_leftovers, replace_together
from server.errors import RouterArtefactError
from server.routing.bank import ProjectionInfo
from server.routing.prompt_gate import PromptGate
from server.routing.prompt_statistics import QuestionStatistics

READABLE_VERSIONS = (1, 2, 3)
"""2 added the background statistics of `routing.background`, 3 the prompt gate; the rest is that of 1. Written is 3
with a prompt gate and 2 without, so that a server that knows no prompt gates reads all that it can obey."""
PROMPT_SCORES = "prompt_gate/scores"
PROMPT_STATISTICS = "prompt_gate/statistics/"
JSON_NAME = "router.json"
TENSORS_NAME = "router.safetensors"
Granularity = Literal["layer", "projection"]
MAX_ABSOLUTE_ROW = 1e6
"""Of a gate row's values; trained ones are below a hundred. Far beyond, logits of finite states leave float32."""
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-4, 1e4
"""Of gate logits. Far beyond, they leave float32, or all gates are equal."""


def gate_key(granularity: Granularity, info: ProjectionInfo) -> str:
    """Name of the gate that decides for a projection: its layer's, or its own."""
    return f"layer.{info.layer}" if granularity == "layer" else info.name


@dataclass(frozen=True)
class ArtefactAdapter:
    """One adapter a router has a gate row for. The null expert has the digest `base` (`policy.BASE_DIGEST`)."""

    name: str
    digest: str
    source: str = ""
    revision: str | None = None
    rank: int = 0
    targets: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class RouterArtefact:
    """A trained router: one gate row per adapter and gate, and the record of how it came about."""

    base_model: str
    hidden_size: int
    num_layers: int
    granularity: Granularity
    top_k: int
    temperature: float
    adapters: tuple[ArtefactAdapter, ...]
    rows: Mapping[str, Tensor]
    """gate key -> (len(adapters), d) float32, rows in the order of `adapters`."""
    gate_mode: str = "convex"
    """`convex`: the kept gates sum to 1. The only mode so far."""
    background: Mapping[str, Tensor] = field(default_factory=dict)
    """Statistics of the router's inputs for hot rows, as `routing.background` lays them out; may be empty."""
    prompt_gate: PromptGate | None = None
    """Gives the beginning of a prompt to one adapter; its scores are in the order of `adapters`."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Loss, coefficients, sign, data digest, seed, metrics; for people and reports, never read by the server."""

    @cached_property
    def digests(self) -> frozenset[str]:
        """Digests of the adapters that it has rows for."""
        return frozenset(adapter.digest for adapter in self.adapters)

    @cached_property
    def digest_of(self) -> Mapping[str, str]:
        """Digest of the adapter that it calls by a name."""
        return {adapter.name: adapter.digest for adapter in self.adapters}

    def row_digests(self) -> dict[str, str]:
        """adapter digest -> sha256 over its gate rows in key order; part of prefix-cache fingerprints."""
        digests = {}
        for index, adapter in enumerate(self.adapters):
            sha = hashlib.sha256()
            for key in sorted(self.rows):
                sha.update(key.encode())
                sha.update(self.rows[key][index].contiguous().numpy().tobytes())
            if self.prompt_gate is not None:
                sha.update(self.prompt_gate.scores[:, index].contiguous().numpy().tobytes())
            digests[adapter.digest] = sha.hexdigest()
        return digests

    @property
    def settings(self) -> str:
        """Every setting besides rows and top_k that changes gates, as a stable string."""
        prompt_gate = "" if self.prompt_gate is None else f" {self.prompt_gate.fingerprint}"
        return f"{self.granularity} {self.gate_mode} temperature={self.temperature!r}{prompt_gate}"


def save_artefact(artefact: RouterArtefact, folder: Path) -> None:
    """Write `router.json` and `router.safetensors`; equal artefacts give equal bytes.

    What was there stays until both are on disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (TENSORS_NAME, JSON_NAME):
        remove_leftovers(folder / name)
    tensors = {f"gate/{key}": rows.float() for key, rows in artefact.rows.items()}
    tensors |= {f"background/{key}": value for key, value in artefact.background.items()}
    if artefact.prompt_gate is not None:
        tensors[PROMPT_SCORES] = artefact.prompt_gate.scores
        if (statistics := artefact.prompt_gate.statistics) is not None:
            tensors |= {PROMPT_STATISTICS + key: value for key, value in statistics.tensors().items()}
    # Not save_file, whose files only their owner may read: who trains is not always who serves.
    saved = save({key: tensors[key].contiguous() for key in sorted(tensors)})
    record: dict[str, Any] = {
        "format_version": 2 if artefact.prompt_gate is None else 3,
        "base_model": {
            "name": artefact.base_model,
            "hidden_size": artefact.hidden_size,
            "num_layers": artefact.num_layers,
        },
        "granularity": artefact.granularity,
        "top_k": artefact.top_k,
        "temperature": artefact.temperature,
        "gate_mode": artefact.gate_mode,
        "adapters": [asdict(adapter) for adapter in artefact.adapters],
        "training": artefact.training,
    }
    if artefact.prompt_gate is not None:
        record["prompt_gate"] = artefact.prompt_gate.record()
    text = json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    replace_together({folder / TENSORS_NAME: saved, folder / JSON_NAME: text.encode()})


def load_artefact(folder: Path) -> RouterArtefact:
    """Read an artefact folder. Raises RouterArtefactError that names the file and what is wrong with it."""
    try:
        record = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS_NAME)
    except OSError as error:
        raise RouterArtefactError(
            f"no router artefact in {folder}: cannot read {error.filename or TENSORS_NAME}; "
            f"it must hold {JSON_NAME} and {TENSORS_NAME}"
        ) from error
    except (ValueError, SafetensorError, RecursionError) as error:
        raise RouterArtefactError(f"router artefact in {folder} is damaged: {error}") from error
    version = record.get("format_version") if isinstance(record, dict) else None
    if version not in READABLE_VERSIONS:
        readable = " and ".join(map(str, READABLE_VERSIONS))
        raise RouterArtefactError(f"{folder / JSON_NAME} has format_version {version!r}; this server reads {readable}")
    try:
        artefact = _parse(record, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise RouterArtefactError(
            f"{folder / JSON_NAME} is not a router record: {type(error).__name__} {error}"
        ) from error
    _check(artefact, folder)
    return artefact


def _parse(record: dict[str, Any], tensors: dict[str, Tensor]) -> RouterArtefact:
    base, training = record["base_model"], record.get("training", {})
    if not isinstance(training, dict):
        raise TypeError("training is no object")
    return RouterArtefact(
        base_model=str(base["name"]),
        hidden_size=int(base["hidden_size"]),
        num_layers=int(base["num_layers"]),
        granularity=record["granularity"],
        top_k=int(record["top_k"]),
        temperature=float(record["temperature"]),
        gate_mode=str(record["gate_mode"]),
        adapters=tuple(
            ArtefactAdapter(**{**adapter, "targets": tuple(adapter.get("targets", ()))})
            for adapter in record["adapters"]
        ),
        rows={key.removeprefix("gate/"): value for key, value in tensors.items() if key.startswith("gate/")},
        background={
            key.removeprefix("background/"): value for key, value in tensors.items() if key.startswith("background/")
        },
        prompt_gate=_prompt_gate(record.get("prompt_gate"), tensors),
        training=training,
    )


def _prompt_gate(record: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> PromptGate | None:
    if record is None:
        return None
    gate = PromptGate.from_record(record, tensors[PROMPT_SCORES])
    prefix = len(PROMPT_STATISTICS)
    found = {key[prefix:]: value for key, value in tensors.items() if key.startswith(PROMPT_STATISTICS)}
    return replace(gate, statistics=QuestionStatistics.from_tensors(found)) if found else gate


def _check(artefact: RouterArtefact, folder: Path) -> None:
    problems = []
    if artefact.granularity not in ("layer", "projection"):
        problems.append(f"granularity {artefact.granularity!r} is neither 'layer' nor 'projection'")
    if artefact.gate_mode != "convex":
        problems.append(f"gate_mode {artefact.gate_mode!r} is not supported; this server knows 'convex'")
    if not artefact.adapters:
        problems.append("it lists no adapters")
    if not 1 <= artefact.top_k <= max(1, len(artefact.adapters)):
        problems.append(f"top_k {artefact.top_k} is outside 1..{len(artefact.adapters)}")
    if not MIN_TEMPERATURE <= artefact.temperature <= MAX_TEMPERATURE:
        problems.append(
            f"temperature {artefact.temperature} is not a number from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"
        )
    digests = [adapter.digest for adapter in artefact.adapters]
    problems += [
        f"adapter digest {digest} is listed twice" for digest in sorted({d for d in digests if digests.count(d) > 1})
    ]
    if not artefact.rows:
        problems.append(f"{TENSORS_NAME} holds no gate rows")
    for key, rows in artefact.rows.items():
        if rows.dtype is not torch.float32 or rows.ndim != 2 or rows.shape[0] != len(artefact.adapters):
            problems.append(
                f"gate {key!r} is {rows.dtype} {tuple(rows.shape)}, not float32 ({len(artefact.adapters)}, d)"
            )
        elif not torch.isfinite(rows).all():
            problems.append(f"gate {key!r} has non-finite values")
        elif rows.numel() and (greatest := float(rows.abs().max())) > MAX_ABSOLUTE_ROW:
            problems.append(f"gate {key!r} has values up to {greatest:g}; at most {MAX_ABSOLUTE_ROW:g} is supported")
        elif artefact.granularity == "layer" and rows.shape[1] != artefact.hidden_size:
            problems.append(f"gate {key!r} has width {rows.shape[1]}, not hidden_size {artefact.hidden_size}")
    if artefact.prompt_gate is not None:
        scores = artefact.prompt_gate.scores
        if scores.dtype is not torch.float16 or scores.ndim != 2 or scores.shape[1] != len(artefact.adapters):
            expected = f"float16 (vocabulary, {len(artefact.adapters)})"
            problems.append(f"{PROMPT_SCORES} is {scores.dtype} {tuple(scores.shape)}, not {expected}")
        elif not torch.isfinite(scores).all():
            problems.append(f"{PROMPT_SCORES} has non-finite values")
        elif (count := len(artefact.prompt_gate.answer_ends)) not in (0, len(artefact.adapters)):
            problems.append(f"the prompt gate's answer_ends are {count}, not one per choice")
        elif artefact.prompt_gate.statistics is not None:
            problems += artefact.prompt_gate.statistics.problems(*scores.shape)
    if problems:
        raise RouterArtefactError(f"router artefact in {folder}: " + "; ".join(problems))
