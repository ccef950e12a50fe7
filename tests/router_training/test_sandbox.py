"""Generated programs: what passes, what fails, and what they must not be able to do."""

import os
import socket
import time
from pathlib import Path

import pytest

from router_training.sandbox import passes_tests, run_program


def test_a_correct_program_passes_its_tests_and_a_wrong_one_fails() -> None:
    tests = ["assert double(4) == 8", "assert double(0) == 0"]
    assert passes_tests("import math\ndef double(x):\n    return 2 * x", tests)
    assert not passes_tests("def double(x):\n    return x + 4", tests)
    assert not passes_tests("def double(x:", tests)


def test_the_reason_of_a_failure_is_its_last_line() -> None:
    assert run_program("assert 1 == 2, 'no'").reason == "AssertionError: no"
    assert run_program("pass").reason == ""


def test_an_endless_program_is_stopped_with_its_children() -> None:
    started = time.monotonic()
    result = run_program("while True: pass", wall_s=1.5)
    assert not result.passed
    assert "longer than" in result.reason
    assert time.monotonic() - started < 15


def test_memory_is_limited() -> None:
    result = run_program("x = bytearray(2 * 2**30)")
    assert result.reason == "MemoryError"


def test_files_are_limited_in_size_and_place(tmp_path: Path) -> None:
    outside = tmp_path / "mine"
    for attack in (
        f"open({str(outside)!r}, 'w')",
        f"import os; os.open({str(outside)!r}, os.O_CREAT | os.O_WRONLY)",
        f"import os; os.mkdir({str(outside)!r})",
        f"import os; os.symlink({str(tmp_path)!r}, 'link'); open('link/mine', 'w')",
    ):
        result = run_program(attack)
        assert "the sandbox" in result.reason, attack
    assert not outside.exists()
    assert run_program("open('own', 'w').write('x')").passed
    assert not run_program("open('own', 'wb').write(bytes(2**22))").passed


def test_other_files_can_be_neither_removed_nor_renamed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("kept", encoding="utf-8")
    for attack in (f"os.remove({str(victim)!r})", f"os.rename({str(victim)!r}, 'stolen')"):
        assert "the sandbox" in run_program(f"import os; {attack}").reason
    assert victim.read_text(encoding="utf-8") == "kept"


@pytest.mark.parametrize(
    "attack",
    [
        "import os; os.system('true')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.fork()",
        "import os; os.kill(os.getppid(), 15)",
        "import ctypes; ctypes.CDLL(None)",
    ],
)
def test_no_other_process_and_no_native_code(attack: str) -> None:
    assert "the sandbox refuses" in run_program(attack).reason


def test_there_is_no_network_not_even_this_machines() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = run_program(f"import socket; socket.create_connection(('127.0.0.1', {port}))")
    assert not result.passed
    assert "the sandbox refuses socket" in result.reason


def test_the_environment_of_this_process_stays_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    assert "SECRET_TOKEN" in os.environ
    assert run_program("import os; assert 'SECRET_TOKEN' not in os.environ").passed
