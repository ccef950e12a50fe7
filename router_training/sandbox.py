"""Runs generated Python programs in processes of their own and tells whether they pass their tests.

An instrument for what a small model writes, not a jail: run programs of unknown authors in a container or a virtual
machine. Whatever the program does, the kernel limits its CPU time, memory, open files and the size of each file, the
clock and the end of the program end its process group, and this process reads but the end of its error output. Where
the kernel grants it, there is no network. Except for root, there is no second process or thread.

An audit hook inside the process (`sandbox_runner`) refuses the rest, for root too: sockets, processes, threads, native
code, reading outside its folder and the standard library, and changing anything outside its folder. A program that
means to get around a hook in its own process can, and it sees which files exist.

A program has passed when the last of its tests has run: the runner then sends back a nonce that the program was not
given. Exits of any kind do not pass. An object that claims to equal everything does, and so does a program that
searches its callers' frames for the nonce.
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
WALL_SECONDS = 24 * CPU_SECONDS
"""Ends programs that wait. Far above CPU_SECONDS, so that what passes does not depend on what else the machine does."""

LIMITS = {
    "RLIMIT_CPU": CPU_SECONDS,
    "RLIMIT_AS": 512 * 2**20,
    "RLIMIT_FSIZE": 2**20,
    "RLIMIT_NOFILE": 32,
    "RLIMIT_NPROC": 0,
    "RLIMIT_CORE": 0,
}
"""By the names of the module `resource`: seconds of CPU time, bytes of memory, bytes of each file, open files."""

MAX_CHANGES = 64
"""Files opened for writing, folders made, things renamed and so on. Times the size of a file: what fills the disk."""

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
        task = {
            "program": program,
            "tests": list(tests),
            "limits": LIMITS,
            "max_changes": MAX_CHANGES,
            "nonce": nonce,
            "report": report.fileno(),
        }
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
