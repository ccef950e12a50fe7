"""Block pool: reference counts, prefix cache, eviction; the last test against a naive model of the same rules."""

import itertools
import random
from dataclasses import dataclass, field

import pytest

from server.engine.block_pool import SCRATCH_BLOCK, BlockPool, block_hash, root_hash


def chain(length: int, name: str = "a") -> list[bytes]:
    """Hashes of `length` successive blocks."""
    return [f"{name}{index}".encode() for index in range(length)]


def published(pool: BlockPool, hashes: list[bytes]) -> list[int]:
    """A held block table with that content."""
    table = pool.allocate(len(hashes))
    for block, content in zip(table, hashes, strict=True):
        pool.publish(block, content)
    return table


def test_the_scratch_block_is_never_allocated() -> None:
    pool = BlockPool(num_blocks=5, block_size=4)
    assert pool.num_free == pool.num_usable == 4
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert SCRATCH_BLOCK == 0


def test_usage_ratio_is_the_share_of_held_blocks() -> None:
    pool = BlockPool(num_blocks=5, block_size=4)
    table = published(pool, chain(3))
    assert pool.usage_ratio == 0.75
    pool.free(table)
    assert pool.usage_ratio == 0.0


def test_a_freed_chain_is_found_again_and_costs_only_what_nobody_holds() -> None:
    pool = BlockPool(num_blocks=6, block_size=4)
    table = published(pool, chain(3))
    assert pool.match(chain(3)) == table
    assert pool.num_free_among(table) == 0
    pool.free(table)
    assert pool.match(chain(4)) == table
    assert pool.num_free_among(table) == 3
    pool.acquire(table)
    assert pool.num_free == 2


def test_a_block_shared_by_two_tables_is_free_when_both_gave_it_back() -> None:
    pool = BlockPool(num_blocks=4, block_size=4)
    table = published(pool, chain(1))
    pool.acquire(table)
    pool.free(table)
    assert pool.num_free == 2
    pool.free(table)
    assert pool.num_free == 3


def test_blank_blocks_are_taken_before_cached_ones_are_evicted() -> None:
    pool = BlockPool(num_blocks=6, block_size=4)
    cached = published(pool, chain(3))
    pool.free(cached)
    taken = pool.allocate(2)
    assert not set(taken) & set(cached)
    assert pool.match(chain(3)) == cached


def test_eviction_takes_the_tail_of_a_chain_first() -> None:
    pool = BlockPool(num_blocks=4, block_size=4)
    table = published(pool, chain(3))
    pool.free(table)
    assert pool.allocate(1) == [table[2]]
    assert pool.match(chain(3)) == table[:2]
    assert pool.allocate(1) == [table[1]]
    assert pool.match(chain(3)) == table[:1]


def test_eviction_takes_the_chain_that_was_freed_longest_ago() -> None:
    pool = BlockPool(num_blocks=5, block_size=4)
    old, new = published(pool, chain(2, "old")), published(pool, chain(2, "new"))
    pool.free(old)
    pool.free(new)
    pool.acquire(old)  # used again: now it is the younger one
    pool.free(old)
    pool.allocate(2)
    assert pool.match(chain(2, "new")) == []
    assert pool.match(chain(2, "old")) == old


def test_the_head_of_two_chains_outlives_both_tails() -> None:
    pool = BlockPool(num_blocks=4, block_size=4)
    head = published(pool, chain(1, "head"))
    pool.acquire(head)
    first, second = [*head, *published(pool, chain(1, "x"))], [*head, *published(pool, chain(1, "y"))]
    pool.free(first)
    pool.free(second)
    pool.allocate(2)
    assert pool.match(chain(1, "head")) == head


def test_content_published_twice_stays_at_its_first_block() -> None:
    pool = BlockPool(num_blocks=4, block_size=4)
    first, twin = published(pool, chain(1)), published(pool, chain(1))
    assert pool.match(chain(1)) == first
    pool.free(twin)
    pool.free(first)
    assert pool.match(chain(1)) == first
    assert pool.num_free == 3


def test_freeing_twice_is_caught() -> None:
    pool = BlockPool(num_blocks=4, block_size=4)
    table = pool.allocate(1)
    pool.free(table)
    with pytest.raises(AssertionError, match="freed more often"):
        pool.free(table)


def test_hashes_differ_by_plan_salt_prefix_and_tokens() -> None:
    roots = [
        root_hash(fingerprint, salt)
        for fingerprint in (b"", b"a", b"a+", b"ab", b"+")
        for salt in (None, "", "a", "b", "+a", "-")
    ]
    assert len(set(roots)) == len(roots)
    blocks = [block_hash(root, tokens) for root in roots for tokens in ([1, 2], [2, 1], [1, 2 + 256], [0x0201])]
    assert len(set(blocks)) == len(blocks)
    assert block_hash(block_hash(roots[0], [1]), [2]) != block_hash(block_hash(roots[0], [2]), [1])


def test_equal_content_has_equal_hashes() -> None:
    assert block_hash(root_hash(b"plan", "salt"), [5, 6]) == block_hash(root_hash(b"plan", "salt"), (5, 6))


@dataclass
class NaivePool:
    """The rules, written down without any bookkeeping: whole histories and linear searches."""

    num_blocks: int
    holders: dict[int, int] = field(default_factory=dict)
    content: dict[int, bytes] = field(default_factory=dict)
    freed_at: dict[int, int] = field(default_factory=dict)
    clock: int = 0

    def free_blocks(self) -> list[int]:
        return [block for block in range(1, self.num_blocks) if self.holders.get(block, 0) == 0]

    def eviction_order(self) -> list[int]:
        cached = [block for block in self.free_blocks() if block in self.content]
        return sorted(cached, key=lambda block: self.freed_at[block])

    def match(self, hashes: list[bytes]) -> list[int]:
        block_of = {content: block for block, content in self.content.items()}
        return [block_of[content] for content in itertools.takewhile(block_of.__contains__, hashes)]

    def take(self, block: int) -> None:
        blank = [free for free in self.free_blocks() if free not in self.content]
        assert block in blank if blank else block == self.eviction_order()[0]
        self.content.pop(block, None)
        self.holders[block] = 1

    def free(self, table: list[int]) -> None:
        for block in reversed(table):
            self.holders[block] -= 1
            self.clock += 1
            self.freed_at[block] = self.clock


@pytest.mark.parametrize("seed", range(20))
def test_random_operations_agree_with_a_naive_pool(seed: int) -> None:
    rng = random.Random(seed)
    pool, naive = BlockPool(num_blocks=12, block_size=4), NaivePool(12)
    tables: list[list[int]] = []
    for _ in range(300):
        if tables and (rng.random() < 0.4 or pool.num_free < 3):
            table = tables.pop(rng.randrange(len(tables)))
            pool.free(table)
            naive.free(table)
        else:
            hashes = chain(rng.randint(1, 4), rng.choice("xyz"))
            hits = pool.match(hashes)
            by_content = {content: block for block, content in naive.content.items()}
            assert hits == [
                by_content[h] for i, h in enumerate(hashes) if all(g in by_content for g in hashes[: i + 1])
            ]
            missing = len(hashes) - len(hits)
            if missing > pool.num_free - pool.num_free_among(hits):
                continue
            pool.acquire(hits)
            for block in hits:
                naive.holders[block] = naive.holders.get(block, 0) + 1
            fresh = []
            for _ in range(missing):
                fresh += pool.allocate(1)
                naive.take(fresh[-1])
            for block, content in zip(fresh, hashes[len(hits) :], strict=True):
                pool.publish(block, content)
                if content not in naive.content.values():
                    naive.content[block] = content
            tables.append(hits + fresh)
        assert pool.num_free == len(naive.free_blocks())
        for name in "xyz":
            assert all((h in naive.content.values()) == bool(pool.match([h])) for h in chain(4, name))
    for table in tables:
        pool.free(table)
    assert pool.num_free == pool.num_usable


def test_a_block_under_other_gates_is_another_block() -> None:
    parent, tokens = root_hash(b"plan", None), [1, 2, 3, 4]
    hashes = [
        block_hash(parent, tokens),
        block_hash(parent, tokens, [(b"one", 4)]),
        block_hash(parent, tokens, [(b"one", 1), (b"plan", 3)]),
        block_hash(parent, tokens, [(b"one", 3), (b"plan", 1)]),
        block_hash(parent, tokens, [(b"two", 4)]),
    ]
    assert len(set(hashes)) == len(hashes)
    assert block_hash(parent, tokens, [(b"one", 4)]) == hashes[1]
