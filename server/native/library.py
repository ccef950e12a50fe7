"""Finds the compiled step that this CPU can run, and speaks its C interface. Knows structs, no models.

The package is built with one library per instruction set (`pyproject.toml`, ext-modules); a build without a C++
compiler has none, and the server then runs on torch alone.
"""

import ctypes
import logging
import os
import struct
import sysconfig
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

INTERFACE_VERSION = 4
"""What `lm_interface_version` of a matching build returns."""

NUM_PROJECTIONS = 7
"""q, k, v, o, gate, up, down: the order of the C interface."""

AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
AVX512_BF16 = AVX512 | {"avx512_bf16", "avx512_vnni"}

VARIANTS = (
    ("_llama_amx", AVX512_BF16 | {"amx_tile", "amx_bf16"}),
    ("_llama_avx512_bf16", AVX512_BF16),
    ("_llama_avx512", AVX512),
    ("_llama_avx2", {"avx2", "fma"}),
)
"""Libraries, best first, with the CPU features each needs, named as in /proc/cpuinfo."""


class Shape(Structure):
    """`lm::Shape`."""

    _fields_ = [
        *((name, c_int32) for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "vocab")),
        *((name, c_int32) for name in ("block_size", "max_positions", "is_tied", "is_int8")),
        ("norm_eps", c_float),
        ("attention_scale", c_float),
    ]


class Router(Structure):
    """`lm::Router`."""

    _fields_ = [
        ("is_per_layer", c_int32),
        ("num_gates", c_int32),
        ("temperature", c_float),
        ("num_slots", c_int32),
        ("rows", c_void_p),
        ("biases", c_void_p),
        ("layer_gates", c_void_p),
        ("gate_index", c_void_p),
        ("shortlist", c_void_p),
    ]


class Plan(Structure):
    """`lm::Plan`."""

    _fields_ = [
        ("router", c_int32),
        ("top_k", c_int32),
        ("num_slots", c_int32),
        ("slots", c_void_p),
        ("weights", c_void_p),
    ]


class Step(Structure):
    """`lm::Step`."""

    _fields_ = [
        *((name, c_int32) for name in ("num_tokens", "num_sequences", "num_plans", "num_routers", "num_slots")),
        *((name, c_int32) for name in ("num_logits", "num_checks", "max_blocks")),
        *((name, c_void_p) for name in ("token_ids", "positions", "plan_of_token", "first_token", "block_tables")),
        *((name, c_void_p) for name in ("logit_positions", "plans", "routers", "adapters", "slot_order", "logits")),
        *((name, c_void_p) for name in ("greatest", "greatest_id", "check_positions", "finite", "share", "inputs")),
    ]


@cache
def libraries() -> tuple[ctypes.CDLL, ...]:
    """Every built library that this CPU can run, best first; empty where none was built or none fits."""
    features = cpu_features()
    folder = Path(__file__).parent
    found = []
    for name, needed in VARIANTS:
        path = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
        if needed <= features and path.is_file():
            try:
                if not _is_whole(path):
                    raise OSError("it is cut off")
                library = ctypes.CDLL(str(path))
            except OSError as error:
                logger.warning("%s cannot be loaded (%s); delete it and install the project anew", path, error)
                continue
            # A stale build is left alone: its structs would be misread.
            if library.lm_interface_version() == INTERFACE_VERSION and library.lm_is_usable():
                found.append(_declare(library))
    return tuple(found)


def _is_whole(path: Path) -> bool:
    """Whether an ELF file has its last part, the table of its sections: loading one that was cut off, or that a full
    disk has filled with zeros, ends the process. Raises OSError."""
    with path.open("rb") as file:
        head = file.read(64)
        if head[:5] != b"\x7fELF\x02" or len(head) < 64:
            return False
        (start,) = struct.unpack_from("<Q", head, 0x28)
        size, count = struct.unpack_from("<HH", head, 0x3A)
        file.seek(start)
        table = file.read(size * count)
    return len(table) == size * count and any(table)


def num_cores() -> int:
    """Cores this process may use; hyperthreads of one core count once, since a step saturates each."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    try:
        return len({Path(siblings.format(cpu)).read_text(encoding="ascii") for cpu in cpus})
    except OSError:
        return len(cpus)


def cpu_features() -> frozenset[str]:
    """What this CPU and kernel offer, named as in /proc/cpuinfo; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    engine = c_void_p
    signatures: dict[str, tuple[type | None, list[type]]] = {
        "lm_interface_version": (c_int32, []),
        "lm_is_usable": (c_int32, []),
        "lm_engine_new": (c_char_p, [POINTER(Shape), c_int32, c_int32, POINTER(c_void_p)]),
        "lm_engine_free": (None, [engine]),
        "lm_set_linear": (c_char_p, [engine, c_int32, c_int32, c_void_p, c_void_p, c_void_p]),
        "lm_set_norm": (c_char_p, [engine, c_int32, c_int32, c_void_p]),
        "lm_set_head": (c_char_p, [engine, c_void_p, c_void_p, c_void_p]),
        "lm_set_rotary": (c_char_p, [engine, c_void_p, c_void_p]),
        "lm_set_cache": (c_char_p, [engine, c_void_p, c_int64]),
        "lm_adapter_new": (c_char_p, [engine, c_void_p, c_void_p, c_void_p, POINTER(c_void_p)]),
        "lm_adapter_bytes": (c_int64, [engine, c_void_p]),
        "lm_adapter_free": (None, [engine, c_void_p]),
        "lm_shortlist_new": (c_char_p, [engine, POINTER(Router), c_void_p, c_int32, POINTER(c_void_p)]),
        "lm_shortlist_free": (None, [engine, c_void_p]),
        "lm_run": (c_char_p, [engine, POINTER(Step)]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
