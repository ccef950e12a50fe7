"""What one decode step is made of, in ms, at one concurrency: by differences between loads, and two timers.

step         concurrency / tokens per second, in process, routed
router       step of routed requests less that of pinned ones (eight different adapters, same bank, fixed gates)
lora         step of pinned requests less that of base ones
attention    what grows with the context: slope of the base step between two contexts times the mean context of the load
sampling     `sampler.sample`, called alone on logits of this batch
scheduling   `Scheduler.schedule` and `update`, timed inside the running engine, per step
base         what is left of the base step: the model's linear maps, norms, small operations, the event loop
http         step over HTTP (streaming, clients on the same machine) less the step in process
A difference of two noisy loads may come out slightly below zero; it is shown as it is.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.loads import Loader
from server.api.services import Services
from server.engine.sampler import sample
from server.engine.sequence import SamplingParams, Sequence
from server.routing.policy import BASE_PLAN

LONG_CONTEXT = 1024
SAMPLE_CALLS = 50


@dataclass
class SchedulerTimer:
    """Adds up the time a running engine spends in its scheduler, and its steps."""

    seconds: float = 0.0
    num_steps: int = 0
    _is_attached: bool = field(default=False, init=False)

    def attach(self, services: Services) -> None:
        """Wrap the two calls of every step; once."""
        assert not self._is_attached, "one timer, one engine"
        self._is_attached = True
        scheduler: Any = services.engine._engine.scheduler  # no public door: only a profile looks inside
        scheduler.schedule = self._timed(scheduler.schedule, steps=1)
        scheduler.update = self._timed(scheduler.update, steps=0)

    def reset(self) -> None:
        self.seconds, self.num_steps = 0.0, 0

    @property
    def per_step_ms(self) -> float:
        return 1e3 * self.seconds / max(1, self.num_steps)

    def _timed(self, function: Callable[..., Any], steps: int) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started_s = time.perf_counter()
            result = function(*arguments)
            self.seconds += time.perf_counter() - started_s
            self.num_steps += steps
            return result

        return timed


def sampling_ms(concurrency: int, vocab_size: int) -> float:
    """Median time of greedy sampling for one batch."""
    logits = torch.randn(concurrency, vocab_size, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    rows = [_sequence(index, params) for index in range(concurrency)]
    times = []
    with torch.inference_mode():
        for _ in range(SAMPLE_CALLS):
            started_s = time.perf_counter()
            sample(logits, rows)
            times.append(time.perf_counter() - started_s)
    return 1e3 * statistics.median(times)


async def step_cost(loader: Loader, timer: SchedulerTimer, concurrency: int, new_tokens: int) -> dict[str, Any]:
    """The parts of one step at this concurrency, prompts of 64 tokens; `http` is added by whoever has a server."""
    prompt_tokens = 64

    async def step_ms(policy: str, context: int) -> float:
        rate = await loader.rate(
            policy, concurrency, prompt_tokens=context, new_tokens=new_tokens, is_cached=context > prompt_tokens
        )
        return 1e3 * concurrency / rate

    base, pinned = await step_ms("base", prompt_tokens), await step_ms("pinned", prompt_tokens)
    timer.reset()
    routed = await step_ms("routed", prompt_tokens)
    scheduling = timer.per_step_ms
    long_ms = await step_ms("base", LONG_CONTEXT)
    mean_context = prompt_tokens + new_tokens / 2
    attention = (long_ms - base) / (LONG_CONTEXT - prompt_tokens) * mean_context
    sampling = sampling_ms(concurrency, loader.target.vocab_size)
    parts = {
        "base": base - attention - sampling - scheduling,
        "router": routed - pinned,
        "lora": pinned - base,
        "attention": attention,
        "sampling": sampling,
        "scheduling": scheduling,
    }
    return {
        "concurrency": concurrency,
        "step_ms": round(routed, 3),
        "parts_ms": {name: round(value, 3) for name, value in parts.items()},
    }


class _NoLease:
    def release(self) -> None:
        """Nothing is held."""


def _sequence(index: int, params: SamplingParams) -> Sequence:
    return Sequence(id=index, prompt_token_ids=[1, 2, 3], params=params, plan=BASE_PLAN, lease=_NoLease())
