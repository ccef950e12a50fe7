"""The order of a step's tokens: rows behind one another, and which plan each token follows. Plain lists, no tensors."""

from dataclasses import dataclass

from server.engine.sequence import ScheduledBatch, ScheduledSequence
from server.routing.policy import BASE_PLAN, GatePlan


@dataclass(frozen=True, eq=False)
class StepLayout:
    """Packed rows of a scheduled batch: decode rows first, then prefill rows."""

    rows: tuple[ScheduledSequence, ...]
    order: tuple[int, ...]
    """Index into the scheduled batch of each entry of `rows`."""
    starts: tuple[int, ...]
    """First token of each row."""
    num_tokens: int
    plans: tuple[GatePlan, ...]
    """Distinct plans; the base plan is always among them."""
    runs: tuple[tuple[int, int], ...]
    """(index into `plans`, number of tokens): the plans of the tokens in order."""

    def token_ids(self) -> list[int]:
        """(T,) tokens to compute."""
        ids: list[int] = []
        for row in self.rows:
            begin = row.sequence.num_computed_tokens
            ids += row.sequence.tokens_between(begin, begin + row.num_tokens)
        return ids

    def plan_of_token(self) -> list[int]:
        """(T,) index into `plans` of each token."""
        return [plan for plan, count in self.runs for _ in range(count)]

    def positions(self) -> list[int]:
        """(T,) position of each token in its sequence."""
        positions: list[int] = []
        for row in self.rows:
            begin = row.sequence.num_computed_tokens
            positions += range(begin, begin + row.num_tokens)
        return positions


def num_recomputed(row: ScheduledSequence) -> int:
    """How many of the row's tokens, its first, were computed and counted before a preemption already."""
    return min(row.num_tokens, max(0, row.sequence.num_counted_tokens - row.sequence.num_computed_tokens))


def lay_out(batch: ScheduledBatch) -> StepLayout:
    """The layout of one step."""
    order = tuple(sorted(range(len(batch.rows)), key=lambda i: batch.rows[i].num_tokens > 1))
    rows = tuple(batch.rows[i] for i in order)
    starts, total = [], 0
    runs: list[tuple[GatePlan, int]] = []
    for row in rows:
        starts.append(total)
        total += row.num_tokens
        runs += row.sequence.plan_runs(row.num_tokens)
    plans = tuple(dict.fromkeys([plan for plan, _ in runs] + [BASE_PLAN]))
    index = {plan: i for i, plan in enumerate(plans)}
    return StepLayout(
        rows=rows,
        order=order,
        starts=tuple(starts),
        num_tokens=total,
        plans=plans,
        runs=tuple((index[plan], count) for plan, count in runs),
    )
