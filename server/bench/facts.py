"""What a figure depends on besides code, machine and versions: configuration, and who else used the processors."""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

from server.config import ServerConfig

CLOCK_TICKS_PER_S = 100
"""Unit of /proc/stat; fixed by Linux' ABI on every architecture we run on."""


def config_digest(config: ServerConfig, adapter_digests: Iterable[str]) -> str:
    """First 16 hex digits of a sha256 over every setting and the adapters' content; paths on disk do not count."""
    content = [config.model_dump(mode="json", exclude={"root"}), sorted(adapter_digests)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class OtherLoad:
    """Cores that anyone but this process kept busy (stolen time included) since construction; Linux only."""

    def __init__(self) -> None:
        self._start = self._sample()

    def cores(self, *, also_own_s: float = 0.0) -> float | None:
        """Average number of cores, None where the system does not say. Below 0.1 the machine was idle otherwise.

        `also_own_s` are processor seconds of children of this process, which are not others either.
        """
        end = self._sample()
        if self._start is None or end is None or end[0] <= self._start[0]:
            return None
        wall_s, busy_s, own_s = (after - before for after, before in zip(end, self._start, strict=True))
        return round(max(0.0, busy_s - own_s - also_own_s) / wall_s, 2)

    def _sample(self) -> tuple[float, float, float] | None:
        try:
            fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields)
        own = os.times()
        busy_s = (user + nice + system + irq + softirq + steal) / CLOCK_TICKS_PER_S
        return time.monotonic(), busy_s, own.user + own.system
