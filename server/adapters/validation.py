"""Checks an adapter's tensors and files against its config and the base model; collects every reason to refuse.

Knows what a servable adapter looks like, not how its weights are used.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from server.adapters.base_name import is_same_base
from server.adapters.matching import HEADS_AND_EMBEDDINGS, TargetSettings
from server.adapters.peft_config import CONFIG_NAME
from server.adapters.tensor_file import DTYPES, TensorEntry
from server.errors import RefusalReason
from server.naming import printable
from server.routing.bank import ProjectionInfo

WEIGHTS_NAME = "adapter_model.safetensors"

PICKLE_NAMES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")

MAX_REASONS_PER_CODE = 8
"""Reasons of one kind that are listed in full; the rest is counted."""

_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])(?:\.default)?\.weight")
"""What PEFT loads: without the adapter's name (as it saves), or with its default name (older files)."""

_FOREIGN_TENSORS: tuple[tuple[str, str, str], ...] = (
    (r"\.lora_magnitude_vector", "dora", "DoRA's magnitude vector"),
    (r"\.lora_[AB](\.default)?\.bias$", "lora_bias", "a trained bias of LoRA"),
    (r"\.lora_embedding_[AB]", "embedding_target", "LoRA on an embedding"),
    (r"\.(token_adapter|trainable_tokens)", "added_tokens", "trained rows of the token embedding"),
    (rf"\.({'|'.join(HEADS_AND_EMBEDDINGS)})\.(base_layer\.|modules_to_save\.)?weight$",
     "added_tokens", "a whole embedding or output head, as adapters with added tokens carry"),
    (r"\.lora_diag", "kasa", "KaSA's singular values"),
    (r"\.lora_velora", "velora", "VeLoRA's projection"),
    (r"\.bias$", "bias", "a trained bias"),
)  # fmt: skip
"""Tensors whose name tells what they are; they make better messages than `unexpected_tensor`."""


@dataclass(frozen=True)
class TensorPair:
    """Where one projection's A and B stand in the file, and what the config says about them."""

    a: str
    b: str
    settings: TargetSettings


def check_base_name(stated: str | None, served: str) -> list[RefusalReason]:
    """Reason to refuse an adapter that was trained on another base model, or that does not say on which."""
    where = f"{CONFIG_NAME}: base_model_name_or_path"
    if not stated:
        message = f"the adapter does not name its base model; this server runs {served!r}"
        return [RefusalReason("base_model_unknown", message, where)]
    if not is_same_base(stated, served):
        message = (
            f"the adapter was trained on {stated[:200]!r}; this server runs {served!r}. If that is the same model, let "
            "base_model.name in adapters.yaml be the adapter's name for it"
        )
        return [RefusalReason("base_model_mismatch", message, where)]
    return []


def check_files(folder: Path, root: Path) -> tuple[frozenset[str], list[RefusalReason]]:
    """Names of the two files that may be read, and reasons: missing, pickled, or linked from outside of `root`."""
    if not folder.is_dir():
        return frozenset(), [RefusalReason("missing_folder", "there is no such folder", "source")]
    reasons = []
    readable = set()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        path = folder / name
        if not path.exists():
            reasons.append(_absent(folder, name))
        elif not path.resolve().is_relative_to(root.resolve()):
            message = (
                f"{name} is a link that leads out of the adapter's folder; copy the adapter with its links resolved "
                "(`cp -rL`), or if the folder is of the Hub's cache, name the source org/name@commit"
            )
            reasons.append(RefusalReason("symlink_escape", message, name))
        elif not path.is_file():
            reasons.append(RefusalReason("not_a_file", f"{name} is not a regular file", name))
        else:
            readable.add(name)
    return frozenset(readable), reasons


def check_tensors(
    entries: Mapping[str, TensorEntry],
    targets: Mapping[str, TargetSettings],
    projections: Mapping[str, ProjectionInfo],
) -> tuple[dict[str, TensorPair], list[RefusalReason]]:
    """Sound pairs by projection name, and reasons: unexpected, missing or doubled tensors, wrong shapes or dtypes."""
    reasons: list[RefusalReason] = []
    found: dict[tuple[str, str], str] = {}
    for name in entries:
        match = _TENSOR_NAME.fullmatch(name)
        if match is None or match["module"] not in targets:
            reasons.append(_unexpected(name, match["module"] if match else None, projections))
        elif (key := (match["module"], match["matrix"])) in found:
            message = f"the tensor stands in the file twice, as {found[key]!r} too"
            reasons.append(RefusalReason("duplicate_tensor", message, f"{WEIGHTS_NAME}: {name[:200]}"))
        else:
            found[key] = name
    pairs = {}
    for module, settings in targets.items():
        a, b = found.get((module, "A")), found.get((module, "B"))
        reasons += [_missing(module, matrix) for matrix, name in (("A", a), ("B", b)) if name is None]
        if a is not None and b is not None:
            problems = _check_pair(entries[a], entries[b], settings, projections[module])
            reasons += problems
            if not problems:
                pairs[module] = TensorPair(a, b, settings)
    return pairs, reasons


def capped(reasons: Iterable[RefusalReason]) -> list[RefusalReason]:
    """At most `MAX_REASONS_PER_CODE` of each code, and one more that counts the rest; all fit to be printed."""
    kept: list[RefusalReason] = []
    counts: Counter[str] = Counter()
    for reason in reasons:
        counts[reason.code] += 1
        if counts[reason.code] <= MAX_REASONS_PER_CODE:
            kept.append(RefusalReason(reason.code, printable(reason.message), printable(reason.where)))
    for code, count in counts.items():
        if count > MAX_REASONS_PER_CODE:
            message = f"and {count - MAX_REASONS_PER_CODE} more of the kind {code!r}"
            kept.append(RefusalReason(code, message, WEIGHTS_NAME))
    return kept


def _absent(folder: Path, name: str) -> RefusalReason:
    pickled = [other for other in PICKLE_NAMES if (folder / other).exists()]
    if name == WEIGHTS_NAME and pickled:
        message = f"the weights are pickled ({pickled[0]}), which can run code; save them as safetensors"
        return RefusalReason("pickle_file", message, pickled[0])
    return RefusalReason("missing_file", f"the folder has no {name}", name)


def _unexpected(name: str, module: str | None, projections: Mapping[str, ProjectionInfo]) -> RefusalReason:
    where = f"{WEIGHTS_NAME}: {name[:200]}"
    for pattern, code, what in _FOREIGN_TENSORS:
        if re.search(pattern, name):
            return RefusalReason(code, f"the file holds {what}, which is not served", where)
    if module is None:
        return RefusalReason("unexpected_tensor", "the tensor is no LoRA weight that PEFT would load", where)
    if module not in projections:
        message = f"{module[:200]!r} is no adaptable projection of the base model"
        return RefusalReason("unknown_target_modules", message, where)
    message = "the file has weights for a projection that its config does not target"
    return RefusalReason("unexpected_tensor", message, where)


def _missing(module: str, matrix: str) -> RefusalReason:
    where = f"{WEIGHTS_NAME}: base_model.model.{module}.lora_{matrix}.weight"
    return RefusalReason("missing_tensor", f"the config targets {module!r} but the file has no lora_{matrix}", where)


def _check_pair(a: TensorEntry, b: TensorEntry, settings: TargetSettings, info: ProjectionInfo) -> list[RefusalReason]:
    reasons = []
    for entry, expected in ((a, (settings.rank, info.d_in)), (b, (info.d_out, settings.rank))):
        where = f"{WEIGHTS_NAME}: {entry.name}"
        if entry.dtype not in DTYPES:
            message = f"the tensor is {entry.dtype[:20]}; served are {', '.join(DTYPES)}"
            reasons.append(RefusalReason("unsupported_dtype", message, where))
        if entry.shape != expected:
            rank_axis = 0 if entry is a else 1
            is_rank_only = len(entry.shape) == 2 and entry.shape[1 - rank_axis] == expected[1 - rank_axis]
            code = "rank_mismatch" if is_rank_only else "shape_mismatch"
            message = f"the shape is {entry.shape}; config and base model demand {expected}"
            reasons.append(RefusalReason(code, message, where))
    return reasons
