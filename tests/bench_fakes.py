"""A benchmark target without an engine."""

import asyncio
import time
from collections.abc import Sequence

from server.bench.load import Answer, Job


class FakeTarget:
    """Emits tokens at once; remembers its jobs and how many ran at the same time."""

    mode = "fake"
    base_model = "base-model"
    vocab_size = 100

    def __init__(self, adapters: Sequence[str] = ("a", "b"), *, missing_tokens: int = 0) -> None:
        self.adapters = adapters
        self.jobs: list[Job] = []
        self.running = 0
        self.most_running = 0
        self._missing_tokens = missing_tokens

    async def generate(self, job: Job) -> Answer:
        self.jobs.append(job)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        sent_s = time.perf_counter()
        await asyncio.sleep(0)
        self.running -= 1
        return Answer(sent_s, (time.perf_counter(),) * max(0, job.max_tokens - self._missing_tokens))
