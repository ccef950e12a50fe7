"""A real `lora-mixer serve` in a process of its own: how long until it is ready, how much memory it holds."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.peers.environments import ROOT
from server.errors import LoraMixerError

START_TIMEOUT_S = 300.0
"""Longest wait for readiness; the first start converts the base model."""

POLL_S = 0.05


@dataclass(frozen=True)
class ServerProcess:
    """A server that is ready."""

    url: str
    pid: int
    ready_s: float
    """From the start of the process until /ready answered 200."""

    def memory_bytes(self, key: str = "VmRSS") -> int:
        """Resident memory now, or with `VmHWM` at its peak; Linux only."""
        lines = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def runtime_bytes() -> int:
    """Resident memory of a process that has imported what the server imports, and loaded nothing."""
    program = (
        "import server.app, server.assembly, transformers.models.llama.modeling_llama, pathlib;"
        "print(next(line.split()[1] for line in pathlib.Path('/proc/self/status').read_text().splitlines()"
        " if line.startswith('VmRSS:')))"
    )
    output = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    return int(output.stdout) * 1024


@asynccontextmanager
async def serving(
    arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> AsyncIterator[ServerProcess]:
    """Start `lora-mixer serve` on a free port, yield it once it is ready, end it with SIGTERM."""
    started_s = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "server", "serve", "--port", "0", "--log-level", "warning", *arguments),
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        url = await _announced(process)
        await _ready(url)
        yield ServerProcess(url, process.pid, time.perf_counter() - started_s)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _announced(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None, "it was made with a pipe"
    async with asyncio.timeout(START_TIMEOUT_S):
        async for line in process.stdout:
            if line.startswith(b"listening on "):
                return line.decode().split()[-1]
    raise LoraMixerError("the server ended before it listened; its reason is above")


async def _ready(url: str) -> None:
    async with asyncio.timeout(START_TIMEOUT_S), httpx.AsyncClient(base_url=url, trust_env=False) as client:
        while (await client.get("/ready")).status_code != httpx.codes.OK:
            await asyncio.sleep(POLL_S)
