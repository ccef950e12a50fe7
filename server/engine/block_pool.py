"""K/V cache blocks: who holds which, and which of them hold content that another sequence may reuse.

Knows ids, reference counts and content hashes; not the tensors behind the ids, and nothing about sequences.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

SCRATCH_BLOCK = 0
"""Never allocated: writes of padding tokens land there."""


def root_hash(fingerprint: bytes, cache_salt: str | None) -> bytes:
    """Parent hash of a sequence's first block: its effective gates and its salt, which never meet another's.

    The fingerprint's length is hashed first, so no (fingerprint, salt) pair spells the bytes of another; and no
    salt differs from an empty one.
    """
    salt = b"-" if cache_salt is None else b"+" + cache_salt.encode("utf-8", "surrogatepass")
    return hashlib.sha256(b"root" + len(fingerprint).to_bytes(8, "little") + fingerprint + salt).digest()


def block_hash(parent: bytes, token_ids: Sequence[int], gates: Sequence[tuple[bytes, int]] = ()) -> bytes:
    """Content hash of one full block, given that of the block before it (or `root_hash`).

    `gates`, (fingerprint, number of tokens) in order, where some of its tokens have other gates than the root says.
    """
    content = parent + array("q", token_ids).tobytes()
    for fingerprint, count in gates:
        content += b"gates" + count.to_bytes(8, "little") + len(fingerprint).to_bytes(8, "little") + fingerprint
    return hashlib.sha256(content).digest()


class BlockPool:
    """All blocks of the K/V cache, with reference counts and a prefix cache over full blocks.

    A block is *held* (count > 0), *cached* (count 0, content may be reused) or *blank* (count 0, no content).
    Free blocks are blank plus cached ones; allocation takes blank ones first, then evicts the cached block that was
    freed longest ago. Every operation is O(1) per block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """`num_blocks` includes the scratch block; `block_size` is in tokens."""
        assert num_blocks >= 2, "a pool needs the scratch block and another one"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._num_holders = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, SCRATCH_BLOCK, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # the next one to evict first

    @property
    def num_usable(self) -> int:
        """Blocks that sequences can hold: all but the scratch block."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could hand out now, cached ones included."""
        return len(self._blank) + len(self._cached)

    @property
    def usage_ratio(self) -> float:
        """Share of the usable blocks that sequences hold, 0 to 1."""
        return 1.0 - self.num_free / self.num_usable

    def num_missing(self, num_tokens: int, blocks: Sequence[int]) -> int:
        """How many blocks so many tokens need beside these."""
        return max(0, -(-num_tokens // self.block_size) - len(blocks))

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks with no content; the caller has checked `num_free`."""
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        return [self._take_one() for _ in range(count)]

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest cached prefix of a chain of hashes. Takes nothing: `acquire` them before allocating."""
        blocks: list[int] = []
        for content in hashes:
            block = self._block_of.get(content)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_among(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` nobody holds, i.e. by how much `acquire` would lower `num_free`."""
        return sum(self._num_holders[block] == 0 for block in blocks)

    def acquire(self, blocks: Iterable[int]) -> None:
        """Hold matched blocks, once more each."""
        for block in blocks:
            if self._num_holders[block] == 0:
                del self._cached[block]
            self._num_holders[block] += 1

    def publish(self, block: int, content: bytes) -> None:
        """Offer a held, fully computed block under its content hash. A block already known under it stays the one."""
        assert self._num_holders[block] > 0, "only a held block can be published"
        if content not in self._block_of:
            assert self._hash_of[block] is None, "a block is published under one content"
            self._block_of[content] = block
            self._hash_of[block] = content

    def free(self, block_table: Sequence[int]) -> None:
        """Give back one hold on every block of a table, tail first: the end of a chain is evicted before its start."""
        for block in reversed(block_table):
            assert self._num_holders[block] > 0, f"block {block} freed more often than it was taken"
            self._num_holders[block] -= 1
            if self._num_holders[block] > 0:
                continue
            if self._hash_of[block] is None:
                self._blank.append(block)
            else:
                self._cached[block] = None

    def _take_one(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            content = self._hash_of[block]
            assert content is not None, "a cached block has content"
            del self._block_of[content]
            self._hash_of[block] = None
        self._num_holders[block] = 1
        return block
