"""What the Hub states about a file's content, and whether bytes here are that content. Knows no network."""

import hashlib
from dataclasses import dataclass
from typing import BinaryIO

PIECE_BYTES = 1024**2
"""Read at a time."""


class WrongContentError(OSError):
    """The bytes are not those that the Hub, or the lock, states."""


@dataclass(frozen=True)
class StatedContent:
    """A file as it must be."""

    size_bytes: int
    sha256: str | None
    """In hex; None where neither the Hub nor a lock states it."""
    sha1: str | None = None
    """In hex, of git's header and the content, as the Hub states it of files outside LFS, or of the content alone, as
    some mirrors do; None where there is neither. Enough against proxies and mirrors that mix files up."""

    def sha256_of(self, file: BinaryIO) -> str:
        """sha256 of an open file that has this content. Raises WrongContentError."""
        sha256 = hashlib.sha256()
        sha1s = [hashlib.sha1(head, usedforsecurity=False) for head in (b"blob %d\0" % self.size_bytes, b"")]
        size_bytes = file.seek(0)
        while piece := file.read(PIECE_BYTES):
            size_bytes += len(piece)
            sha256.update(piece)
            for sha1 in sha1s if self.sha1 is not None else ():
                sha1.update(piece)
        if size_bytes != self.size_bytes:
            raise WrongContentError("has the wrong length")
        if self.sha256 not in (None, sha256.hexdigest()):
            raise WrongContentError("does not have the expected sha256")
        if self.sha1 not in (None, *(sha1.hexdigest() for sha1 in sha1s)):
            raise WrongContentError("does not have the sha1 that the Hub states")
        return sha256.hexdigest()
