"""What every measured figure depends on besides the code: the machine and the versions of what computes."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from server import __version__
from server.control_groups import limits


def machine_facts() -> dict[str, Any]:
    """Cores and memory that this process may use, processor model, operating system."""
    total = memory_bytes()
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_model": _first_value(Path("/proc/cpuinfo"), "model name") or platform.processor() or "unknown",
        "memory_gib": round(total / 2**30, 1) if total else None,
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
    }


def memory_bytes() -> int | None:
    """Memory that this process may use: the machine's, or less in a container; None where the system does not say."""
    total = _first_value(Path("/proc/meminfo"), "MemTotal")
    sizes = (int(total.split()[0]) * 1024 if total else None, limits().memory_bytes)
    return min((size for size in sizes if size is not None), default=None)


def within_quota(num_threads: int) -> int:
    """So many threads, or as many as a container's share of the CPUs lets run at once: the system would stop the others
    while these wait for them."""
    cpus = limits().cpus
    return num_threads if cpus is None else max(1, min(num_threads, int(cpus)))


def has_bfloat16() -> bool:
    """Whether torch multiplies bfloat16 in hardware on this CPU, not value by value; true where torch cannot tell."""
    import torch

    # Builds without oneDNN, as for ARM, lack the operator too.
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return not has_onednn or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def version_facts() -> dict[str, str]:
    """Versions of what computes."""
    versions = {"lora_mixer": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _first_value(path: Path, key: str) -> str | None:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)
