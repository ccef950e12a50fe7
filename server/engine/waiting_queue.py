"""Sequences that wait for blocks or seats, in the order in which they get them, and how much work they are.

Knows nothing about blocks or steps: the scheduler decides when the first one may go.
"""

import math
from bisect import bisect_left, insort

from server.engine.sequence import Sequence

TURN = 8
"""Of so many sequences that are admitted, one is who has waited longest, whatever the priorities: clients choose them,
and a stream of urgent ones must not starve the others."""

_Rank = tuple[float, bool, float, int]
"""Urgency, whether it is new (preempted ones resume first), arrival, id (which makes the order total)."""


class WaitingQueue:
    """Waiting sequences by (priority, preempted first, arrival), every TURN-th time by arrival alone, plus siblings
    held back until their leader is ready.

    Finding a place is O(log n); the list then shifts pointers, which is nothing next to a step at any sane length.
    """

    def __init__(self) -> None:
        self._ready: list[tuple[_Rank, Sequence]] = []
        self._held: dict[int, list[Sequence]] = {}  # leader's id -> its siblings
        self._num_held = 0
        self._num_admitted = 0
        self._most_urgent = math.inf  # of the priorities that came or waited since the last turn
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
        self._place(sequence)
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
            self._place(sibling)

    def admit_first(self) -> Sequence:
        """Take out `first`, which must be somebody, to be computed."""
        _, sequence = self._ready.pop(0)
        self.num_tokens -= _cost(sequence)
        self._num_admitted += 1
        if self._num_admitted % TURN == 0:
            self._give_turn()
        return sequence

    def _give_turn(self) -> None:
        """Who has waited longest goes next, and stays before others, unless it was among the most urgent anyway."""
        waiting = [sequence for _, sequence in self._ready]
        longest = min(waiting, key=lambda sequence: (sequence.arrival_s, sequence.id), default=None)
        if longest is not None and longest.priority > self._most_urgent:
            self.remove(longest)
            longest.is_overdue = True
            self.push(longest)
        self._most_urgent = min((sequence.priority for sequence in waiting), default=math.inf)

    def _place(self, sequence: Sequence) -> None:
        insort(self._ready, (_rank(sequence), sequence))
        self._most_urgent = min(self._most_urgent, sequence.priority)

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


def urgency(sequence: Sequence) -> float:
    """Lower runs first."""
    return -math.inf if sequence.is_overdue else sequence.priority


def _rank(sequence: Sequence) -> _Rank:
    return urgency(sequence), sequence.num_preemptions == 0, sequence.arrival_s, sequence.id


def _cost(sequence: Sequence) -> int:
    return sequence.num_prompt_tokens + sequence.params.max_tokens
