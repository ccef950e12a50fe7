"""Runs generated Python programs in a process of their own with limits on time, memory, files and the network.

Two fences: resource limits with an empty network namespace where the kernel grants one, and an audit hook inside the
process that refuses sockets, other processes, native code and files outside its folder. Good against what a small
model writes by accident; not a jail for an attacker.

A program has passed when the last of its tests has run: `sandbox_runner` then sends back a nonce that the program was
not given. Exits of any kind do not pass. What can pass without being right is an object that claims to equal
everything, and a program that searches the frames of its callers for the nonce.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

CPU_SECONDS = 5
WALL_SECONDS = 12 * CPU_SECONDS
"""Ends programs that wait. Far above CPU_SECONDS, so that what passes does not depend on what else the machine does."""

LIMITS = {
    "RLIMIT_CPU": CPU_SECONDS,
    "RLIMIT_AS": 512 * 2**20,
    "RLIMIT_FSIZE": 2**20,
    "RLIMIT_NOFILE": 32,
    "RLIMIT_CORE": 0,
}
"""By the names of the module `resource`: seconds of CPU time, bytes of memory, bytes of each file, open files."""

ERROR_BYTES = 1024
"""As much of the end of a program's error output is read; the rest stays in a file, as long as files may be."""

RUNNER = Path(__file__).with_name("sandbox_runner.py")


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended."""

    passed: bool
    reason: str
    """Empty when it passed; else the last line of its error output, or which limit it ran into."""


def run_program(program: str, tests: Sequence[str] = (), *, wall_s: float = WALL_SECONDS) -> ProgramResult:
    """Run `program`, then each of `tests`; it passes if it gets to the end of the last one without an error."""
    nonce = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(prefix="sandbox-") as folder,
        # Files without names, since pipes can fill up or be kept open by a process that outlives the program.
        tempfile.TemporaryFile() as report,
        tempfile.TemporaryFile() as errors,
    ):
        task = {"nonce": nonce, "report": report.fileno(), "limits": LIMITS, "program": program, "tests": list(tests)}
        with subprocess.Popen(
            # No paths but the standard library's, and no .pyc files. Not -I: it would ignore PYTHONHASHSEED.
            [sys.executable, "-s", "-S", "-P", "-B", RUNNER],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=(report.fileno(),),
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "PYTHONHASHSEED": "0"},
            start_new_session=True,
        ) as process:
            try:
                process.communicate(json.dumps(task).encode(), timeout=wall_s)
            except subprocess.TimeoutExpired:
                return ProgramResult(False, f"took longer than {wall_s} s")
            finally:
                with contextlib.suppress(ProcessLookupError):  # nobody is left of its group
                    os.killpg(process.pid, signal.SIGKILL)
        report.seek(0)
        if report.read(len(nonce) + 1) == nonce.encode():
            return ProgramResult(True, "")
        if process.returncode == -signal.SIGXCPU:
            return ProgramResult(False, f"took longer than {LIMITS['RLIMIT_CPU']} s of CPU time")
        if process.returncode < 0:
            return ProgramResult(False, f"ended by signal {-process.returncode}")
        return ProgramResult(False, _last_line(errors) or f"exit status {process.returncode} before its last test")


def passes_tests(program: str, tests: Sequence[str]) -> bool:
    """Whether a program's definitions satisfy every assertion of `tests`."""
    return run_program(program, tests).passed


def _last_line(errors: IO[bytes]) -> str:
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - ERROR_BYTES))
    lines = errors.read(ERROR_BYTES).decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
