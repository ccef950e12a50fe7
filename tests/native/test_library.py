"""Which compiled library is taken, and that there is one where there can be."""

import ctypes
import shutil
import sysconfig
from pathlib import Path

import pytest

from server.native import library
from server.native.library import INTERFACE_VERSION, VARIANTS, cpu_features, libraries, num_cores


def test_every_library_was_built_that_this_cpu_can_run() -> None:
    """The installation goes on when compiling one fails: that must show here, not as a page of skipped tests."""
    if shutil.which("c++"):
        runnable = [name for name, needed in VARIANTS if needed <= cpu_features()]
        assert [name for name in runnable if _interface_of(name) != INTERFACE_VERSION] == []
        assert libraries() or not runnable


def _interface_of(name: str) -> int | None:
    """Version of a built library's interface; None if it was not built."""
    path = Path(library.__file__).parent / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    return int(ctypes.CDLL(str(path)).lm_interface_version()) if path.is_file() else None


def test_cores_are_counted_once() -> None:
    assert 1 <= num_cores() <= 1024


@pytest.mark.parametrize("kept", [0, 64, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("fills", [False, True], ids=["cut off", "zeros behind"])
def test_a_damaged_library_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: float, fills: bool
) -> None:
    """Interrupted copies happen, and full disks; loading one would end the process. The next best library, or torch,
    serves."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for name, _ in VARIANTS:
        path = Path(library.__file__).parent / f"{name}{suffix}"
        content = path.read_bytes() if path.is_file() else bytes(1000)
        part = content[: int(kept * len(content)) if kept < 1 else int(kept)]
        (tmp_path / f"{name}{suffix}").write_bytes(part.ljust(len(content) if fills else 0, b"\0"))
    intact = libraries()
    if intact:
        last = next(path for path in map(Path, (found._name for found in intact[-1:])))
        shutil.copy(last, tmp_path / last.name)
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    assert len(libraries.__wrapped__()) == len(intact[-1:])
