"""Who gets how much of what the router gives away, and whether that is more than it may have. Knows slots only.

Routed requests with a choice count, pinned ones do not: a cap is about capture, not about demand.
"""

from collections.abc import Mapping


class GateShares:
    """Routed gate mass by slot, fading. Every call holds the registry's mutex."""

    def __init__(self, window: int) -> None:
        """`window` is how many token-weights are judged at a time; those of before count half, and so on."""
        self._window = window
        self._mass: dict[int, float] = {}
        self._unjudged = 0.0

    def add(self, slot: int, mass: float) -> None:
        self._mass[slot] = self._mass.get(slot, 0.0) + mass
        self._unjudged += mass

    @property
    def is_due(self) -> bool:
        """Whether enough has come in to judge."""
        return self._unjudged >= self._window

    def judge(self, caps: Mapping[int, float]) -> tuple[int, float] | None:
        """(slot, share of all that was routed, the base model's included) of who exceeds its cap the most, if anybody.

        One at a time: without it the others' shares are other ones.
        """
        total = sum(self._mass.values())
        shares = {slot: self._mass.get(slot, 0.0) / total for slot in caps}
        self._mass = {slot: own / 2 for slot, own in self._mass.items()}
        self._unjudged = 0.0
        worst = max(caps, key=lambda slot: shares[slot] / caps[slot], default=None)
        return (worst, shares[worst]) if worst is not None and shares[worst] > caps[worst] else None

    def forget(self, slot: int) -> None:
        """What the slot has had counts no more: not for it, not in the sum, and not towards the window."""
        self._unjudged = max(0.0, self._unjudged - self._mass.pop(slot, 0.0))
