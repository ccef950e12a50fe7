"""The thread team of the native step, alone: what one thread throws reaches the caller, and the team goes on."""

import shutil
import subprocess
from pathlib import Path

import pytest

import server.native

HERE = Path(__file__).parent
SOURCES = Path(server.native.__file__).parent / "src"
COMPILER = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The team's driver, compiled."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("threads") / "driver"
    flags = ["-O2", "-std=c++17", "-pthread", "-mavx2", f"-I{SOURCES}"]
    built = subprocess.run(
        [COMPILER, *flags, HERE / "threads_driver.cpp", "-o", program], capture_output=True, text=True
    )
    if "mavx2" in built.stderr:
        pytest.skip("not an x86 compiler")
    assert built.returncode == 0, built.stderr
    return program


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_thread_that_fails_ends_the_task_of_all_and_the_next_one_runs(driver: Path, size: int) -> None:
    """Three thousand tasks in which up to two threads throw, before, between and behind the meetings."""
    result = subprocess.run([driver, str(size)], capture_output=True, text=True, timeout=120)
    assert (result.stdout, result.returncode) == ("done\n", 0)
