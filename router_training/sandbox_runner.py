"""The inside of `sandbox`: a script that fences itself in, runs a program and reports that its last test has passed.

Standard input brings the task as JSON. Imports nothing of the project, whose packages its interpreter does not see.
"""

import contextlib
import ctypes
import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

REFUSED = (
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.kill",
    "ctypes.",
    "pty.",
    "signal.",
    "os.chdir",
    "os.putenv",
    "resource.",
    "sys.addaudithook",
)
"""Beginnings of audit events."""

CHANGING = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.utime",
    "shutil.",
)
"""Beginnings of audit events whose paths must be inside the folder."""

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def limit_resources(limits: dict[str, int]) -> None:
    """Set the limits, by their names in `resource`, and leave the network where the kernel grants it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)  # CLONE_NEWUSER | CLONE_NEWNET
    for name, value in limits.items():
        # SIGXCPU at the soft limit tells what happened; one second later, SIGKILL ends who ignores it.
        hard = value + 1 if name == "RLIMIT_CPU" else value
        resource.setrlimit(getattr(resource, name), (value, hard))


def guard_of(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that raises for what is refused."""

    def inside(path: object) -> bool:
        return isinstance(path, str | bytes) and os.path.realpath(os.fsdecode(path)).startswith(folder + os.sep)

    def guard(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(REFUSED):
            raise PermissionError(f"the sandbox refuses {event}")
        if event == "open" and arguments[2] & WRITING and not inside(arguments[0]):
            raise PermissionError("the sandbox writes only into its own folder")
        if event.startswith(CHANGING) and not all(inside(path) for path in arguments if isinstance(path, str | bytes)):
            raise PermissionError("the sandbox changes only its own folder")

    return guard


def main() -> None:
    """Run the task. Whatever ends the program early, an exit included, ends this process before it reports."""
    task = json.loads(sys.stdin.buffer.read())
    limit_resources(task["limits"])
    texts = {"<program>": task["program"]} | {f"<test {number}>": test for number, test in enumerate(task["tests"])}
    steps = [compile(text, name, "exec", dont_inherit=True) for name, text in texts.items()]
    module = type(sys)("__main__")
    sys.modules["__main__"], sys.argv[:] = module, ["<program>"]
    execute, write, leave = exec, os.write, os._exit  # the program may put others in their places
    sys.addaudithook(guard_of(os.path.realpath(os.getcwd())))
    for step in steps:
        execute(step, module.__dict__)
    write(task["report"], task["nonce"].encode())
    leave(0)


if __name__ == "__main__":
    main()
