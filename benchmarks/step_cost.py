"""What one decode step is made of, in ms, at one concurrency: by differences between loads, and two timers.

step         concurrency / tokens per second, in process, routed
router       step of routed requests less that of pinned ones (eight different adapters, same bank, fixed gates)
lora         step of pinned requests less that of base ones
attention    what grows with the context: slope of the base step between two contexts times the mean context of the load
sampling     from logits to tokens (`ModelRunner._outputs`; the native step has found the greatest logits before), and
scheduling   `Scheduler.schedule` and `update`: both timed inside the running engine, per step
base         what is left of the base step: the model's linear maps, norms, small operations, the event loop
http         step over HTTP (streaming, clients on the same machine) less the step in process
A difference of two noisy loads may come out slightly below zero; it is shown as it is.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.loads import Loader
from server.api.services import Services

LONG_CONTEXT = 1024


@dataclass
class EngineTimer:
    """Adds up the time a running engine spends in its scheduler and in sampling, and its steps."""

    scheduling_s: float = 0.0
    sampling_s: float = 0.0
    num_steps: int = 0
    _is_attached: bool = field(default=False, init=False)

    def attach(self, services: Services) -> None:
        """Wrap the three calls of every step; once."""
        assert not self._is_attached, "one timer, one engine"
        self._is_attached = True
        engine: Any = services.engine._engine  # no public door: only a profile looks inside
        engine.scheduler.schedule = self._timed(engine.scheduler.schedule, "scheduling_s", steps=1)
        engine.scheduler.update = self._timed(engine.scheduler.update, "scheduling_s")
        engine._runner._outputs = self._timed(engine._runner._outputs, "sampling_s")

    def reset(self) -> None:
        self.scheduling_s = self.sampling_s = 0.0
        self.num_steps = 0

    def per_step_ms(self, total_s: float) -> float:
        return 1e3 * total_s / max(1, self.num_steps)

    def _timed(self, function: Callable[..., Any], total: str, steps: int = 0) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started_s = time.perf_counter()
            result = function(*arguments)
            setattr(self, total, getattr(self, total) + time.perf_counter() - started_s)
            self.num_steps += steps
            return result

        return timed


async def step_cost(loader: Loader, timer: EngineTimer, concurrency: int, new_tokens: int) -> dict[str, Any]:
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
    scheduling, sampling = timer.per_step_ms(timer.scheduling_s), timer.per_step_ms(timer.sampling_s)
    long_ms = await step_ms("base", LONG_CONTEXT)
    mean_context = prompt_tokens + new_tokens / 2
    attention = (long_ms - base) / (LONG_CONTEXT - prompt_tokens) * mean_context
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
