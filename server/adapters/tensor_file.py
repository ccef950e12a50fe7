"""Reading a safetensors file from a stranger: header first, checked in full, then one tensor at a time.

The format (huggingface/safetensors): 8 bytes little-endian header length, a JSON header, then raw data. The header is
bounded before it is parsed, its offsets must tile the data exactly, and nothing in the file is ever executed. The file
stays open from the check to the last read, so what was checked is what is read.
"""

import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from server.adapters.strict_json import StrictJsonError, parse_object

MAX_HEADER_BYTES = 4 * 1024**2
"""Largest header parsed; a LoRA on all seven projections of 126 layers needs 0.4 MB."""

DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Accepted dtypes; all convert to float32 exactly."""

_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
}
"""Bytes of one item; every other dtype of the format (BOOL, I8, U8, F8_*) has one or less and is refused anyway."""


class TensorFileError(ValueError):
    """The file is no safetensors file, or not a consistent one; the message says why."""


class FileTooLargeError(TensorFileError):
    """The file is larger than the caller allows."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as the header states it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """An open, checked safetensors file. Create it with `open_tensor_file`."""

    def __init__(
        self, file: BufferedReader, entries: Mapping[str, TensorEntry], data_start: int, num_bytes: int
    ) -> None:
        self._file = file
        self._data_start = data_start
        self.entries = entries
        self.num_bytes = num_bytes
        """Size of the whole file."""

    def read(self, name: str) -> Tensor:
        """One tensor as float32, in memory of its own. Raises TensorFileError when the file has shrunk meanwhile."""
        entry = self.entries[name]
        buffer = bytearray(entry.end - entry.begin)
        self._file.seek(self._data_start + entry.begin)
        if self._file.readinto(buffer) != len(buffer):
            raise TensorFileError(f"the file ended while {name} was read")
        if not buffer:
            return torch.zeros(entry.shape)
        return torch.frombuffer(buffer, dtype=DTYPES[entry.dtype]).reshape(entry.shape).float()


@contextmanager
def open_tensor_file(path: Path, *, max_bytes: int) -> Iterator[TensorFile]:
    """Open and check a file. Raises TensorFileError, and OSError when it cannot be read."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise TensorFileError("it is not a regular file")
        if status.st_size > max_bytes:
            raise FileTooLargeError(f"it has {status.st_size} bytes, more than the limit of {max_bytes}")
        entries, data_start = _read_header(file, status.st_size)
        yield TensorFile(file, entries, data_start, status.st_size)


def _read_header(file: BufferedReader, file_bytes: int) -> tuple[dict[str, TensorEntry], int]:
    if file_bytes < 8:
        raise TensorFileError(f"it has {file_bytes} bytes; a safetensors file has at least 8")
    header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise TensorFileError(f"its header claims {header_bytes} bytes, more than the limit of {MAX_HEADER_BYTES}")
    if 8 + header_bytes > file_bytes:
        raise TensorFileError(f"it is truncated: its header claims {header_bytes} bytes, the file has {file_bytes}")
    try:
        header = parse_object(file.read(header_bytes), max_bytes=MAX_HEADER_BYTES)
    except StrictJsonError as error:
        raise TensorFileError(f"its header cannot be read: {error}") from error
    header.pop("__metadata__", None)
    entries = {name: _entry(name, content) for name, content in header.items()}
    _check_tiling(entries, file_bytes - 8 - header_bytes)
    return entries, 8 + header_bytes


def _entry(name: str, content: Any) -> TensorEntry:
    shown = name[:200]
    if not isinstance(content, dict) or set(content) != {"dtype", "shape", "data_offsets"}:
        raise TensorFileError(f"the header entry of {shown!r} does not hold exactly dtype, shape and data_offsets")
    dtype, shape, offsets = content["dtype"], content["shape"], content["data_offsets"]
    is_sound = (
        isinstance(dtype, str)
        and isinstance(shape, list)
        and isinstance(offsets, list)
        and len(offsets) == 2
        and len(shape) <= 8
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**48 for n in [*shape, *offsets])
    )
    if not is_sound or offsets[0] > offsets[1]:
        raise TensorFileError(f"the header entry of {shown!r} is malformed")
    entry = TensorEntry(name, dtype, tuple(shape), offsets[0], offsets[1])
    item_bytes = _ITEM_BYTES.get(dtype)
    if item_bytes is not None and math.prod(entry.shape) * item_bytes != entry.end - entry.begin:
        raise TensorFileError(
            f"{shown!r} is {dtype} {shape} but its data has {entry.end - entry.begin} bytes, not "
            f"{math.prod(entry.shape) * item_bytes}"
        )
    return entry


def _check_tiling(entries: Mapping[str, TensorEntry], data_bytes: int) -> None:
    """Tensors must follow each other without gap or overlap up to the very end, as the format demands."""
    position = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != position:
            problem = "overlaps the one before it" if entry.begin < position else "leaves a gap before it"
            raise TensorFileError(f"the data of {entry.name[:200]!r} {problem}")
        position = entry.end
    if position != data_bytes:
        problem = "truncated" if position > data_bytes else "overlong"
        raise TensorFileError(f"it is {problem}: its tensors need {position} data bytes, the file has {data_bytes}")
