"""Scheduling must not show: alone = batched = chunked = preempted = served from the prefix cache, with real attention.

A tiny Llama with three adapters and a router, driven through scheduler, block pool and runner. Equal tokens: on the
torch graph in float32, on the native step in float32 and in bfloat16, where its sums never depend on the batch.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from server.engine.block_pool import BlockPool
from server.engine.drafts import Drafter
from server.engine.engine import Engine
from server.engine.graph import Graph
from server.engine.model_runner import ModelRunner
from server.engine.native_graph import NativeGraph
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.sequence import FinishReason, SamplingParams, TraceLevel
from server.engine.sequence import Sequence as EngineSequence
from server.engine.speculation import Speculation
from server.engine.torch_graph import TorchGraph
from server.model.attention import attach_paged_attention
from server.model.quantization import quantize_model
from server.native.model import NativeModel, why_not
from server.routing.attach import RoutedModel, attach_routing
from server.routing.bank import BankSnapshot, LoraWeights
from server.routing.chat_frame import ChatFrame
from server.routing.context import build_gate_batch
from server.routing.plan_course import ENDLESS, NO_COURSE, AnswerTurns, PlanCourse, PlanSpan, Turn, plan_runs
from server.routing.policy import BASE_PLAN, GatePlan, Policy, fixed_plan, routed_plan, without
from server.routing.router import ArtefactAdapter, Granularity, RouterArtefact, gate_key

DIGESTS = {1: "d1", 2: "d2", 3: "d3"}
NUM_NEW = 14


def adapter_weights(routed: RoutedModel, slot: int) -> dict[str, LoraWeights]:
    generator = torch.Generator().manual_seed(slot)
    return {
        name: LoraWeights(
            torch.randn(3 + slot, info.d_in, generator=generator) * 0.3,
            torch.randn(info.d_out, 3 + slot, generator=generator) * 0.3,
        )
        for name, info in routed.projections.items()
    }


def make_routed(model: Any, granularity: Granularity) -> RoutedModel:
    routed = attach_routing(model, num_slots=5)
    generator = torch.Generator().manual_seed(1)
    for slot in DIGESTS:
        routed.bank.publish(routed.bank.with_adapter(slot, adapter_weights(routed, slot)))
    rows = {}
    for info in routed.projections.values():
        key = gate_key(granularity, info)
        if key not in rows:
            rows[key] = torch.randn(3, info.d_in, generator=generator)
    adapters = tuple(ArtefactAdapter(digest, digest) for digest in DIGESTS.values())
    artefact = RouterArtefact("tiny", 64, 3, granularity, 2, 1.0, adapters, rows)
    routed.routers.publish(routed.routers.stage(1, artefact, {digest: slot for slot, digest in DIGESTS.items()}))
    return routed


FRAME = ChatFrame((1,), 999, line_ends=tuple((token, 1) for token in range(0, 320, 2)))
"""Every other token ends a line, so that a random model's answers have some."""
BACKENDS = [
    ("torch", torch.float32),
    ("native", torch.float32),
    ("native", torch.bfloat16),
    ("native int8", torch.bfloat16),
]


class Rig:
    """One model; every `run` gets a fresh scheduler and pool over it."""

    def __init__(
        self, model: Any, granularity: Granularity, backend: str = "torch", dtype: torch.dtype = torch.float32
    ) -> None:
        model = model.to(dtype)
        quantized = quantize_model(model) if backend == "native int8" else {}
        self.routed = make_routed(model, granularity)
        graph: Graph
        if backend.startswith("native"):
            self.block_size, num_blocks = 16, 200
            if reason := why_not(model, block_size=self.block_size):
                pytest.skip(reason)
            native = NativeModel(
                self.routed,
                block_size=self.block_size,
                num_blocks=num_blocks,
                max_positions=128,
                num_threads=2,
                quantized=quantized,
            )
            adapters = self.routed.bank
            packed = {slot: native.pack_adapter(adapter_weights(self.routed, slot)) for slot in DIGESTS}
            adapters.pack = native.pack_adapter
            adapters.publish(BankSnapshot(packed=packed))
            graph = NativeGraph(native, self.routed)
        else:
            self.block_size = 4
            attention = attach_paged_attention(model)
            device = torch.device("cpu")
            attention.allocate(num_blocks=200, block_size=self.block_size, dtype=dtype, device=device)
            graph = TorchGraph(self.routed, attention, block_size=self.block_size, device=device)
        self.runner = ModelRunner(graph, block_size=self.block_size)
        row_digests = dict(self.routed.routers.generations[1].row_digest_of_slot)
        pool = {1: "d1", 3: "d3"}
        self.plans: list[GatePlan] = [
            BASE_PLAN,
            routed_plan(DIGESTS, row_digests, 1, granularity, 2),
            fixed_plan(Policy.PINNED, {2: 1.0}, DIGESTS),
            routed_plan(pool, row_digests, 1, granularity, 1),
            fixed_plan(Policy.WEIGHTED, {1: 0.4, 3: 0.7}, DIGESTS),
        ]

    def engine(
        self, *, num_blocks: int = 200, max_num_batched_tokens: int = 512, speculative_tokens: int = 0
    ) -> Engine:
        limits = SchedulerLimits(
            max_num_seqs=16,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=128,
            prefix_caching=True,
            speculative_tokens=speculative_tokens,
        )
        return Engine(Scheduler(limits, BlockPool(num_blocks, self.block_size)), self.runner)

    def sequences(self) -> list[EngineSequence]:
        """Ten requests: every plan twice, once on a prompt that begins as the other's does. One of the two routed ones
        of each pool has a prompt gate's spans, and one turns in its answer."""
        generator = torch.Generator().manual_seed(9)
        shared = torch.randint(3, 320, (21,), generator=generator).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True)
        prompts = [shared + [5 + index] * (index % 3 + 1) for index in range(10)]
        turns = AnswerTurns(FRAME, (Turn(1, self.plans[2]), Turn(1, BASE_PLAN), Turn(1, self.plans[4])))
        pinned = fixed_plan(Policy.PINNED, {3: 1.0}, DIGESTS)
        mixture = fixed_plan(Policy.WEIGHTED, {1: 0.375, 3: 0.625}, DIGESTS)
        courses = {
            1: PlanCourse(
                (
                    PlanSpan(9, self.plans[2]),
                    PlanSpan(14, self.plans[1]),
                    PlanSpan(18, BASE_PLAN),
                    PlanSpan(ENDLESS, without(self.plans[1], [2], DIGESTS)),
                )
            ),
            6: PlanCourse(turns=turns),
            8: PlanCourse((PlanSpan(3, pinned), PlanSpan(7, mixture))),
        }
        return [
            EngineSequence(
                id=index,
                prompt_token_ids=prompt,
                params=params,
                plan=self.plans[index % len(self.plans)],
                course=courses.get(index, NO_COURSE),
            )
            for index, prompt in enumerate(prompts)
        ]


def run(engine: Engine, sequences: Sequence[EngineSequence]) -> tuple[dict[int, list[int]], int, int]:
    """Tokens per sequence, preemptions, and prompt tokens served from the cache."""
    for sequence in sequences:
        engine.add(sequence)
    tokens: dict[int, list[int]] = {sequence.id: [] for sequence in sequences}
    ends: list[int] = []
    num_preempted = num_cached = 0
    while engine.has_work:
        events, stats = engine.step()
        num_preempted += stats.num_preempted
        num_cached += stats.num_cached_tokens
        for event in events:
            tokens[event.sequence_id] += event.token_ids
            if event.finish_reason is not None:
                assert event.finish_reason is FinishReason.LENGTH
                ends.append(event.sequence_id)
    assert sorted(ends) == sorted(tokens), "each sequence ends exactly once"
    assert engine.scheduler.kv_usage_ratio == 0.0
    return tokens, num_preempted, num_cached


@pytest.mark.parametrize("granularity", ["layer", "projection"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_scheduling_never_changes_tokens(
    tiny_llama: Callable[..., Any], granularity: Granularity, backend: str, dtype: torch.dtype
) -> None:
    rig = Rig(tiny_llama(), granularity, backend, dtype)
    alone: dict[int, list[int]] = {}
    for sequence in rig.sequences():
        alone |= run(rig.engine(), [sequence])[0]
    assert len({tuple(tokens) for tokens in alone.values()}) >= 8, "plans and prompts must matter"

    batched, _, _ = run(rig.engine(), rig.sequences())
    assert batched == alone

    chunked, _, _ = run(rig.engine(max_num_batched_tokens=17), rig.sequences())
    assert chunked == alone

    preempted, num_preempted, _ = run(rig.engine(num_blocks=144 // rig.block_size), rig.sequences())
    assert num_preempted > 0
    assert preempted == alone

    engine = rig.engine()
    run(engine, rig.sequences())
    cached, _, num_cached = run(engine, rig.sequences())
    full = 20 // rig.block_size * rig.block_size
    assert num_cached >= 10 * full, "every prompt of 22 tokens or more has its full blocks in the cache"
    assert cached == alone


@pytest.mark.parametrize("granularity", ["layer", "projection"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drafts_change_no_token_no_trace_and_no_statistics(
    tiny_llama: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    granularity: Granularity,
    dtype: torch.dtype,
) -> None:
    """Drafts that know the answer and err at every fifth token: most are right up to there, across spans and turns."""
    rig = Rig(tiny_llama(), granularity, "native", dtype)

    def answers(engine: Engine, *, at_once: int) -> tuple[dict[int, Any], Counter[int], int]:
        """Tokens with their traces per sequence, gate mass over all steps, and right drafts."""
        said: dict[int, Any] = {}
        mass: Counter[int] = Counter()
        num_accepted = 0
        sequences = rig.sequences()
        for first in range(0, len(sequences), at_once):
            for sequence in sequences[first : first + at_once]:
                sequence.params = replace(sequence.params, trace_routing=TraceLevel.LAYERS)
                engine.add(sequence)
            while engine.has_work:
                events, stats = engine.step()
                num_accepted += stats.num_accepted_tokens
                mass.update(dict(stats.routing.routed_mass))
                for event in events:
                    pairs = zip(event.token_ids, event.routing, strict=True)
                    said.setdefault(event.sequence_id, []).extend(pairs)
        return said, mass, num_accepted

    expected, expected_mass, _ = answers(rig.engine(), at_once=1)

    def oracle(_: Speculation, sequence: EngineSequence, room: int) -> list[int]:
        sequence.drafter = Drafter()
        first = sequence.num_output_tokens
        ahead = [token for token, _ in expected[sequence.id][first : min(first + room, first + 6, NUM_NEW - 1)]]
        return [token if place % 5 else 7 for place, token in enumerate(ahead, first + 2)]

    monkeypatch.setattr(Speculation, "_draft", oracle)
    for at_once in (1, 3, 10):
        engine = rig.engine(speculative_tokens=6)
        for run_number in range(2):  # the second finds blocks in the cache that drafts have been written to
            said, mass, num_accepted = answers(engine, at_once=at_once)
            assert said == expected
            assert num_accepted >= (30 if at_once < 10 else 10)
            if run_number == 0 and at_once < 10:
                assert mass == pytest.approx(expected_mass, rel=1e-4)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_the_cache_is_shared_by_routed_requests_and_by_nobody_else(
    tiny_llama: Callable[..., Any], backend: str
) -> None:
    rig = Rig(tiny_llama(), "layer", backend)
    full = 20 // rig.block_size * rig.block_size
    prompt = list(range(10, 34))
    params = SamplingParams(temperature=0.0, max_tokens=1)

    def request(index: int, plan: GatePlan, salt: str | None = None) -> EngineSequence:
        return EngineSequence(id=index, prompt_token_ids=prompt, params=params, plan=plan, cache_salt=salt)

    engine = rig.engine()
    run(engine, [request(0, rig.plans[1])])
    hits = [run(engine, [request(1 + index, plan)])[2] for index, plan in enumerate(rig.plans)]
    assert hits == [0, full, 0, 0, 0], "only the request with the same effective gates may read the blocks"
    assert run(engine, [request(20, rig.plans[1], salt="tenant")])[2] == 0
    assert run(engine, [request(21, rig.plans[1], salt="tenant")])[2] == full


def reference_plans(sequence: EngineSequence, generated: Sequence[int]) -> list[GatePlan]:
    """Of each token so far: even tokens end lines, and each row of them is the next turn's."""
    spans, own = sequence.course.spans, sequence.plan
    plans = [plan for plan, count in plan_runs(spans, own, 0, sequence.num_prompt_tokens) for _ in range(count)]
    waiting = [turn.plan for turn in sequence.course.turns.waiting]
    current = own = sequence.course.plan_at(sequence.num_prompt_tokens, own)
    for before, token in pairwise([1, *generated]):
        if token % 2 == 0 and before % 2 == 1:
            current = waiting.pop(0) if waiting else own
        plans.append(current if token % 2 == 0 else own)
    return plans


@pytest.mark.parametrize("index", [1, 6], ids=["spans", "turns"])
@pytest.mark.parametrize("granularity", ["layer", "projection"])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_a_course_is_gates_per_token(
    tiny_llama: Callable[..., Any], backend: str, granularity: Granularity, index: int
) -> None:
    """Against the bare routed model without any cache, each token under its own plan."""
    reference = make_routed(tiny_llama(), granularity)
    rig = Rig(tiny_llama(), granularity, backend)
    guided = rig.sequences()[index]
    tokens = list(guided.prompt_token_ids)
    for _ in range(NUM_NEW):
        plans = reference_plans(guided, tokens[guided.num_prompt_tokens :])
        gates = build_gate_batch(
            plans, torch.arange(len(plans)), bank=reference.bank.snapshot, routers=reference.routers
        )
        with torch.inference_mode(), reference.context.running(gates):
            logits = reference.model(input_ids=torch.tensor([tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
    served, _, _ = run(rig.engine(), [guided])
    assert served[index] == tokens[-NUM_NEW:]
    unguided = rig.sequences()[index]
    unguided.course = NO_COURSE
    assert run(rig.engine(), [unguided])[0] != served, "the course must matter"


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_blocks_are_shared_as_far_as_spans_agree(tiny_llama: Callable[..., Any], backend: str) -> None:
    rig = Rig(tiny_llama(), "layer", backend)
    size = rig.block_size
    prompt = list(range(10, 10 + 3 * size + 2))
    plan, pinned = rig.plans[1], rig.plans[2]
    params = SamplingParams(temperature=0.0, max_tokens=1)
    engine = rig.engine()

    def hits(index: int, *spans: PlanSpan) -> int:
        sequence = EngineSequence(id=index, prompt_token_ids=prompt, params=params, plan=plan, course=PlanCourse(spans))
        return run(engine, [sequence])[2]

    assert hits(0, PlanSpan(size, pinned)) == 0
    assert hits(1, PlanSpan(size, pinned)) == 3 * size
    assert hits(2, PlanSpan(size + 1, pinned)) == size, "the first block has the same gates, the second has not"
    assert hits(3) == 0
    assert hits(4, PlanSpan(2 * size, plan), PlanSpan(2 * size + 1, pinned)) == 2 * size, (
        "spans of the own plan are none"
    )


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_registering_another_adapter_keeps_the_cache_and_the_tokens(
    tiny_llama: Callable[..., Any], backend: str, dtype: torch.dtype
) -> None:
    rig = Rig(tiny_llama(), "layer", backend, dtype)
    engine = rig.engine()
    before, _, _ = run(engine, rig.sequences())
    info = next(iter(rig.routed.projections.values()))
    newcomer = {info.name: LoraWeights(torch.ones(2, info.d_in), torch.ones(info.d_out, 2))}
    rig.routed.bank.publish(rig.routed.bank.with_adapter(4, newcomer))
    after, _, num_cached = run(engine, rig.sequences())
    assert after == before
    assert num_cached >= 10 * (20 // rig.block_size * rig.block_size)
