"""Generates load and notes when each token came. Knows neither what answers (a `Target`) nor what figures mean."""

import asyncio
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Job:
    """One request to send: greedy, end of sequence ignored."""

    model: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    salt: str
    """Its prefix-cache salt: no run profits from the cache of another."""


@dataclass(frozen=True)
class Answer:
    """When one request was sent and each of its tokens came, on `time.perf_counter`'s clock."""

    sent_s: float
    token_s: tuple[float, ...]
    error: str | None = None
    """Why it failed; a request that ended with fewer tokens than asked for has failed as well."""


@dataclass(frozen=True)
class Load:
    """All requests of one run."""

    wall_s: float
    """From the first request sent to the last token received."""
    answers: tuple[Answer, ...]


class Target(Protocol):
    """Something that generates: an engine in this process or a server."""

    @property
    def mode(self) -> str: ...

    @property
    def base_model(self) -> str:
        """The `model` of requests without adapters."""
        ...

    @property
    def adapters(self) -> Sequence[str]:
        """Adapters that can be pinned."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids below this are safe to send."""
        ...

    async def generate(self, job: Job) -> Answer:
        """Send one request and wait for its end. Never raises for a request that failed."""
        ...


async def closed_loop(target: Target, jobs: Sequence[Job], num_clients: int) -> Load:
    """Every client sends its next request when its last one has ended, until all `jobs` are done."""
    queue = iter(jobs)
    answers: list[Answer] = []

    async def client() -> None:
        for job in queue:  # Shared by all clients: each takes the next one.
            answers.append(checked(await target.generate(job), job))

    started_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(num_clients):
            group.create_task(client())
    return Load(_end_of(answers, started_s) - started_s, tuple(answers))


async def open_loop(target: Target, jobs: Sequence[Job], requests_per_s: float, seed: int) -> Load:
    """Send `jobs` at the times of a Poisson process, however many are still under way."""
    gaps = random.Random(seed)
    answers: list[Answer] = []

    async def send(job: Job) -> None:
        answers.append(checked(await target.generate(job), job))

    started_s = due_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for job in jobs:
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            group.create_task(send(job))
            due_s += gaps.expovariate(requests_per_s)
    return Load(_end_of(answers, started_s) - started_s, tuple(answers))


def checked(answer: Answer, job: Job) -> Answer:
    """`answer`, as a failure if it does not hold exactly the tokens that `job` asked for."""
    if answer.error is None and len(answer.token_s) != job.max_tokens:
        return Answer(answer.sent_s, answer.token_s, f"{len(answer.token_s)} tokens instead of {job.max_tokens}")
    return answer


def _end_of(answers: Iterable[Answer], started_s: float) -> float:
    return max((answer.token_s[-1] for answer in answers if answer.token_s), default=started_s)
