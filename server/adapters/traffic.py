"""Who captures how much of the recent traffic, and whether that is far more than an even share. Knows slots only."""

from collections.abc import Collection

WINDOW_TOKENS = 4096
"""Token-weights after which the shares are judged and what has been seen counts half: a judgement looks back over the
last few thousand tokens, whatever the rate."""


class TrafficWatch:
    """Gate mass by slot, fading. Every call holds the registry's mutex."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._mass: dict[int, float] = {}
        self._unjudged = 0.0
        self.alarmed: frozenset[int] = frozenset()
        """Slots that were above the bound when last judged."""

    def add(self, slot: int, mass: float) -> None:
        self._mass[slot] = self._mass.get(slot, 0.0) + mass
        self._unjudged += mass

    @property
    def is_due(self) -> bool:
        """Whether enough has come in to judge."""
        return self._unjudged >= WINDOW_TOKENS

    def judge(self, slots: Collection[int]) -> frozenset[int]:
        """Slots of `slots`, those in use, that newly rose above the bound.

        The bound is on odds, so that it means the same for two adapters and for fifty: share / (1 - share) above
        `factor` times the odds of an even share.
        """
        mass = {slot: self._mass.get(slot, 0.0) for slot in slots}
        total, before = sum(mass.values()), self.alarmed
        others = len(slots) - 1
        self.alarmed = frozenset(
            slot for slot, own in mass.items() if others > 0 and own * others > self._factor * (total - own)
        )
        self._mass = {slot: own / 2 for slot, own in mass.items()}
        self._unjudged = 0.0
        return self.alarmed - before

    def forget(self, slot: int) -> None:
        """The slot belongs to nobody now."""
        self._mass.pop(slot, None)
        self.alarmed -= {slot}
