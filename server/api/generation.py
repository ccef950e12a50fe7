"""One HTTP request's generations: submitted to the engine, merged, detokenised, cut at stop strings, counted.

Yields `ChoiceDelta`s, the common source of streamed and whole answers, so that both carry the same text. Knows no JSON.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from server.adapters.leases import AdapterLease
from server.api.choice import Choice, ChoiceDelta, total
from server.api.schemas import ChatBody, CompletionBody, GenerationBody
from server.api.services import Services
from server.engine.async_engine import GenerationHandle, GenerationRequest
from server.engine.sequence import FinishReason, SamplingParams, TokenEvent
from server.errors import EngineError, NotReadyError
from server.model.detokenizer import IncrementalDetokenizer
from server.routing.plan_course import NO_COURSE, PlanCourse, PlanSpan, clipped
from server.routing.policy import BASE_SLOT, GatePlan


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready for the engine."""

    token_ids: tuple[int, ...]
    params: SamplingParams
    course: PlanCourse = NO_COURSE
    """What the router's prompt gate has decided."""


class Leases:
    """Leases that the engine does not own yet. Leaving the `with` block releases the rest."""

    def __init__(self, services: Services, body: GenerationBody, count: int) -> None:
        self._desk = services.registry.desk
        self._model, self._adapters, self._top_k = body.model, body.adapters, body.top_k_adapters
        self._count = count
        self._waiting: deque[AdapterLease] = deque()

    def take_now(self) -> bool:
        """Whether they could be had at once; else `take` waits for them. Raises what `Roster.resolve` raises."""
        leases = self._desk.lease_now(self._model, self._adapters, self._top_k, self._count)
        self._waiting.extend(leases or ())
        return leases is not None

    async def take(self) -> None:
        """Wait until the adapters are in memory. Raises what `LeaseDesk.lease_when_resident` raises."""
        leases = await self._desk.lease_when_resident(self._model, self._adapters, self._top_k, self._count)
        self._waiting.extend(leases)

    @property
    def plans(self) -> list[GatePlan]:
        """Of the leases that wait, in the order they are handed over."""
        return [lease.plan for lease in self._waiting]

    def hand_over(self) -> AdapterLease:
        """The next lease, which the caller owns from here on."""
        return self._waiting.popleft()

    def __enter__(self) -> "Leases":
        return self

    def __exit__(self, _t: type[BaseException] | None, _e: BaseException | None, _b: TracebackType | None) -> None:
        self._release_all()

    def _release_all(self) -> None:
        while self._waiting:
            self._waiting.popleft().release()


@dataclass
class Generation:
    """All choices of one request. `close` must be called whatever happens; it aborts what still runs."""

    services: Services
    body: GenerationBody
    prompts: Sequence[Prompt]
    arrival_s: float
    leases: list[AdapterLease] = field(default_factory=list)
    """One per prompt, for the names in them; the engine owns and releases them."""
    handles: list[GenerationHandle] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    _is_closed: bool = False

    @property
    def model(self) -> str:
        """The served name, as answers carry it."""
        return self.leases[0].model

    def lease_of(self, choice_index: int) -> AdapterLease:
        """What the choice's slots are called."""
        return self.leases[choice_index // self.body.n]

    def spans_of(self, choice_index: int) -> tuple[PlanSpan, ...]:
        """What the prompt gate has decided for the choice's prompt, as far as that goes."""
        prompt = self.prompts[choice_index // self.body.n]
        return clipped(prompt.course.spans, len(prompt.token_ids))

    def _adapter_names(self, choice: Choice) -> list[str]:
        lease = self.lease_of(choice.index)
        return [lease.slot_names[slot] for slot in lease.plan.slots if slot != BASE_SLOT]

    def usage(self) -> dict[str, Any]:
        """Token counts so far. A prompt counts once, however many samples it has."""
        num_prompt = sum(len(prompt.token_ids) for prompt in self.prompts)
        num_output = sum(choice.num_tokens for choice in self.choices)
        # Only the first sample of each prompt: the others reuse what that one has just computed.
        num_cached = sum(choice.num_cached_tokens for choice in self.choices[:: self.body.n])
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }

    async def deltas(self) -> AsyncGenerator[ChoiceDelta, None]:
        """What happens, in order, until every choice has ended.

        Raises EngineError if a step failed, NotReadyError if the server shuts down before the end.
        """
        num_left = len(self.choices)
        async with aclosing(_merge(self.handles)) as events:
            async for prompt_index, sample_index, event in events:
                choice = self.choices[prompt_index * self.body.n + sample_index]
                if choice.finish_reason is not None:
                    continue  # A stop string ended it; this is the engine's echo of our abort.
                self._raise_failure(choice, event)
                delta = self._push(choice, event)
                if delta.finish_reason is not None:
                    num_left -= 1
                    if event.finish_reason is None:
                        self.handles[prompt_index].abort_choice(sample_index)
                yield delta
                if num_left == 0:
                    return
        raise EngineError(f"the engine ended {num_left} of {len(self.choices)} choices without a terminal event")

    def close(self) -> None:
        """Abort whatever still runs; idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        for choice in self.choices:
            if choice.finish_reason is None:
                self._count_end(choice, FinishReason.ABORT)
        for handle in self.handles:
            handle.abort()

    def count_start(self) -> None:
        """Every choice is queued."""
        for choice in self.choices:
            self.services.metrics.usage.enter(self._adapter_names(choice))

    def _push(self, choice: Choice, event: TokenEvent) -> ChoiceDelta:
        is_first = choice.num_tokens == 0
        delta = choice.push(event)
        now, metrics = time.monotonic(), self.services.metrics
        if delta.token_ids and is_first:
            metrics.observe_first_token(now - self.arrival_s)
            metrics.usage.start(self._adapter_names(choice))
        elif delta.token_ids:
            metrics.observe_tokens(now - choice.last_token_s, len(delta.token_ids))
        choice.last_token_s = now
        if delta.finish_reason is not None:
            self._count_end(choice, delta.finish_reason)
        return delta

    def _raise_failure(self, choice: Choice, event: TokenEvent) -> None:
        if event.finish_reason is FinishReason.ERROR:
            choice.finish_reason = FinishReason.ERROR
            self._count_end(choice, FinishReason.ERROR)
            raise EngineError(event.error or "the step failed")
        if event.finish_reason is FinishReason.ABORT:
            raise NotReadyError("The server is shutting down and cut this generation off. Try again.")

    def _count_end(self, choice: Choice, finish_reason: str) -> None:
        metrics = self.services.metrics
        metrics.usage.leave(self._adapter_names(choice), was_running=choice.num_tokens > 0)
        metrics.count_finished(self.model, finish_reason, time.monotonic() - self.arrival_s)


def submit(
    services: Services,
    body: GenerationBody,
    prompts: Sequence[Prompt],
    leases: Leases,
    request_id: str,
    arrival_s: float,
) -> Generation:
    """Queue every prompt, or none and raise OverloadedError or NotReadyError."""
    generation = Generation(services, body, prompts, arrival_s)
    requests: list[GenerationRequest] = []
    for index, prompt in enumerate(prompts):
        lease = leases.hand_over()
        generation.leases.append(lease)
        request = GenerationRequest(
            prompt_token_ids=prompt.token_ids,
            params=prompt.params,
            plan=lease.plan,
            course=prompt.course,
            lease=lease,
            request_id=f"{request_id}-{index}" if len(prompts) > 1 else request_id,
            n=body.n,
            priority=body.priority,
            cache_salt=body.cache_salt,
        )
        requests.append(request)
    generation.handles.extend(services.engine.submit_all(requests))
    goes_on = isinstance(body, CompletionBody) or (isinstance(body, ChatBody) and body.continue_final_message)
    generation.choices.extend(
        _new_choice(services, body, index, arrival_s, prompts[index // body.n].token_ids if goes_on else ())
        for index in range(len(prompts) * body.n)
    )
    generation.count_start()
    return generation


async def collect(generation: Generation) -> list[ChoiceDelta]:
    """Run to the end; one sum of deltas per choice."""
    parts: list[list[ChoiceDelta]] = [[] for _ in generation.choices]
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            parts[delta.index].append(delta)
    return [total(part) for part in parts]


def _new_choice(
    services: Services, body: GenerationBody, index: int, arrival_s: float, context: Sequence[int]
) -> Choice:
    detokenizer = IncrementalDetokenizer(
        services.tokenizer,
        stop=body.stop,
        include_stop=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        min_tokens=body.min_tokens,
        context=context,
    )
    return Choice(index, detokenizer, body.include_stop_str_in_output, last_token_s=arrival_s)


async def _merge(handles: Sequence[GenerationHandle]) -> AsyncGenerator[tuple[int, int, TokenEvent], None]:
    """(prompt index, sample index, event) of all handles, as they come."""
    if len(handles) == 1:
        async for sample_index, event in handles[0]:
            yield 0, sample_index, event
        return
    queue: asyncio.Queue[tuple[int, int, TokenEvent] | None] = asyncio.Queue()

    async def pump(prompt_index: int, handle: GenerationHandle) -> None:
        async for sample_index, event in handle:
            queue.put_nowait((prompt_index, sample_index, event))

    async def pump_all() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for prompt_index, handle in enumerate(handles):
                    group.create_task(pump(prompt_index, handle))
        finally:
            queue.put_nowait(None)

    pumps = asyncio.create_task(pump_all())
    try:
        while (entry := await queue.get()) is not None:
            yield entry
        await pumps
    finally:
        pumps.cancel()
        await asyncio.gather(pumps, return_exceptions=True)
