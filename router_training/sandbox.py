"""Runs generated Python programs in a process of their own with limits on time, memory, files and the network.

Two fences: resource limits with an empty network namespace where the kernel grants one, and an audit hook inside the
process that refuses sockets, other processes, native code and files outside its folder. Good against what a small
model writes by accident; not a jail for an attacker.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

WALL_SECONDS = 10
CPU_SECONDS = 5
MEMORY_BYTES = 512 * 2**20
FILE_BYTES = 2**20
OPEN_FILES = 32

RUNNER = r"""
import ctypes, os, resource, sys
cpu, memory, file_bytes, open_files = map(int, sys.argv[1:5])
program = sys.stdin.read()
try:
    ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)  # CLONE_NEWUSER | CLONE_NEWNET, where the kernel grants it
except (OSError, AttributeError):
    pass
for limit, value in (
    (resource.RLIMIT_CPU, cpu), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, file_bytes),
    (resource.RLIMIT_NOFILE, open_files), (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(limit, (value, value))
folder = os.path.realpath(os.getcwd()) + os.sep
REFUSED = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill",
           "ctypes.", "pty.", "signal.", "os.chdir", "os.putenv", "resource.", "sys.addaudithook")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGING = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
            "os.chown", "os.utime", "shutil.")
def inside(path):
    return isinstance(path, (str, bytes)) and os.path.realpath(os.fsdecode(path)).startswith(folder)
def guard(event, arguments, inside=inside, refused=REFUSED, changing=CHANGING, writing=WRITING, fail=PermissionError):
    if event.startswith(refused):
        raise fail(f"the sandbox refuses {event}")
    if event == "open" and arguments[2] & writing and not inside(arguments[0]):
        raise fail("the sandbox writes only into its own folder")
    if event.startswith(changing) and not all(inside(path) for path in arguments if isinstance(path, (str, bytes))):
        raise fail("the sandbox changes only its own folder")
code = compile(program, "<program>", "exec")
sys.addaudithook(guard)
exec(code, {"__name__": "__main__"})
"""


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended."""

    passed: bool
    reason: str
    """Empty when it passed; else the last line of its error output, or which limit it ran into."""


def run_program(program: str, *, wall_s: float = WALL_SECONDS) -> ProgramResult:
    """Run `program`; it passes if it ends by itself without an error."""
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", RUNNER]
            + [str(limit) for limit in (CPU_SECONDS, MEMORY_BYTES, FILE_BYTES, OPEN_FILES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        try:
            _, errors = process.communicate(program.encode(), timeout=wall_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return ProgramResult(False, f"took longer than {wall_s} s")
    if process.returncode == 0:
        return ProgramResult(True, "")
    if process.returncode < 0:
        return ProgramResult(False, f"ended by signal {signal.Signals(-process.returncode).name}")
    lines = errors.decode(errors="replace").strip().splitlines()
    return ProgramResult(False, lines[-1] if lines else f"exit status {process.returncode}")


def passes_tests(program: str, tests: Sequence[str]) -> bool:
    """Whether a program's definitions satisfy every assertion of `tests`."""
    return run_program("\n".join([program, *tests])).passed
