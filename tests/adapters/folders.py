"""Adapter folders to spoil: edit their config or their tensors in place."""

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

BASE = "test/tiny"
"""Name of every base model in these tests."""

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def copied(folder: Path, target: Path) -> Path:
    """A writable copy of an adapter folder."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    return target


def edit_config(folder: Path, changes: Mapping[str, Any]) -> Path:
    """Change fields of the config."""
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Replace the tensors by what `change` makes of them."""
    tensors = change(load_file(folder / WEIGHTS))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    return folder


def raw_tensor_file(header: Any, data: bytes = b"", *, header_bytes: int | None = None) -> bytes:
    """Bytes of a safetensors file with any header, sound or not; `header_bytes` overrides the stated length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if header_bytes is None else header_bytes) + text + data
