"""Which cases a benchmark runs, and in which order: policies take turns, and each repeat starts with another one.

Knows targets only through their protocol; prints nothing.
"""

import itertools
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from server.bench.facts import OtherLoad
from server.bench.figures import generation_figures, prefill_figures
from server.bench.load import Job, Target, closed_loop, open_loop
from server.errors import ConfigError

POLICIES = ("base", "pinned", "routed", "mixed")

ROUTED_MODEL = "auto"

MAX_DRAWN_TOKEN_ID = 32_000
"""Prompts draw ids below this and the vocabulary's size, so that every target and model gets the same prompts."""

WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Plan:
    """What to measure. Sizes in tokens, rate in requests per second."""

    policies: Sequence[str] = ("base", "pinned", "routed")
    concurrency: Sequence[int] = (1, 8, 32)
    prompt_tokens: int = 64
    new_tokens: int = 128
    repeat: int = 3
    requests_per_client: int = 1
    rate: float | None = None
    """Open loop at this rate instead of closed loops at `concurrency`."""
    num_requests: int = 64
    """Open loop only."""
    prefill: int | None = None
    """Also measure one prompt of this many tokens."""
    seed: int = 0


Note = Callable[[str], None]
"""Told what is about to run, for people."""


async def run_plan(target: Target, plan: Plan, note: Note) -> AsyncIterator[dict[str, Any]]:
    """The figures of every case, as they are measured. Raises ConfigError for a policy the target cannot serve."""
    if not target.adapters and (lacking := sorted(set(plan.policies) - {"base"})):
        raise ConfigError(f"policies {', '.join(lacking)} need adapters, and none is ready")
    runner = _CaseRunner(target, plan)
    sizes: Sequence[int | None] = (None,) if plan.rate is not None else plan.concurrency
    for concurrency, policy in itertools.product(sizes, plan.policies):
        note(f"warm-up: {_name(policy, concurrency)}")
        await runner.warm_up(policy, concurrency)
    for repeat in range(plan.repeat):
        # Each repeat starts with another policy: whoever always ran first would meet a cooler machine.
        shift = repeat % len(plan.policies)
        policies = [*plan.policies[shift:], *plan.policies[:shift]]
        for concurrency, policy in itertools.product(sizes, policies):
            note(f"repeat {repeat + 1}/{plan.repeat}: {_name(policy, concurrency)}")
            yield await runner.generation(policy, concurrency, repeat)
        if plan.prefill is not None:
            for policy in policies:
                note(f"repeat {repeat + 1}/{plan.repeat}: {policy} prefill {plan.prefill}")
                yield await runner.prefill(policy, plan.prefill, repeat)


def model_of(policy: str, index: int, target: Target) -> str:
    """The `model` of the index-th request: pinned ones take the adapters in turn, mixed ones the policies in turn."""
    if policy == "mixed":
        return model_of(("base", "pinned", "routed")[index % 3], index // 3, target)
    if policy == "pinned":
        return target.adapters[index % len(target.adapters)]
    return ROUTED_MODEL if policy == "routed" else target.base_model


class _CaseRunner:
    """Makes the jobs of each case and runs them."""

    def __init__(self, target: Target, plan: Plan) -> None:
        self._target = target
        self._plan = plan
        self._num_runs = 0
        # Two benchmarks against one server, one after the other, must not share cached prefixes either.
        self._session = random.SystemRandom().getrandbits(64)

    async def warm_up(self, policy: str, concurrency: int | None) -> None:
        size = concurrency or 1
        await closed_loop(self._target, self._jobs(policy, size, self._plan.prompt_tokens, WARM_UP_TOKENS), size)

    async def generation(self, policy: str, concurrency: int | None, repeat: int) -> dict[str, Any]:
        plan = self._plan
        others = OtherLoad()
        first = None
        if concurrency is not None:
            num_jobs = concurrency * plan.requests_per_client
            first = await closed_loop(self._target, self._jobs(policy, num_jobs, plan.prompt_tokens, 1), concurrency)
            load = await closed_loop(
                self._target, self._jobs(policy, num_jobs, plan.prompt_tokens, plan.new_tokens), concurrency
            )
        else:
            assert plan.rate is not None, "without a concurrency there is a rate"
            jobs = self._jobs(policy, plan.num_requests, plan.prompt_tokens, plan.new_tokens)
            load = await open_loop(self._target, jobs, plan.rate, plan.seed + repeat)
        figures = generation_figures(load, first, concurrency)
        failed_first = 0 if first is None else sum(answer.error is not None for answer in first.answers)
        figures["failures"] += failed_first
        facts = {} if concurrency is not None else {"requests_per_s": plan.rate}
        return {
            **self._header("generation", _name(policy, concurrency), policy, repeat),
            "prompt_tokens": plan.prompt_tokens,
            "new_tokens": plan.new_tokens,
            **facts,
            **figures,
            "other_cores": self._other_cores(others),
        }

    async def prefill(self, policy: str, num_tokens: int, repeat: int) -> dict[str, Any]:
        if repeat == 0:
            await closed_loop(self._target, self._jobs(policy, 1, num_tokens, 1), 1)
        others = OtherLoad()
        load = await closed_loop(self._target, self._jobs(policy, 1, num_tokens, 1), 1)
        return {
            **self._header("prefill", f"{policy} prefill", policy, repeat),
            "prompt_tokens": num_tokens,
            "new_tokens": 1,
            **prefill_figures(load, num_tokens),
            "other_cores": self._other_cores(others),
        }

    def _header(self, kind: str, case: str, policy: str, repeat: int) -> dict[str, Any]:
        return {"case": case, "kind": kind, "mode": self._target.mode, "policy": policy, "repeat": repeat}

    def _jobs(self, policy: str, num_jobs: int, prompt_tokens: int, new_tokens: int) -> list[Job]:
        """Prompts depend on the seed and their index alone: all policies get the same ones. Salts differ by run."""
        self._num_runs += 1
        salt = f"bench-{self._session:016x}-{self._num_runs}"
        rng = random.Random(self._plan.seed)
        limit = min(self._target.vocab_size, MAX_DRAWN_TOKEN_ID)
        return [
            Job(
                model=model_of(policy, index, self._target),
                prompt_token_ids=tuple(rng.randrange(limit) for _ in range(prompt_tokens)),
                max_tokens=new_tokens,
                salt=salt,
            )
            for index in range(num_jobs)
        ]

    def _other_cores(self, others: OtherLoad) -> float | None:
        """Only where the work is done in this process: a server is another process too."""
        return others.cores() if self._target.mode == "in-process" else None


def _name(policy: str, concurrency: int | None) -> str:
    return f"{policy} open-loop" if concurrency is None else f"{policy} c{concurrency}"
