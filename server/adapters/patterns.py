"""Regular expressions from adapter configs, matched in bounded time. Knows nothing about adapters.

PEFT hands `target_modules`, `exclude_modules`, `rank_pattern` and `alpha_pattern` to Python's `re`, which backtracks: a
pattern like `(a+)+$` on one module name stops a server for hours, and no thread can interrupt it. This matcher reads
the same syntax (parsed by `pattern_syntax`) but follows all paths at once, as sets of positions, so its work is at most
nodes x length^2; a budget of steps bounds what is left.
"""

import re

from server.adapters.pattern_syntax import (
    MAX_PATTERN_CHARACTERS,
    Alternatives,
    Assertion,
    CharacterClass,
    Group,
    Literal,
    Lookahead,
    Node,
    Repeat,
    is_word,
    parse,
)

STEPS_PER_NAME = 10_000
"""Steps that all patterns of one adapter may take per module name, about 6 ms; the costliest public ones take 800."""

STEPS_PER_ADAPTER = 1_500_000
"""Steps that they may take over all names, 1 to 1.5 s: from 150 names on, this is the limit that counts."""


_PLAIN = re.compile(rf"[A-Za-z0-9_.-]{{0,{MAX_PATTERN_CHARACTERS}}}")


class PatternBudgetError(ValueError):
    """Matching takes more steps than the budget allows."""


class Budget:
    """Steps left for the patterns of one adapter."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def spend(self, steps: int = 1) -> None:
        """Raises PatternBudgetError when nothing is left."""
        self.steps -= steps
        if self.steps < 0:
            raise PatternBudgetError("its patterns take too many steps to match")


def is_plain(text: str) -> bool:
    """Whether nothing in a pattern is special but dots: such a one has one length, and can be looked up."""
    return _PLAIN.fullmatch(text) is not None


class Pattern:
    """One compiled pattern. Raises `pattern_syntax.PatternSyntaxError` when it is malformed or not supported."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.is_plain = is_plain(text)
        self._root = None if self.is_plain else parse(text)

    def fullmatch(self, name: str, budget: Budget) -> bool:
        """Whether `re.fullmatch(pattern, name)` would match."""
        return bool(_Run(name, budget).ends(self._tree(), 0) >> len(name))

    def matches_suffix(self, name: str, budget: Budget) -> bool:
        r"""Whether `re.match(rf"(.*\.)?({pattern})$", name)` would match, PEFT's rule for rank and alpha patterns."""
        run = _Run(name, budget)
        starts = [0, *(index + 1 for index, character in enumerate(name) if character == ".")]
        return any(run.ends(self._tree(), start) >> len(name) for start in starts)

    def _tree(self) -> Node:
        """Plain patterns are parsed when somebody matches them: most of them are only looked up."""
        if self._root is None:
            self._root = parse(self.text)
        return self._root


def suffixes(name: str) -> list[str]:
    """The path and all of its tails at dots: `a.b.c`, `b.c`, `c`."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


class _Run:
    """One name being matched. Sets of positions are the bits of an integer: bit i stands for position i."""

    def __init__(self, name: str, budget: Budget) -> None:
        self._name = name
        self._budget = budget
        self._memo: dict[tuple[int, int], int] = {}

    def ends(self, node: Node, start: int) -> int:
        """Every position where a match of `node` that begins at `start` can end."""
        key = (id(node), start)
        if (known := self._memo.get(key)) is None:
            self._budget.spend()
            known = self._memo[key] = self._compute(node, start)
        return known

    def _compute(self, node: Node, start: int) -> int:
        match node:
            case Literal(text):
                return 1 << start + len(text) if self._name.startswith(text, start) else 0
            case CharacterClass():
                self._budget.spend(len(node.ranges))  # it compares with each
                inside = start < len(self._name) and node.matches(self._name[start])
                return 1 << start + 1 if inside else 0
            case Assertion(kind):
                return 1 << start if self._holds(kind, start) else 0
            case Lookahead(child, wanted):
                return 1 << start if bool(self.ends(child, start)) is wanted else 0
            case Alternatives(children):
                ends = 0
                for child in children:
                    ends |= self.ends(child, start)
                return ends
            case Group(children):
                positions = 1 << start
                for child in children:
                    if not positions:
                        break
                    positions = self._advance(child, positions)
                return positions
            case Repeat(child, minimum, maximum):
                return self._repeat(child, minimum, maximum, start)

    def _advance(self, node: Node, positions: int) -> int:
        ends = 0
        while positions:
            lowest = positions & -positions
            positions ^= lowest
            self._budget.spend()
            ends |= self.ends(node, lowest.bit_length() - 1)
        return ends

    def _repeat(self, child: Node, minimum: int, maximum: int | None, start: int) -> int:
        """Positions after `minimum` to `maximum` repetitions.

        Beyond len + 1 repetitions one of them must be empty, and an empty one may occur any number of times, so
        larger counts reach exactly the same positions.
        """
        limit = len(self._name) + 1
        positions = 1 << start
        for _ in range(min(minimum, limit)):
            if not positions:
                return 0
            positions = self._advance(child, positions)
        reached = frontier = positions
        optional = limit if maximum is None else min(maximum - minimum, limit)
        for _ in range(optional):
            frontier = self._advance(child, frontier) & ~reached
            if not frontier:
                break
            reached |= frontier
        return reached

    def _holds(self, kind: str, position: int) -> bool:
        if kind == "start":
            return position == 0
        if kind == "end":
            return position == len(self._name)
        before = position > 0 and is_word(self._name[position - 1])
        after = position < len(self._name) and is_word(self._name[position])
        return (before != after) is (kind == "boundary")
