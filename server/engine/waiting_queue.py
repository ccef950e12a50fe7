"""Sequences that wait for blocks or seats, in the order in which they get them, and how much work they are.

Knows nothing about blocks or steps: the scheduler decides when the first one may go.
"""

from bisect import bisect_left, insort

from server.engine.sequence import Sequence

_Rank = tuple[int, bool, float, int]
"""Priority, whether it is new (preempted ones resume first), arrival, id (which makes the order total)."""


class WaitingQueue:
    """Waiting sequences by (priority, preempted first, arrival), plus siblings held back until their leader is ready.

    Finding a place is O(log n); the list then shifts pointers, which is nothing next to a step at any sane length.
    """

    def __init__(self) -> None:
        self._ready: list[tuple[_Rank, Sequence]] = []
        self._held: dict[int, list[Sequence]] = {}  # leader's id -> its siblings
        self._num_held = 0
        self.num_tokens = 0
        """Prompt tokens plus max_tokens of all sequences here."""

    def __len__(self) -> int:
        return len(self._ready) + self._num_held

    @property
    def first(self) -> Sequence | None:
        """Who goes next; None if nobody may."""
        return self._ready[0][1] if self._ready else None

    def push(self, sequence: Sequence) -> None:
        """Queue a new or preempted sequence."""
        insort(self._ready, (_rank(sequence), sequence))
        self.num_tokens += _cost(sequence)

    def hold(self, sequence: Sequence, leader: Sequence) -> None:
        """Keep a sibling back until `let_go(leader)`."""
        self._held.setdefault(leader.id, []).append(sequence)
        self._num_held += 1
        self.num_tokens += _cost(sequence)

    def let_go(self, leader: Sequence) -> None:
        """Queue the siblings that were held for `leader`, if any."""
        siblings = self._held.pop(leader.id, [])
        self._num_held -= len(siblings)
        for sibling in siblings:
            insort(self._ready, (_rank(sibling), sibling))

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever in here it stands."""
        self.num_tokens -= _cost(sequence)
        siblings = self._held.get(sequence.leader.id, []) if sequence.leader is not None else []
        if sequence in siblings:
            siblings.remove(sequence)
            self._num_held -= 1
            return
        index = bisect_left(self._ready, _rank(sequence), key=lambda entry: entry[0])
        assert self._ready[index][1] is sequence, "a waiting sequence stands at its rank"
        del self._ready[index]


def _rank(sequence: Sequence) -> _Rank:
    return sequence.priority, sequence.num_preemptions == 0, sequence.arrival_s, sequence.id


def _cost(sequence: Sequence) -> int:
    return sequence.num_prompt_tokens + sequence.params.max_tokens
