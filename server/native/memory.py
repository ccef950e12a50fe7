"""Memory for the K/V cache: zeroed, in place once it is written to, on huge pages where the kernel gives them."""

import contextlib
import mmap

import torch
from torch import Tensor


def lazy_zeros(num_bytes: int) -> Tensor:
    """(num_bytes,) uint8 zeros that take memory as they are written to. Raises MemoryError.

    A page that is written to for the first time costs the thread that writes it a fault, some microseconds, and a
    decoding step of 32 requests makes a hundred of them with pages of 4 KiB. Pages of 2 MiB make that one in hundreds
    of steps, for at most 2 MiB a layer more than is in use.
    """
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no {num_bytes:,} bytes of memory: {error.strerror}") from error
    with contextlib.suppress(AttributeError, OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
