"""Memory of the K/V cache: zeros that cost nothing until they are written to."""

import pytest

from server.native.memory import lazy_zeros

MIB = 1 << 20


def _resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_zeros_take_memory_as_they_are_written_to() -> None:
    before = _resident()
    zeros = lazy_zeros(512 * MIB)
    assert _resident() - before < 64 * MIB
    zeros[: 128 * MIB] = 1
    assert 128 * MIB <= _resident() - before < 256 * MIB
    assert zeros.numel() == 512 * MIB
    assert not zeros[128 * MIB :: 4096].any()


def test_the_memory_goes_with_the_tensor() -> None:
    before = _resident()
    zeros = lazy_zeros(256 * MIB)
    zeros[:] = 1
    view = zeros[:16]
    del zeros
    assert view.sum() == 16
    del view
    assert _resident() - before < 64 * MIB


def test_more_than_there_is_room_for_is_refused() -> None:
    with pytest.raises(MemoryError, match=r"no 1,152,921,504,606,846,976 bytes"):
        lazy_zeros(1 << 60)
