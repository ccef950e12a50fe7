"""Which gate plan each token of a sequence follows where it is not the request's own: a prompt gate's decisions."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from server.routing.chat_frame import ChatFrame
from server.routing.policy import GatePlan

ENDLESS = 2**31 - 1
"""Stop of a span that holds for whatever is generated."""


class PlanSpan(NamedTuple):
    """Tokens of a sequence, from the end of the span before it to `stop` (exclusive), that follow `plan`."""

    stop: int
    plan: GatePlan


def clipped(spans: Sequence[PlanSpan], length: int) -> tuple[PlanSpan, ...]:
    """The spans as far as they concern the first `length` tokens."""
    starts = (0, *(span.stop for span in spans))
    return tuple(
        PlanSpan(min(span.stop, length), span.plan)
        for start, span in zip(starts, spans, strict=False)
        if start < length
    )


def plan_runs(spans: Sequence[PlanSpan], plan: GatePlan, start: int, stop: int) -> list[tuple[GatePlan, int]]:
    """(plan, number of tokens) of the tokens start..stop-1 in order, each with at least one; behind the spans all
    follow `plan`."""
    runs = []
    index = bisect_right(spans, start, key=lambda span: span.stop)
    while start < stop:
        end, own = spans[index] if index < len(spans) else (stop, plan)
        count = min(end, stop) - start
        runs.append((own, count))
        start, index = start + count, index + 1
    return runs


class Turn(NamedTuple):
    """A task of a question with several, whose answer follows another's."""

    line_ends: int
    """In a row, from which it begins: what ends an answer of the task before it rather than stands in one."""
    plan: GatePlan


@dataclass(frozen=True)
class AnswerTurns:
    """Whose turn it is in an answer to several tasks, a pure value.

    Nothing in the first task's answer says that another is due, so a router that reads the line ends behind it does not
    know; they predict the first token of the second answer, and follow the second task's plan.
    """

    frame: ChatFrame | None = None
    """What tells line ends and the answer's end; None where no turn is due."""
    waiting: tuple[Turn, ...] = ()
    """In the order of the question."""
    line_ends: int = 0
    """In a row, right before."""
    begun: GatePlan | None = None
    """Plan of the turn that these line ends have begun: the last of them and those behind it follow it."""

    def after(self, token_id: int) -> "AnswerTurns":
        """Behind one more token of the answer."""
        if self.frame is None:
            return self
        if token_id == self.frame.end:
            return NO_TURNS
        line_ends = self.frame.newlines.get(token_id, 0)
        if not line_ends:
            if not self.line_ends:
                return self
            return AnswerTurns(self.frame, self.waiting) if self.waiting else NO_TURNS
        count = self.line_ends + line_ends
        if self.begun is None and self.waiting and count >= self.waiting[0].line_ends:
            return AnswerTurns(self.frame, self.waiting[1:], count, self.waiting[0].plan)
        return replace(self, line_ends=count)


NO_TURNS = AnswerTurns()
"""Of an answer to one task, or to none."""


@dataclass(frozen=True)
class PlanCourse:
    """Plans of a sequence's tokens, as far as they are known, and what its next tokens may change. A pure value."""

    spans: tuple[PlanSpan, ...] = ()
    """From the beginning, by rising `stop`; behind them all tokens follow the request's plan."""
    turns: AnswerTurns = NO_TURNS

    def after(self, token_id: int, position: int, plan: GatePlan) -> "PlanCourse":
        """Once one more token is known, the one at `position`; `plan` is the request's."""
        turns = self.turns.after(token_id)
        if turns is self.turns:
            return self
        if turns.begun is None:
            return PlanCourse(self.spans, turns)
        spans = list(self.spans)
        if not spans or spans[-1].stop < position:
            spans.append(PlanSpan(position, plan))
        elif spans[-1].plan == turns.begun:
            spans.pop()  # goes on; in the next turn's prompt it is one stretch, and the prefix cache compares them
        return PlanCourse((*spans, PlanSpan(position + 1, turns.begun)), turns)

    def plan_at(self, position: int, plan: GatePlan) -> GatePlan:
        """Of one token; `plan` is the request's."""
        return plan_runs(self.spans, plan, position, position + 1)[0][0]


NO_COURSE = PlanCourse()
"""Of a sequence whose tokens all follow the request's plan."""
