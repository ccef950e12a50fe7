"""Ranks or alphas by pattern, as `rank_pattern` and `alpha_pattern` give them: the first that matches has the say.

PEFT tries them one after the other. Files that list every module by its full name have thousands, so those without
special characters but dots are found by lookup here, whatever their number.
"""

from collections.abc import Sequence
from typing import Generic, TypeVar

from server.adapters.patterns import Budget, Pattern, suffixes

_Value = TypeVar("_Value")


class PatternTable(Generic[_Value]):
    """Patterns and their values, in the order of the file."""

    def __init__(self, items: Sequence[tuple[Pattern, _Value]]) -> None:
        self._values = [value for _, value in items]
        self._others: list[tuple[int, Pattern]] = []
        self._plain: dict[int, dict[int, dict[int, int]]] = {}
        """Length -> mask of the characters that are no dots -> text under the mask -> place of the first such pattern.

        A dot stands for any character, so a name's tail is looked up once under each mask of its length; patterns for
        the modules of one model share a handful of masks.
        """
        for place, (pattern, _) in enumerate(items):
            if pattern.is_plain:
                mask = int.from_bytes(bytes(0 if character == "." else 0x7F for character in pattern.text))
                places = self._plain.setdefault(len(pattern.text), {}).setdefault(mask, {})
                places.setdefault(_as_number(pattern.text) & mask, place)
            else:
                self._others.append((place, pattern))

    def first(self, name: str, budget: Budget, default: _Value) -> _Value:
        """Value of the first pattern that matches `name` or a tail of it at a dot."""
        first = len(self._values)
        for suffix in suffixes(name):
            number = _as_number(suffix)
            for mask, places in self._plain.get(len(suffix), {}).items():
                budget.spend()
                place = places.get(number & mask)
                if place is not None and place < first:
                    first = place
        for place, pattern in self._others:
            if place > first:
                break
            if pattern.matches_suffix(name, budget):
                return self._values[place]
        return default if first == len(self._values) else self._values[first]


def _as_number(text: str) -> int:
    """The characters as one number, a byte for each, so that a mask applies to all of them in one operation.

    Plain patterns are ASCII and hold no `?`, which stands for every other character here.
    """
    return int.from_bytes(text.encode("ascii", "replace"))
