"""Generated programs: what passes, what fails, and what they must not be able to do."""

import fcntl
import os
import resource
import socket
import time
from pathlib import Path

import pytest

from router_training import sandbox
from router_training.sandbox import ERROR_BYTES, MAX_CHANGES, passes_tests, run_program


def test_a_correct_program_passes_its_tests_and_a_wrong_one_fails() -> None:
    tests = ["assert double(4) == 8", "assert double(0) == 0"]
    assert passes_tests("import math\ndef double(x):\n    return 2 * x", tests)
    assert not passes_tests("def double(x):\n    return x + 4", tests)
    assert not passes_tests("def double(x:", tests)


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit()",
        "raise SystemExit",
        "import os; os._exit(0)",
        "import sys\ndef double(x):\n    sys.exit(0)",
        "import atexit, os; atexit.register(os._exit, 0)\ndef double(x): return x",
        "import os, sys; sys.excepthook = lambda *_: os._exit(0)",
        "import builtins\nfor name in 'exec', 'compile': setattr(builtins, name, lambda *_, **__: None)",
        "import os\nfor fd in range(3, 32):\n    try: os.write(fd, b'0' * 32)\n    except OSError: pass",
        "def double(x): return 8\nraise SystemExit",
        "'''",
        "\0",
        "'\ud800'",
    ],
)
def test_a_program_that_does_not_reach_its_last_test_has_not_passed(program: str) -> None:
    assert not passes_tests(program, ["assert double(4) == 8", "assert double(0) == 0"])


def test_how_a_program_ends_behind_its_last_test_does_not_matter() -> None:
    program = (
        "import atexit, os, sys\natexit.register(os._exit, 1)\nif len(sys.argv) > 1: sys.exit()\ndef one(): return 1"
    )
    assert passes_tests(program, ["assert one() == 1"])


def test_a_program_is_a_module_and_not_run_as_a_script() -> None:
    program = "import sys\ndef one(): return 1\nif __name__ == '__main__': sys.exit(one())"
    assert passes_tests(program, ["assert one() == 1"])


def test_a_program_is_given_nothing_but_its_own_module() -> None:
    program = """
import os, sys, __main__
assert sys.argv == ["<program>"] and sys.stdin.read() == ""
assert set(os.environ) <= {"HOME", "TMPDIR", "PYTHONHASHSEED", "LC_CTYPE"}
assert vars(__main__) is globals() and {name for name in globals() if "_" not in name} == {"os", "sys"}
"""
    assert run_program(program).reason == ""


def test_the_reason_of_a_failure_is_its_last_line() -> None:
    assert run_program("assert 1 == 2, 'no'").reason == "AssertionError: no"
    assert run_program("pass").reason == ""


def test_an_endless_program_is_stopped_by_its_own_cpu_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "LIMITS", sandbox.LIMITS | {"RLIMIT_CPU": 1})
    assert run_program("while True: pass").reason == "took longer than 1 s of CPU time"
    stubborn = "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert run_program(stubborn).reason == "ended by signal 9"


def test_a_program_that_waits_is_stopped_by_the_clock() -> None:
    assert run_program("import time; time.sleep(60)", wall_s=1).reason == "took longer than 1 s"


def test_the_order_of_a_set_is_the_same_in_every_run() -> None:
    program = "import sys; sys.exit(' '.join({'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'}))"
    assert len({run_program(program).reason for _ in range(3)}) == 1


@pytest.mark.parametrize("ending", ["pass", "time.sleep(60)"])
def test_processes_that_a_program_leaves_behind_hold_nobody_up(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runner without fences stands for a program that got through them; its child keeps all files open."""
    runner, lock = tmp_path / "runner.py", tmp_path / "lock"
    runner.write_text(
        f"import fcntl, os, time\nfcntl.flock(os.open({str(lock)!r}, os.O_CREAT), fcntl.LOCK_EX)\n"
        f"if os.fork(): {ending}\nelse: time.sleep(60)\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(sandbox, "RUNNER", runner)
    started = time.monotonic()
    assert not run_program("", wall_s=2).passed
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # waits until the child is gone
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("stream", [1, 2])
def test_endless_output_is_neither_kept_here_nor_waited_for(stream: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, the highest so far
    result = run_program(f"import os\nfor _ in range(1000): os.write({stream}, b'x' * 2**20)\nassert False")
    assert not result.passed
    assert len(result.reason) <= ERROR_BYTES
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


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


def test_other_files_can_be_neither_read_nor_listed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret", encoding="utf-8")
    for attack in (
        f"open({str(secret)!r})",
        f"os.open({str(secret)!r}, os.O_RDONLY)",
        f"os.listdir({str(tmp_path)!r})",
        f"list(os.scandir({str(tmp_path)!r}))",
        "open('/proc/self/mem', 'rb')",
        "os.listdir('..')",
    ):
        assert "the sandbox reads only" in run_program(f"import os; {attack}").reason, attack
    assert run_program("import os; assert os.listdir() == os.listdir('.') == []; open(os.devnull, 'w').close()").passed


def test_no_folder_elsewhere_is_opened_and_names_relative_to_one_stay_inside(tmp_path: Path) -> None:
    for folder in (str(tmp_path), "..", "/", os.path.dirname(os.__file__)):
        assert "the sandbox reads only" in run_program(f"import os; os.open({folder!r}, os.O_RDONLY)").reason, folder
    inside = "import os; os.mkdir('a'); a = os.open('a', os.O_RDONLY)"
    for attack in ("os.mkdir('../../mine', dir_fd=a)", "os.open('../../mine', os.O_CREAT | os.O_WRONLY, dir_fd=a)"):
        assert "the sandbox changes only" in run_program(f"{inside}; {attack}").reason, attack
    assert run_program(f"{inside}; os.mkdir('b', dir_fd=a); import shutil; shutil.rmtree('a')").passed


def test_pipes_with_names_are_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    for function in ("os.mkfifo", "os.mknod"):
        assert "the sandbox refuses" in run_program(f"import os; {function}({str(pipe)!r})").reason
    assert not pipe.exists()


def test_many_small_files_do_not_fill_the_disk() -> None:
    program = "for number in range(1000):\n    with open(str(number), 'w') as file: file.write('x')"
    assert run_program(program).reason.endswith(f"the sandbox changes files {MAX_CHANGES} times at most")
    assert run_program(program.replace("1000", str(MAX_CHANGES))).passed


def test_what_honest_programs_import_still_imports() -> None:
    modules = (
        "abc, array, ast, bisect, calendar, cmath, collections.abc, copy, csv, dataclasses, datetime, decimal,"
        "enum, fractions, functools, glob, hashlib, heapq, inspect, io, itertools, json, logging, math, operator,"
        "os, pathlib, queue, random, re, shutil, statistics, string, struct, sys, tempfile, textwrap, threading,"
        "time, timeit, types, typing, unicodedata, unittest, uuid, zlib"
    )
    program = (
        f"import {modules}\n"
        + """
@dataclasses.dataclass
class Point:
    x: "int" = 1

Pair = collections.namedtuple("Pair", "a b", defaults=(1, 2))
with tempfile.NamedTemporaryFile("w+") as file, tempfile.TemporaryDirectory() as folder:
    pathlib.Path(folder, "a").write_text("a")
assert Point().x == Pair().a == copy.deepcopy(Pair()).a == 1
assert datetime.date(2024, 1, 1).strftime("%d") == "01" and random.Random(0).random() < 1
"""
    )
    assert run_program(program).reason == ""


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
        "import sys; sys.modules.pop('_ctypes'); import _ctypes",
        "import os; open('_mine.so', 'w'); import importlib.machinery as m\n"
        "loader = m.ExtensionFileLoader('mine', os.path.abspath('_mine.so'))\n"
        "loader.create_module(m.ModuleSpec('mine', loader, origin=loader.path))",
        "import _posixsubprocess",
        "import multiprocessing.util as u; u.spawnv_passfds(b'/bin/true', [b'true'], [])",
        "import threading; threading.Thread(target=print).start()",
        "import gc; gc.get_objects()",
    ],
)
def test_no_other_process_and_no_native_code(attack: str) -> None:
    assert "the sandbox refuses" in run_program(attack).reason


def test_modules_that_would_start_processes_are_refused_to_importlib_too() -> None:
    assert "_posixsubprocess" in run_program("import importlib; importlib.import_module('_posixsubprocess')").reason


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
