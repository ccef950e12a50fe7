"""All state of one sequence, and the values that enter and leave the engine. No torch here.

Knows nothing about HTTP, text or adapters: prompts are token ids, gates are a `GatePlan`.
"""

import random
import time
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto
from typing import NamedTuple, Protocol

from server.engine.drafts import Drafter
from server.engine.lease import Lease, NoLease
from server.engine.occurrences import Occurrences
from server.engine.step_stats import RoutingStats
from server.routing.plan_course import NO_COURSE, PlanCourse, plan_runs
from server.routing.policy import BASE_PLAN, GatePlan


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. Ranges are validated where requests enter (`api/schemas.py`)."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """Number of most likely tokens kept; 0 keeps all."""
    min_p: float = 0.0
    """Tokens less likely than `min_p` times the most likely one are dropped."""
    seed: int | None = None
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token already generated."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit per time it was generated."""
    repetition_penalty: float = 1.0
    """CTRL's (arXiv 1909.05858): divides positive and multiplies negative logits of prompt and output tokens."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, bias added to its logit)."""
    max_tokens: int = 16
    """Most tokens to generate; 0 only scores the prompt."""
    min_tokens: int = 0
    """End-of-sequence and stop tokens are forbidden before this many tokens."""
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    """None: no logprobs; n >= 0: the chosen token's logprob and the n most likely tokens."""
    prompt_logprobs: int | None = None
    """As `logprobs`, for every prompt token but the first; turns prefix-cache reads off for the request."""
    trace_routing: "TraceLevel | None" = None

    @property
    def is_penalised(self) -> bool:
        """Whether tokens that have occurred are less likely."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class TraceLevel(StrEnum):
    """How much of the routing decision a request wants back."""

    SUMMARY = "summary"
    TOKENS = "tokens"
    LAYERS = "layers"


class SequenceStatus(Enum):
    """Life of a sequence. A preempted one is WAITING again with its blocks gone."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class FinishReason(StrEnum):
    """Why a sequence ended. ABORT: the client left or a stop string was found. ERROR: a step failed."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class TokenLogprobs(NamedTuple):
    """Natural-log probabilities at one position, from the model's raw logits (before penalties and temperature)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token id, logprob), most likely first; as many as were asked for."""
    rank: int = 0
    """1-based rank of `token_id` among the vocabulary."""


class TokenRouting(NamedTuple):
    """Gate weights at the position that produced one generated token."""

    share: tuple[tuple[int, float], ...]
    """(slot, gate weight averaged over routed layers), non-zero ones, heaviest first."""
    layers: tuple[tuple[tuple[int, float], ...], ...] | None = None
    """Per gated layer the (slot, weight) pairs; only at `TraceLevel.LAYERS`."""


@dataclass(frozen=True)
class TokenEvent:
    """What one step produced for one sequence. Exactly one event per sequence carries a `finish_reason`."""

    sequence_id: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per token of `token_ids` when asked for."""
    routing: tuple[TokenRouting, ...] = ()
    """One per token of `token_ids` when asked for."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """One per prompt token (None for the first), once, with the first event."""
    num_cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache at first admission."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token id that ended the sequence; None for end-of-sequence, length and stop strings."""
    error: str | None = None


class StepOutput(NamedTuple):
    """The model runner's answer for one scheduled sequence."""

    token_ids: tuple[int, ...] = ()
    """What it says next: one token, more where drafts were right, none while its prompt is not yet fully computed."""
    logprobs: TokenLogprobs | None = None
    """Of its one token; rows with drafts have none."""
    routing: tuple[TokenRouting, ...] = ()
    """One per token of `token_ids` when asked for."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """For the prompt positions computed this step: logprobs of the *next* prompt token at each."""
    error: str | None = None
    """Why this row alone must end with FinishReason.ERROR, e.g. non-finite logits; its batch mates go on."""


@dataclass(eq=False)
class Sequence:
    """One sequence from admission to its terminal event. Mutated on the engine thread only."""

    id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    plan: GatePlan = BASE_PLAN
    course: PlanCourse = NO_COURSE
    """Where tokens follow another plan than `plan`."""
    lease: Lease = field(default_factory=NoLease)
    priority: int = 0
    """Lower runs first (vLLM's convention)."""
    is_overdue: bool = False
    """Whether it has waited so long that it runs before every priority, to its end."""
    cache_salt: str | None = None
    """Requests with different salts never share cached blocks."""
    eos_token_ids: frozenset[int] = frozenset()
    leader: "Sequence | None" = None
    """First of n parallel samples: its siblings wait until its prompt is computed, then hit the prefix cache."""
    request_id: str = ""
    arrival_s: float = field(default_factory=time.monotonic)

    status: SequenceStatus = SequenceStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    """Tokens whose K/V stand in `block_table`; the rest is to be scheduled."""
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    """How often its blocks were taken away; its K/V is computed anew after each."""
    num_counted_tokens: int = 0
    """Computed before its last preemption, and counted in the statistics then."""
    block_table: list[int] = field(default_factory=list)
    draft_token_ids: list[int] = field(default_factory=list)
    """Guesses of the tokens behind the known ones, which the step under way computes with them."""
    drafter: Drafter | None = None
    """Who makes them; None until the first might be."""
    occurrences: Occurrences | None = None
    """What penalties look at; None until the first are applied."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Chained content hashes of the full blocks of prompt + output, filled lazily by the block pool's user."""
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    rng: random.Random = field(init=False)
    """Source of one uniform number per sampled token; seeded, so results survive preemption and batching."""

    def __post_init__(self) -> None:
        seed = self.params.seed
        # random.Random takes the absolute value, and so -1 for 1.
        self.rng = random.Random(None if seed is None else seed % 2**64)

    def append(self, token_id: int) -> None:
        """Take a sampled token."""
        self.course = self.course.after(token_id, self.num_tokens, self.plan)
        self.output_token_ids.append(token_id)

    @property
    def token_ids(self) -> list[int]:
        """Prompt and output so far."""
        return self.prompt_token_ids + self.output_token_ids

    def tokens_between(self, start: int, stop: int) -> list[int]:
        """Tokens at positions start..stop-1 of prompt, output and drafts, without copying the rest."""
        num_prompt = len(self.prompt_token_ids)
        if stop <= num_prompt:
            return self.prompt_token_ids[start:stop]
        outputs = self.output_token_ids[max(0, start - num_prompt) : stop - num_prompt]
        drafts = self.draft_token_ids[: max(0, stop - self.num_tokens)]
        return self.prompt_token_ids[start:] + outputs + drafts

    def plan_runs(self, num_tokens: int) -> list[tuple[GatePlan, int]]:
        """(plan, number of tokens) of the next `num_tokens` tokens to compute, drafts included, in order."""
        start = self.num_computed_tokens
        course = self.course
        for position, token_id in enumerate(self.draft_token_ids, self.num_tokens):  # as if they had been said
            course = course.after(token_id, position, self.plan)
        return plan_runs(course.spans, self.plan, start, start + num_tokens)

    def gates_between(self, start: int, stop: int) -> list[tuple[bytes, int]]:
        """(fingerprint, number of tokens) of the plans at positions start..stop-1; empty where all follow `plan`."""
        runs = plan_runs(self.course.spans, self.plan, start, stop)
        return [] if runs == [(self.plan, stop - start)] else [(plan.fingerprint, count) for plan, count in runs]

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def forbidden_token_ids(self) -> list[int]:
        """Tokens that would end the sequence before `min_tokens`, also those that `ignore_eos` makes end nothing, as in
        vLLM: it does not say that they may come early."""
        is_early = self.num_output_tokens < self.params.min_tokens
        return [*self.params.stop_token_ids, *self.eos_token_ids] if is_early else []

    @property
    def adjusts_logits(self) -> bool:
        """Whether anything is added to its logits, or scales them, before the next token is chosen."""
        return bool(self.params.logit_bias) or self.params.is_penalised or bool(self.forbidden_token_ids)

    @property
    def is_plainly_greedy(self) -> bool:
        """Whether the next token is the greatest of its logits as they are, and nothing else is asked for."""
        return self.params.temperature == 0 and self.params.logprobs is None and not self.adjusts_logits

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED


class ScheduledSequence(NamedTuple):
    """One row of a step: compute the next `num_tokens` tokens of `sequence`, from `num_computed_tokens` on."""

    sequence: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether this step reaches the last known token, so that a new one is sampled."""
        return self.sequence.num_computed_tokens + self.num_tokens >= self.sequence.num_tokens

    @property
    def num_drafts(self) -> int:
        """How many of the tokens are guesses, the last ones."""
        return len(self.sequence.draft_token_ids)


@dataclass(frozen=True)
class ScheduledBatch:
    """What one step computes. Block tables already cover the scheduled tokens."""

    rows: tuple[ScheduledSequence, ...]
    num_preempted: int = 0
    """Sequences that lost their blocks while this batch was put together."""
    num_cached_tokens: int = 0
    """Prompt tokens that sequences admitted for the first time took from the prefix cache."""

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


class RunResult(NamedTuple):
    """What the runner returns for a `ScheduledBatch`: one output per row, in order."""

    outputs: list[StepOutput]
    routing: RoutingStats = RoutingStats()


class Runner(Protocol):
    """The seam between scheduling and the model; tests script it with a fake."""

    def run(self, batch: ScheduledBatch) -> RunResult: ...
