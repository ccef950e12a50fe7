"""Measurements kept by content."""

from pathlib import Path
from typing import Any

import pytest

from router_training.cells import CellCache


def test_equal_facts_are_measured_once_and_others_anew(tmp_path: Path) -> None:
    cells, calls = CellCache(tmp_path / "cells"), []

    def measure() -> dict[str, Any]:
        calls.append(1)
        return {"nll": 1 / 3, "pair": (1, 2)}

    first = cells.get({"a": 1, "b": 2}, measure)
    assert first == {"nll": 1 / 3, "pair": [1, 2]}
    assert CellCache(tmp_path / "cells").get({"b": 2, "a": 1}, measure) == first
    assert len(calls) == 1
    cells.get({"a": 2, "b": 2}, measure)
    assert len(calls) == 2
    assert not list((tmp_path / "cells").glob("*.tmp"))


def test_without_a_folder_nothing_is_kept() -> None:
    calls: list[int] = []
    for _ in range(2):
        CellCache(None).get({"a": 1}, lambda: calls.append(1))
    assert len(calls) == 2


@pytest.mark.parametrize("content", [b"", b'{"facts": {', b"[1]", b"{}", b"\xff"])
def test_a_damaged_measurement_is_made_anew(tmp_path: Path, content: bytes) -> None:
    cells = CellCache(tmp_path)
    cells.get({"a": 1}, lambda: 1)
    next(tmp_path.glob("*.json")).write_bytes(content)
    assert cells.get({"a": 1}, lambda: 2) == 2
    assert cells.get({"a": 1}, lambda: 3) == 2
