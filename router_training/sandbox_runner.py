"""The inside of `sandbox`: a script that fences itself in, runs a program and reports that its last test has passed.

Standard input brings the task as JSON. Imports nothing of the project, whose packages its interpreter does not see.
"""

import contextlib
import ctypes
import json
import os
import resource
import sys
from collections.abc import Callable, Iterable
from itertools import count
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
    "os.link",
    "os.symlink",
    "os.setxattr",
    "os.removexattr",
    "os.chdir",
    "os.putenv",
    "ctypes.",
    "gc.",
    "pty.",
    "signal.",
    "resource.",
    "sys.addaudithook",
)
"""Beginnings of audit events. Links among them: a path that leads out could be put together from several."""

CHANGING = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.utime",
)
"""Beginnings of audit events whose paths must be inside the folder. `shutil` comes down to these and `open`."""

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

UNIMPORTABLE = (
    *("_ctypes", "_interpreters", "_multiprocessing", "_posixshmem", "_posixsubprocess", "_testcapi"),
    *("_testinternalcapi", "_tkinter", "_xxsubinterpreters", "ctypes", "resource"),
    *("_dbm", "_gdbm", "_sqlite3", "grp", "pwd", "readline", "spwd"),
)
"""Modules that start processes, run native code or other interpreters, or read and write files, all without events."""

UNSEEN = {
    "posix": ("chroot", "mkfifo", "mknod", "pidfd_open", "setns", "unshare"),
    "_thread": ("start_joinable_thread", "start_new", "start_new_thread"),
}
"""Functions without events, by module. Threads are refused as RLIMIT_NPROC does it to everybody but root."""


def limit_resources(limits: dict[str, int]) -> None:
    """Set the limits, by their names in `resource`, and leave the network where the kernel grants it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)  # CLONE_NEWUSER | CLONE_NEWNET
    for name, value in limits.items():
        # SIGXCPU at the soft limit tells what happened; one second later, SIGKILL ends who ignores it.
        hard = value + 1 if name == "RLIMIT_CPU" else value
        resource.setrlimit(getattr(resource, name), (value, hard))


def guard_of(folder: str, max_changes: int) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that raises for what is refused, and for more than `max_changes` changes to files."""
    library = [os.path.realpath(path) for path in sys.path]
    changes = count()

    def within(path: Any, *roots: str) -> bool:
        place = os.path.realpath(os.fsdecode(path)) + os.sep
        return any(place.startswith(root + os.sep) for root in roots)

    def change(paths: Iterable[Any]) -> None:
        if not all(within(path, folder) for path in paths):
            raise PermissionError("the sandbox changes only its own folder")
        if next(changes) >= max_changes:
            raise PermissionError(f"the sandbox changes files {max_changes} times at most")

    def read(path: Any, *roots: str) -> None:
        if not within(path, folder, *roots):
            raise PermissionError("the sandbox reads only its own folder and the standard library")

    def guard(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(REFUSED):
            raise PermissionError(f"the sandbox refuses {event}")
        if event == "import":
            name, native = arguments[:2]
            if name.partition(".")[0] in UNIMPORTABLE or (native and not within(native, *library)):
                raise ImportError(f"the sandbox refuses to import {name}")
        elif event == "open":
            path, mode, flags = arguments
            if isinstance(path, int) or within(path, os.devnull):
                return
            if flags & WRITING:
                change([path])
            # Of os.open, and then of a folder: with one elsewhere, `dir_fd` would take paths out unseen.
            elif mode is None and os.path.isdir(path):
                read(path)
            else:
                read(path, *library)
        elif event in ("os.listdir", "os.scandir"):
            if not isinstance(arguments[0], int | None):
                read(arguments[0], *library)
        elif event.startswith(CHANGING):
            change(path for path in arguments if isinstance(path, str | bytes))

    return guard


def refuse_what_has_no_event() -> None:
    """Close the ways that an audit hook does not see."""
    for name in UNIMPORTABLE:
        sys.modules[name] = None  # type: ignore[assignment]  # importlib raises ImportError for it

    def refused(*_: object, **__: object) -> None:
        raise PermissionError("the sandbox refuses this function")

    for module, names in UNSEEN.items():
        for name in names:
            for owner in (sys.modules[module], os):
                if hasattr(owner, name):
                    setattr(owner, name, refused)


def main() -> None:
    """Run the task. Whatever ends the program early, an exit included, ends this process before it reports."""
    task = json.loads(sys.stdin.buffer.read())
    limit_resources(task["limits"])
    texts = {"<program>": task["program"]} | {f"<test {number}>": test for number, test in enumerate(task["tests"])}
    steps = [compile(text, name, "exec", dont_inherit=True) for name, text in texts.items()]
    # Imported, not run: what a program does as a script, such as to exit, is no business of its tests.
    module = type(sys)("program")
    sys.modules["program"] = sys.modules["__main__"] = module
    sys.argv[:] = ["<program>"]
    execute, write, leave = exec, os.write, os._exit  # the program may put others in their places
    refuse_what_has_no_event()
    sys.addaudithook(guard_of(os.path.realpath(os.getcwd()), task["max_changes"]))
    for step in steps:
        execute(step, module.__dict__)
    write(task["report"], task["nonce"].encode())
    leave(0)


if __name__ == "__main__":
    main()
