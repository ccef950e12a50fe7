"""The event file read back record by record, and checksums against published values."""

import struct
from pathlib import Path

import pytest

from router_training.event_log import FILE_NAME, EventLog, crc32c, masked_crc


@pytest.mark.parametrize(
    ("data", "expected"),
    # RFC 3720, appendix B.4, and the customary check value.
    [(bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E), (b"123456789", 0xE3069283)],
)
def test_crc32c_gives_the_published_values(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected


def records(content: bytes) -> list[bytes]:
    found = []
    while content:
        length, length_crc = struct.unpack("<QI", content[:12])
        assert length_crc == masked_crc(content[:8])
        payload, payload_crc = content[12 : 12 + length], content[12 + length : 16 + length]
        assert struct.unpack("<I", payload_crc)[0] == masked_crc(payload)
        found.append(payload)
        content = content[16 + length :]
    return found


def fields(message: bytes) -> list[tuple[int, bytes | int]]:
    """(number, value) of a protocol-buffer message."""
    found: list[tuple[int, bytes | int]] = []
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            found.append((number, varint()))
            continue
        size = {1: 8, 5: 4}.get(wire) or varint()
        found.append((number, message[position : position + size]))
        position += size
    return found


def test_every_step_is_an_event_with_its_scalars(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        log.add(0, 0.5, {"train/loss": 2.5})
        log.add(300, 9.0, {"train/loss": 1.25, "train/entropy": 0.5})
    header, first, second = records((tmp_path / FILE_NAME).read_bytes())
    assert dict(fields(header))[3] == b"brain.Event:2"
    assert dict(fields(first))[1] == struct.pack("<d", 0.5)
    event = dict(fields(second))
    assert event[2] == 300
    summary = event[5]
    assert isinstance(summary, bytes)
    scalars = {}
    for _, value in fields(summary):
        assert isinstance(value, bytes)
        pair = dict(fields(value))
        assert isinstance(pair[2], bytes)
        scalars[pair[1]] = struct.unpack("<f", pair[2])[0]
    assert scalars == {b"train/loss": 1.25, b"train/entropy": 0.5}


def test_tensorboard_itself_reads_the_file_where_it_is_installed(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with EventLog(tmp_path) as log:
        log.add(7, 1.0, {"train/loss": 2.5})
    reader = accumulator.EventAccumulator(str(tmp_path))
    reader.Reload()
    assert [(event.step, event.value) for event in reader.Scalars("train/loss")] == [(7, 2.5)]
