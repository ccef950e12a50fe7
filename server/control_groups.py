"""What this process may use of its machine where that is limited, as in containers: Linux' control groups, 1 and 2.

Knows files and numbers only.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple


class Limits(NamedTuple):
    """None: not limited."""

    cpus: float | None
    """CPUs' worth of time (`docker run --cpus`)."""
    memory_bytes: int | None


def limits(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> Limits:
    """The tightest of the groups that this process is in and of those above them, as far as they can be seen."""
    quotas: list[float] = []
    sizes: list[int] = []
    for folder in _folders(_read(groups), mount):
        old = f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
        for pair in (_read(folder / "cpu.max").split(), old.split()):
            if len(pair) == 2 and all(map(str.isdecimal, pair)):  # "max" and -1 say that there is none
                quotas.append(int(pair[0]) / int(pair[1]))
        names = ("memory.max", "memory.limit_in_bytes")
        sizes += [int(text) for name in names if (text := _read(folder / name)).isdecimal()]
    return Limits(min(quotas, default=None), min(sizes, default=None))


def _folders(groups: str, mount: Path) -> Iterator[Path]:
    """Where files of these groups may be; in a container its own group often is the root."""
    for line in groups.splitlines():
        _, controllers, place = line.split(":", 2)
        group = PurePosixPath(place.lstrip("/"))
        for root in controllers.split(",") if controllers else (".", "unified"):
            yield from (mount / root / part for part in (group, *group.parents))


def _read(path: Path) -> str:
    """Empty where there is no such file."""
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
