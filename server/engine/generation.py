"""One request at the engine's door, and the handle through which its events come back.

Knows the event loop of its consumer; not threads, queues or scheduling: those are `AsyncEngine`'s.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, replace

from server.engine.lease import Lease
from server.engine.sequence import SamplingParams, Sequence, TokenEvent
from server.routing.plan_course import NO_COURSE, PlanCourse
from server.routing.policy import GatePlan


@dataclass(frozen=True)
class GenerationRequest:
    """A validated prompt with its gates, and the lease that keeps them alive; `n` samples are drawn from it."""

    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    plan: GatePlan
    lease: Lease
    request_id: str
    n: int = 1
    priority: int = 0
    cache_salt: str | None = None
    course: PlanCourse = NO_COURSE
    """Where tokens follow another plan than `plan`; the lease holds those too."""

    @property
    def num_tokens(self) -> int:
        """What it may cost at most: prompt plus max_tokens, times n."""
        return self.n * (len(self.prompt_token_ids) + self.params.max_tokens)

    def sequences(self, first_id: int, eos_token_ids: frozenset[int]) -> list[Sequence]:
        """One sequence per sample, ids counting from `first_id`, seeds from the request's; the first leads."""
        lease = _SharedLease(self.lease, self.n)
        sequences: list[Sequence] = []
        for index in range(self.n):
            seed = self.params.seed
            sequence = Sequence(
                id=first_id + index,
                prompt_token_ids=list(self.prompt_token_ids),
                params=self.params if seed is None else replace(self.params, seed=seed + index),
                plan=self.plan,
                course=self.course,
                lease=lease,
                priority=self.priority,
                cache_salt=self.cache_salt,
                eos_token_ids=eos_token_ids,
                leader=sequences[0] if sequences else None,
                request_id=self.request_id,
            )
            sequences.append(sequence)
        return sequences


class _SharedLease:
    """One lease held by several sequences: released by the last of them."""

    def __init__(self, lease: Lease, num_holders: int) -> None:
        self._lease = lease
        self._num_holders = num_holders

    def release(self) -> None:
        self._num_holders -= 1
        if self._num_holders == 0:
            self._lease.release()


class Mailbox:
    """Events of one request on their way to its consumer. Apart from `loop`, used on that loop only.

    The engine keeps mailboxes, never handles, so that a handle that nobody holds any more is collected.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, sequence_ids: Iterable[int]) -> None:
        self.loop = loop
        self.open = {sequence_id: index for index, sequence_id in enumerate(sequence_ids)}
        """Choice index of every sequence whose terminal event has not arrived."""
        self._events: deque[tuple[int, TokenEvent]] = deque()
        self._has_news = asyncio.Event()

    def put(self, event: TokenEvent) -> None:
        """Take an event. A choice's events end with its terminal one."""
        self._events.append((self.open[event.sequence_id], event))
        if event.finish_reason is not None:
            del self.open[event.sequence_id]
        self._has_news.set()

    async def get(self) -> tuple[int, TokenEvent] | None:
        """The next (choice index, event), when there is one; None after the last."""
        while not self._events:
            if not self.open:
                return None
            self._has_news.clear()
            await self._has_news.wait()
        return self._events.popleft()


def put_all(deliveries: Iterable[tuple[Mailbox, TokenEvent]]) -> None:
    """One call for all that a step brings to an event loop."""
    for mailbox, event in deliveries:
        mailbox.put(event)


class GenerationHandle(AsyncIterator[tuple[int, TokenEvent]]):
    """Yields (choice index, event) until every choice had its terminal event. For one consumer, on one event loop.

    The generation is aborted when the consumer's task is cancelled while it waits here (so do not wrap a single step
    in `asyncio.wait_for`), when the handle is closed (`contextlib.aclosing`), or when nobody holds it any more.
    """

    def __init__(self, mailbox: Mailbox, abort: Callable[[tuple[int, ...]], None]) -> None:
        """`abort` takes sequence ids; it is called from anywhere, the garbage collector included."""
        self._mailbox = mailbox
        self._abort = abort

    async def __anext__(self) -> tuple[int, TokenEvent]:
        try:
            item = await self._mailbox.get()
        except asyncio.CancelledError:
            self.abort()
            raise
        if item is None:
            raise StopAsyncIteration
        return item

    def abort(self) -> None:
        """End all choices that have not ended, soon; their terminal events still come. Does nothing twice."""
        if self._mailbox.open:
            self._abort(tuple(self._mailbox.open))

    def abort_choice(self, index: int) -> None:
        """End one choice, e.g. because a stop string was found in its text. Does nothing if it has ended."""
        self._abort(tuple(id_ for id_, open_index in self._mailbox.open.items() if open_index == index))

    async def aclose(self) -> None:
        """Abort what has not ended; does not wait for it."""
        self.abort()

    def __del__(self) -> None:
        self.abort()
