"""Loads with every request at once, and the rate while all of them decode. Works on any target of `server.bench`."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from benchmarks.peers.protocol import WARM_UP_TOKENS, prompts
from server.bench.cases import model_of
from server.bench.load import Job, Load, Target, closed_loop
from server.errors import LoraMixerError


def _salts() -> Iterator[str]:
    return (f"bench-{os.getpid()}-{number}" for number in itertools.count())


@dataclass
class Loader:
    """Sends loads to one target, each under a prefix-cache salt of its own unless it is told to share."""

    target: Target
    _salt: Iterator[str] = field(default_factory=_salts)

    async def rate(
        self, policy: str, concurrency: int, *, prompt_tokens: int, new_tokens: int, is_cached: bool = False
    ) -> float:
        """Decoded tokens per second at this concurrency.

        `is_cached` computes the prompts beforehand: with long ones, that leaves a step of nothing but decoding.
        """
        salt = next(self._salt)
        if is_cached:
            await self.run(policy, concurrency, prompt_tokens, 1, salt)
        else:
            await self.run(policy, concurrency, prompt_tokens, WARM_UP_TOKENS, next(self._salt))
        return steady_rate(await self.run(policy, concurrency, prompt_tokens, new_tokens, salt))

    async def run(self, policy: str, concurrency: int, prompt_tokens: int, new_tokens: int, salt: str) -> Load:
        """One request per client. Raises LoraMixerError if any failed: its speed would mean nothing."""
        ids = prompts(concurrency, prompt_tokens, seed=0)
        jobs = [
            Job(model_of(policy, index, self.target), tuple(row), new_tokens, salt) for index, row in enumerate(ids)
        ]
        load = await closed_loop(self.target, jobs, concurrency)
        failures = [answer.error for answer in load.answers if answer.error is not None]
        if failures:
            raise LoraMixerError(f"{len(failures)} of {concurrency} {policy} requests failed: {failures[0]}")
        return load


def steady_rate(load: Load) -> float:
    """Tokens per second between the last first token and the first last one: while every request was decoding.

    Raises LoraMixerError where there is no such time: too few new tokens for the time that the prompts take.
    """
    start_s = max(answer.token_s[0] for answer in load.answers)
    end_s = min(answer.token_s[-1] for answer in load.answers)
    count = sum(start_s < token_s <= end_s for answer in load.answers for token_s in answer.token_s)
    if end_s <= start_s:
        raise LoraMixerError("the requests never decoded all at once; generate more tokens")
    return count / (end_s - start_s)
