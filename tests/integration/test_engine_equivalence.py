"""Scheduling must not show: alone = batched = chunked = preempted = served from the prefix cache, with real attention.

A tiny Llama with three adapters and a router, driven through scheduler, block pool and runner; fp32, equal tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from server.engine.block_pool import BlockPool
from server.engine.engine import Engine
from server.engine.model_runner import ModelRunner
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.sequence import FinishReason, SamplingParams
from server.engine.sequence import Sequence as EngineSequence
from server.model.attention import attach_paged_attention
from server.routing.attach import RoutedModel, attach_routing
from server.routing.bank import LoraWeights
from server.routing.policy import BASE_PLAN, GatePlan, Policy, fixed_plan, routed_plan
from server.routing.router import ArtefactAdapter, Granularity, RouterArtefact, gate_key

BLOCK_SIZE = 4
DIGESTS = {1: "d1", 2: "d2", 3: "d3"}
NUM_NEW = 14


def make_routed(model: Any, granularity: Granularity) -> RoutedModel:
    routed = attach_routing(model, num_slots=5)
    generator = torch.Generator().manual_seed(1)
    for slot in DIGESTS:
        weights = {
            name: LoraWeights(
                torch.randn(3 + slot, info.d_in, generator=generator) * 0.3,
                torch.randn(info.d_out, 3 + slot, generator=generator) * 0.3,
            )
            for name, info in routed.projections.items()
        }
        routed.bank.publish(routed.bank.with_adapter(slot, weights))
    rows = {}
    for info in routed.projections.values():
        key = gate_key(granularity, info)
        if key not in rows:
            rows[key] = torch.randn(3, info.d_in, generator=generator)
    adapters = tuple(ArtefactAdapter(digest, digest) for digest in DIGESTS.values())
    artefact = RouterArtefact("tiny", 64, 3, granularity, 2, 1.0, adapters, rows)
    routed.routers.publish(routed.routers.stage(1, artefact, {digest: slot for slot, digest in DIGESTS.items()}))
    return routed


class Rig:
    """One model; every `run` gets a fresh scheduler and pool over it."""

    def __init__(self, model: Any, granularity: Granularity) -> None:
        self.routed = make_routed(model, granularity)
        attention = attach_paged_attention(model)
        device = torch.device("cpu")
        attention.allocate(num_blocks=200, block_size=BLOCK_SIZE, dtype=torch.float32, device=device)
        self.runner = ModelRunner(self.routed, attention, block_size=BLOCK_SIZE, device=device)
        row_digests = dict(self.routed.routers.generations[1].row_digest_of_slot)
        pool = {1: "d1", 3: "d3"}
        self.plans: list[GatePlan] = [
            BASE_PLAN,
            routed_plan(DIGESTS, row_digests, 1, granularity, 2),
            fixed_plan(Policy.PINNED, {2: 1.0}, DIGESTS),
            routed_plan(pool, row_digests, 1, granularity, 1),
            fixed_plan(Policy.WEIGHTED, {1: 0.4, 3: 0.7}, DIGESTS),
        ]

    def engine(self, *, num_blocks: int = 200, max_num_batched_tokens: int = 512) -> Engine:
        limits = SchedulerLimits(
            max_num_seqs=16, max_num_batched_tokens=max_num_batched_tokens, max_model_len=128, prefix_caching=True
        )
        return Engine(Scheduler(limits, BlockPool(num_blocks, BLOCK_SIZE)), self.runner)

    def sequences(self) -> list[EngineSequence]:
        """Ten requests: every plan twice, once on a prompt that begins as the other's does."""
        generator = torch.Generator().manual_seed(9)
        shared = torch.randint(3, 320, (21,), generator=generator).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True)
        prompts = [shared + [5 + index] * (index % 3 + 1) for index in range(10)]
        return [
            EngineSequence(id=index, prompt_token_ids=prompt, params=params, plan=self.plans[index % len(self.plans)])
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
def test_scheduling_never_changes_tokens(tiny_llama: Callable[..., Any], granularity: Granularity) -> None:
    rig = Rig(tiny_llama(), granularity)
    alone: dict[int, list[int]] = {}
    for sequence in rig.sequences():
        alone |= run(rig.engine(), [sequence])[0]
    assert len({tuple(tokens) for tokens in alone.values()}) >= 8, "plans and prompts must matter"

    batched, _, _ = run(rig.engine(), rig.sequences())
    assert batched == alone

    chunked, _, _ = run(rig.engine(max_num_batched_tokens=17), rig.sequences())
    assert chunked == alone

    preempted, num_preempted, _ = run(rig.engine(num_blocks=36), rig.sequences())
    assert num_preempted > 0
    assert preempted == alone

    engine = rig.engine()
    run(engine, rig.sequences())
    cached, _, num_cached = run(engine, rig.sequences())
    assert num_cached >= 10 * 20, "every prompt of 22 tokens or more has five full blocks in the cache"
    assert cached == alone


def test_the_cache_is_shared_by_routed_requests_and_by_nobody_else(tiny_llama: Callable[..., Any]) -> None:
    rig = Rig(tiny_llama(), "layer")
    prompt = list(range(10, 34))
    params = SamplingParams(temperature=0.0, max_tokens=1)

    def request(index: int, plan: GatePlan, salt: str | None = None) -> EngineSequence:
        return EngineSequence(id=index, prompt_token_ids=prompt, params=params, plan=plan, cache_salt=salt)

    engine = rig.engine()
    run(engine, [request(0, rig.plans[1])])
    hits = [run(engine, [request(1 + index, plan)])[2] for index, plan in enumerate(rig.plans)]
    assert hits == [0, 20, 0, 0, 0], "only the request with the same effective gates may read the blocks"
    assert run(engine, [request(20, rig.plans[1], salt="tenant")])[2] == 0
    assert run(engine, [request(21, rig.plans[1], salt="tenant")])[2] == 20


def test_registering_another_adapter_keeps_the_cache_and_the_tokens(tiny_llama: Callable[..., Any]) -> None:
    rig = Rig(tiny_llama(), "layer")
    engine = rig.engine()
    before, _, _ = run(engine, rig.sequences())
    info = next(iter(rig.routed.projections.values()))
    newcomer = {info.name: LoraWeights(torch.ones(2, info.d_in), torch.ones(info.d_out, 2))}
    rig.routed.bank.publish(rig.routed.bank.with_adapter(4, newcomer))
    after, _, num_cached = run(engine, rig.sequences())
    assert after == before
    assert num_cached >= 10 * 20
