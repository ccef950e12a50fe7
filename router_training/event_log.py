"""Scalars for TensorBoard: event files written directly, so that following a run needs no dependency here.

A file is a chain of records (TFRecord): length, masked CRC-32C of the length, payload, masked CRC-32C of the payload;
payloads are protocol-buffer messages `Event` of tensorflow/core/util/event.proto.
"""

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

FILE_NAME = "events.out.tfevents.0.router"
"""TensorBoard recognises event files by `tfevents`; one fixed name, so that a resumed run continues its file."""

CRC_POLYNOMIAL = 0x82F63B78
"""CRC-32C (Castagnoli), bit-reversed."""
CRC_MASK = 0xA282EAD8
"""TFRecord adds this to the rotated checksum, so that checksums of checksums do not collide."""


class EventLog:
    """Writer of one event file. `with EventLog(folder, earlier) as log: log.add(step, seconds, {"loss": 1.2})`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = (folder / FILE_NAME).open("wb")
        # Event{wall_time = 0, file_version = "brain.Event:2"}: what TensorBoard expects first.
        self._write(_double(1, 0.0) + _bytes(3, b"brain.Event:2"))

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, step: int, wall_time_s: float, scalars: Mapping[str, float]) -> None:
        """One event with all scalars of a step."""
        values = b"".join(
            _bytes(1, _bytes(1, name.encode()) + _float(2, value))  # Summary.Value{tag, simple_value}
            for name, value in scalars.items()
        )
        self._write(_double(1, wall_time_s) + _varint_field(2, step) + _bytes(5, values))
        self._file.flush()

    def _write(self, payload: bytes) -> None:
        length = struct.pack("<Q", len(payload))
        for part in (length, struct.pack("<I", masked_crc(length)), payload, struct.pack("<I", masked_crc(payload))):
            self._file.write(part)


def masked_crc(data: bytes) -> int:
    """TFRecord's masked CRC-32C."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + CRC_MASK) & 0xFFFFFFFF


def crc32c(data: Iterable[int]) -> int:
    """CRC-32C bit by bit: a few hundred bytes a step need no table."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ CRC_POLYNOMIAL * (crc & 1)
    return crc ^ 0xFFFFFFFF


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _varint_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _double(number: int, value: float) -> bytes:
    return _varint(number << 3 | 1) + struct.pack("<d", value)


def _float(number: int, value: float) -> bytes:
    return _varint(number << 3 | 5) + struct.pack("<f", value)


def _bytes(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value
