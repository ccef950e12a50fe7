"""The runner on tiny models of several architectures, held to transformers' own `generate` and forward."""

from collections.abc import Callable
from collections.abc import Sequence as ListLike
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import nn

from server.engine.graph import GraphOutput
from server.engine.layout import StepLayout
from server.engine.model_runner import ModelRunner
from server.engine.packing import pad_tokens
from server.engine.sequence import SamplingParams, ScheduledBatch, ScheduledSequence, Sequence, TraceLevel
from server.engine.step_stats import RoutingStats
from server.engine.torch_graph import TorchGraph
from server.errors import ModelLoadError
from server.model.attention import PagedAttention, attach_paged_attention
from server.routing.attach import RoutedModel, attach_routing
from server.routing.bank import LoraWeights
from server.routing.plan_course import ENDLESS, PlanCourse, PlanSpan
from server.routing.policy import BASE_PLAN, GatePlan, Policy, fixed_plan, routed_plan
from tests.adapters.harness import artefact_for

BLOCK_SIZE = 4
CPU = torch.device("cpu")
PROMPT = torch.randint(3, 320, (20,), generator=torch.Generator().manual_seed(5)).tolist()
NUM_NEW = 12
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "vocab_size": 320,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}


class Setup(NamedTuple):
    runner: ModelRunner
    routed: RoutedModel
    attention: PagedAttention


def make_setup(model: nn.Module) -> Setup:
    routed = attach_routing(model, num_slots=4)
    attention = attach_paged_attention(model)  # type: ignore[arg-type]
    attention.allocate(num_blocks=64, block_size=BLOCK_SIZE, dtype=torch.float32, device=CPU)
    for slot in (1, 2):
        generator = torch.Generator().manual_seed(slot)
        weights = {
            name: LoraWeights(
                torch.randn(4 * slot, info.d_in, generator=generator) * 0.3,
                torch.randn(info.d_out, 4 * slot, generator=generator) * 0.3,
            )
            for name, info in routed.projections.items()
        }
        routed.bank.publish(routed.bank.with_adapter(slot, weights))
    graph = TorchGraph(routed, attention, block_size=BLOCK_SIZE, device=CPU)
    return Setup(ModelRunner(graph, block_size=BLOCK_SIZE), routed, attention)


def make_sequence(first_block: int, prompt: list[int] = PROMPT, plan: GatePlan = BASE_PLAN, **params: Any) -> Sequence:
    params = {"temperature": 0.0, "max_tokens": NUM_NEW, **params}
    sequence = Sequence(id=first_block, prompt_token_ids=list(prompt), params=SamplingParams(**params), plan=plan)
    sequence.block_table = list(range(first_block, first_block + 10))
    return sequence


def generate(runner: ModelRunner, *sequences: Sequence, chunk: int = 100) -> list[Any]:
    """Run all sequences together until each has its tokens; returns the sampling outputs of the first."""
    outputs = []
    while pending := [s for s in sequences if s.num_output_tokens < s.params.max_tokens]:
        rows = tuple(ScheduledSequence(s, min(chunk, s.num_uncomputed_tokens)) for s in pending)
        result = runner.run(ScheduledBatch(rows))
        for row, output in zip(rows, result.outputs, strict=True):
            row.sequence.num_computed_tokens += row.num_tokens
            row.sequence.output_token_ids += output.token_ids
            if output.token_ids and row.sequence is sequences[0]:
                outputs.append(output)
    return outputs


def architectures() -> dict[str, Callable[[], nn.Module]]:
    t = transformers
    gpt2: dict[str, Any] = {
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 3,
        "vocab_size": 320,
        "n_positions": 256,
        "initializer_range": 0.2,
    }
    ids: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**GROUPED)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**gpt2, **ids)),
        "mistral with a sliding window": lambda: t.MistralForCausalLM(t.MistralConfig(sliding_window=6, **GROUPED)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(head_dim=16, **GROUPED)),
        "phi": lambda: t.PhiForCausalLM(t.PhiConfig(**GROUPED)),
        "gpt-neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SIZES)),
    }


@pytest.mark.parametrize("name", architectures())
def test_whole_chunked_and_token_by_token_prefill_equal_generate(name: str) -> None:
    torch.manual_seed(0)
    model: Any = architectures()[name]().eval().requires_grad_(False)
    reference = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None
    )
    expected = reference[0, len(PROMPT) :].tolist()
    runner, _, _ = make_setup(model)
    for chunk in (100, 7, 1):
        sequence = make_sequence(1)
        generate(runner, sequence, chunk=chunk)
        assert sequence.output_token_ids == expected, f"chunks of {chunk}"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(head_dim=16, **GROUPED)), "softcap"),
        (
            lambda: transformers.LlamaForCausalLM(
                transformers.LlamaConfig(
                    **GROUPED, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
                )
            ),
            "dynamic",
        ),
    ],
)
def test_architectures_that_cannot_be_served_are_refused_by_name(model: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        attach_paged_attention(model().eval())  # type: ignore[arg-type]


def test_base_policy_is_the_bare_model_bit_for_bit(tiny_llama: Callable[..., Any]) -> None:
    """64 tokens are a bucket of their own, so both runs make the same kernel calls."""
    prompt = torch.randint(3, 320, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    model = tiny_llama()
    with torch.no_grad():
        expected = model(torch.tensor([prompt]), use_cache=False, logits_to_keep=1).logits[0, 0]
    setup = make_setup(model)
    seen: list[torch.Tensor] = []
    model.register_forward_hook(lambda *arguments: seen.append(arguments[2].logits[0, -1].clone()))
    sequence = make_sequence(1, prompt)
    sequence.block_table = list(range(1, 18))
    setup.runner.run(ScheduledBatch((ScheduledSequence(sequence, 64),)))
    assert torch.equal(seen[0], expected)


def test_mixed_policies_alone_equal_batched(tiny_llama: Callable[..., Any]) -> None:
    digests = {1: "a", 2: "b"}
    plans = [
        BASE_PLAN,
        fixed_plan(Policy.PINNED, {1: 1.0}, digests),
        fixed_plan(Policy.WEIGHTED, {1: 0.4, 2: 0.8}, digests),
    ]
    runner, _, _ = make_setup(tiny_llama())
    alone = []
    for plan in plans:
        sequence = make_sequence(1, plan=plan)
        generate(runner, sequence)
        alone.append(sequence.output_token_ids)
    assert len({tuple(tokens) for tokens in alone}) == 3, "the adapters must matter for this test to mean anything"
    together = [
        make_sequence(1 + 10 * index, PROMPT, plan, max_tokens=NUM_NEW - index) for index, plan in enumerate(plans)
    ]
    generate(runner, *together, chunk=6)
    for index, sequence in enumerate(together):
        assert sequence.output_token_ids == alone[index][: NUM_NEW - index]


def test_prompt_logprobs_equal_the_models_own_in_any_chunking(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([PROMPT])).logits[0].float(), dim=-1)
    runner, _, _ = make_setup(model)
    for chunk in (100, 6, 1):
        sequence = make_sequence(1, prompt_logprobs=2, max_tokens=0)
        sequence.prompt_logprobs = [None]
        while sequence.num_uncomputed_tokens:
            row = ScheduledSequence(sequence, min(chunk, sequence.num_uncomputed_tokens))
            (output,) = runner.run(ScheduledBatch((row,))).outputs
            sequence.prompt_logprobs += output.prompt_logprobs
            sequence.num_computed_tokens += row.num_tokens
        assert len(sequence.prompt_logprobs) == len(PROMPT)
        for position, entry in enumerate(sequence.prompt_logprobs[1:], start=1):
            assert entry is not None
            assert entry.token_id == PROMPT[position]
            assert entry.logprob == pytest.approx(logprobs[position - 1, PROMPT[position]].item(), abs=1e-4)
            assert entry.top[0][1] == pytest.approx(logprobs[position - 1].max().item(), abs=1e-4)
            assert len(entry.top) == 2


def test_traces_and_stats_report_fixed_weights(tiny_llama: Callable[..., Any]) -> None:
    runner, routed, _ = make_setup(tiny_llama())
    plan = fixed_plan(Policy.WEIGHTED, {1: 0.4, 2: 0.8}, {1: "a", 2: "b"})
    traced = make_sequence(1, plan=plan, trace_routing=TraceLevel.LAYERS, max_tokens=2)
    base = make_sequence(20, trace_routing=TraceLevel.SUMMARY, max_tokens=2)
    outputs = generate(runner, traced, base)
    weights = pytest.approx({2: 0.8, 1: 0.4})
    for output in outputs:
        (trace,) = output.routing
        assert dict(trace.share) == weights
        assert len(trace.layers) == routed.num_layers
        assert dict(trace.layers[0]) == weights
    result = runner.run(ScheduledBatch((ScheduledSequence(traced, 1), ScheduledSequence(base, 1))))
    assert [trace.share for trace in result.outputs[1].routing] == [((0, 1.0),)]
    assert dict(result.routing.gate_mass) == weights
    assert result.routing.entropies == (), "only routed tokens have an entropy"


def test_a_trace_shows_what_a_prompt_gate_decided_about_a_token(tiny_llama: Callable[..., Any]) -> None:
    """The first token comes from the prompt's last position, which the gate may have given to one adapter."""
    runner, routed, _ = make_setup(tiny_llama())
    digests = {slot: f"adapter-{slot}" for slot in (1, 2)}
    artefact = artefact_for(routed, [(digest, digest) for digest in digests.values()])
    routed.routers.publish(routed.routers.stage(1, artefact, {digest: slot for slot, digest in digests.items()}))
    plan = routed_plan(digests, digests, 1, "layer", 2)
    alone = fixed_plan(Policy.PINNED, {2: 1.0}, digests)

    def traces(*spans: PlanSpan) -> list[Any]:
        sequence = make_sequence(1, plan=plan, trace_routing=TraceLevel.LAYERS, max_tokens=2)
        sequence.course = PlanCourse(spans)
        return [trace for output in generate(runner, sequence) for trace in output.routing]

    first, second = traces(PlanSpan(len(PROMPT), alone))
    assert first.share == ((2, 1.0),)
    assert set(first.layers) == {((2, 1.0),)}
    assert len(second.share) == 2
    assert all(len(layer) == 2 for layer in second.layers)
    assert [trace.share for trace in traces(PlanSpan(ENDLESS, alone))] == [((2, 1.0),)] * 2
    first, second = traces(PlanSpan(len(PROMPT), BASE_PLAN))
    assert first.share == ((0, 1.0),)
    assert set(first.layers) == {((0, 1.0),)}


def test_mass_is_routed_where_the_router_had_a_choice(tiny_llama: Callable[..., Any]) -> None:
    runner, routed, _ = make_setup(tiny_llama())
    digests = {slot: f"adapter-{slot}" for slot in (1, 2)}
    artefact = artefact_for(routed, [(digest, digest) for digest in digests.values()])
    routed.routers.publish(routed.routers.stage(1, artefact, {digest: slot for slot, digest in digests.items()}))

    def plan(*slots: int) -> GatePlan:
        return routed_plan({slot: digests[slot] for slot in slots}, digests, 1, "layer", 2)

    rows = [
        make_sequence(1, plan=plan(1, 2), max_tokens=2),
        make_sequence(20, plan=plan(2), max_tokens=2),
        make_sequence(40, plan=fixed_plan(Policy.PINNED, {1: 1.0}, digests), max_tokens=2),
        make_sequence(60, max_tokens=2),
    ]
    for count in range(1, len(rows) + 1):
        for row in rows[:count]:
            row.num_computed_tokens = 0
        stats = runner.run(ScheduledBatch(tuple(ScheduledSequence(row, 4) for row in rows[:count]))).routing
        assert sum(mass for _, mass in stats.routed_mass) == pytest.approx(4.0, abs=1e-5)
        assert len(stats.entropies) == 4 * min(count, 2)
        assert sum(mass for _, mass in stats.gate_mass) == pytest.approx(4.0 * min(count, 3), abs=1e-5)
    rows[1].num_computed_tokens = 0
    without_choice = runner.run(ScheduledBatch((ScheduledSequence(rows[1], 4),))).routing
    assert dict(without_choice.gate_mass) == pytest.approx({2: 4.0})
    assert without_choice.routed_mass == ()
    rows[0].num_computed_tokens = 0
    rows[0].course = PlanCourse((PlanSpan(2, fixed_plan(Policy.PINNED, {2: 1.0}, digests)),))
    guided = runner.run(ScheduledBatch((ScheduledSequence(rows[0], 4),))).routing
    assert sum(mass for _, mass in guided.routed_mass) == pytest.approx(4.0), "a prompt gate is part of its router"
    assert dict(guided.routed_mass)[2] >= 2.0
    assert len(guided.entropies) == 2, "what the prompt gate decided has no entropy"
    rows[0].num_computed_tokens = 0
    rows[0].course = PlanCourse((PlanSpan(3, BASE_PLAN),))
    nobodys = runner.run(ScheduledBatch((ScheduledSequence(rows[0], 4), ScheduledSequence(rows[3], 4)))).routing
    assert dict(nobodys.routed_mass)[0] == 3.0, "the prompt gate's tokens for the base model, not a base request's"
    assert sum(mass for _, mass in nobodys.routed_mass) == pytest.approx(4.0)
    rows[0].num_computed_tokens = 0
    rows[0].course = PlanCourse((PlanSpan(ENDLESS, BASE_PLAN),))
    whole = runner.run(ScheduledBatch((ScheduledSequence(rows[0], 4),))).routing
    assert whole == RoutingStats((), (), ((0, 4.0),)), "no adapter acts anywhere in the step"


def test_tokens_computed_again_after_a_preemption_are_in_no_routing_total(tiny_llama: Callable[..., Any]) -> None:
    runner, routed, _ = make_setup(tiny_llama())
    digests = {slot: f"adapter-{slot}" for slot in (1, 2)}
    artefact = artefact_for(routed, [(digest, digest) for digest in digests.values()])
    routed.routers.publish(routed.routers.stage(1, artefact, {digest: slot for slot, digest in digests.items()}))
    rows = [make_sequence(first, plan=routed_plan(digests, digests, 1, "layer", 2), max_tokens=2) for first in (1, 20)]
    rows[0].num_counted_tokens = 3
    stats = runner.run(ScheduledBatch(tuple(ScheduledSequence(row, 4) for row in rows))).routing
    assert sum(mass for _, mass in stats.gate_mass) == pytest.approx(1 + 4, abs=1e-5)
    assert sum(mass for _, mass in stats.routed_mass) == pytest.approx(1 + 4, abs=1e-5)
    assert len(stats.entropies) == 1 + 4


@pytest.mark.parametrize("left", [0, 1], ids=["whole", "all but its end"])
def test_a_row_that_is_not_finite_fails_alone_and_its_blocks_are_cleaned(
    tiny_llama: Callable[..., Any], left: int
) -> None:
    """In the step that poisons it, also where no token of it is sampled yet."""
    model = tiny_llama()
    poison = 319
    model.model.embed_tokens.weight[poison] = torch.nan
    prompt = [token for token in PROMPT if token != poison]
    runner, _, attention = make_setup(model)
    bad, good, expected = (
        make_sequence(1, [*prompt, poison, 5, 6]),
        make_sequence(20, prompt),
        make_sequence(40, prompt),
    )
    rows = tuple(ScheduledSequence(sequence, sequence.num_prompt_tokens - left) for sequence in (bad, good, expected))
    outputs = runner.run(ScheduledBatch(rows)).outputs
    assert outputs[0].token_ids == ()
    assert outputs[0].error is not None
    assert outputs[1].error is None
    assert outputs[1].token_ids == outputs[2].token_ids
    assert (not outputs[1].token_ids) == bool(left)
    assert attention.cache is not None
    for tensor in (*attention.cache.keys.values(), *attention.cache.values.values()):
        assert torch.isfinite(tensor).all()


def test_blocks_that_a_poisoned_row_only_reads_stay_as_they_are(tiny_llama: Callable[..., Any]) -> None:
    """They may be the prefix cache's, which others read."""
    model = tiny_llama()
    poison = 319
    model.model.embed_tokens.weight[poison] = torch.nan
    prompt = [token for token in PROMPT if token != poison][: 2 * BLOCK_SIZE]
    runner, _, attention = make_setup(model)
    runner.run(ScheduledBatch((ScheduledSequence(make_sequence(1, prompt), len(prompt)),)))
    assert attention.cache is not None
    before = attention.cache.keys[0][1:3].clone()
    bad = make_sequence(1, [*prompt, poison, 5])
    bad.num_computed_tokens = len(prompt)
    (output,) = runner.run(ScheduledBatch((ScheduledSequence(bad, 2),))).outputs
    assert output.error is not None
    assert torch.equal(attention.cache.keys[0][1:3], before)


class AskedGraph:
    """A graph that notes at which positions logits were wanted, and where only whether all is finite."""

    num_layers = 3

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], list[int]]] = []

    def forward(
        self, layout: StepLayout, positions: ListLike[int], *, checks: ListLike[int] = (), collect_layers: bool
    ) -> GraphOutput:
        del layout, collect_layers
        self.asked.append((list(positions), list(checks)))
        finite = torch.ones(len(checks), dtype=torch.bool) if checks else None
        return GraphOutput(torch.zeros(len(positions), 320), None, finite=finite)

    def clear(self, blocks: ListLike[int]) -> None:
        raise AssertionError(f"nothing is poisoned, but {blocks} are cleared")


def test_logits_are_computed_where_a_token_is_sampled_or_scored_and_nowhere_else() -> None:
    graph = AskedGraph()
    runner = ModelRunner(graph, block_size=BLOCK_SIZE)
    whole, begun, scored = make_sequence(1), make_sequence(20), make_sequence(40, prompt_logprobs=1)
    rows = (ScheduledSequence(whole, 20), ScheduledSequence(begun, 5), ScheduledSequence(scored, 3))
    outputs = runner.run(ScheduledBatch(rows)).outputs
    assert graph.asked == [([19, 25, 26, 27, 27], [24])]
    assert [output.token_ids for output in outputs] == [(0,), (), ()]
    assert len(outputs[2].prompt_logprobs) == 3
    runner.run(ScheduledBatch((ScheduledSequence(begun, 5),)))
    assert graph.asked[1:] == [([], [4])], "a step of nothing but beginnings"


class PoisonedGraph(AskedGraph):
    """What it says at the last position is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.cleared: list[int] = []

    def forward(
        self, layout: StepLayout, positions: ListLike[int], *, checks: ListLike[int] = (), collect_layers: bool
    ) -> GraphOutput:
        output = super().forward(layout, positions, checks=checks, collect_layers=collect_layers)
        output.logits[-1] = torch.nan
        return output

    def clear(self, blocks: ListLike[int]) -> None:
        self.cleared += blocks


def test_a_row_fails_where_what_is_said_under_a_draft_is_not_finite() -> None:
    """Though the token before it is as right as ever: the draft's K/V is in the cache, which others may read."""
    graph = PoisonedGraph()
    sequence = make_sequence(1, PROMPT)
    sequence.num_computed_tokens = sequence.num_tokens - 1
    sequence.draft_token_ids = [5]
    row = ScheduledSequence(sequence, 2)
    (output,) = ModelRunner(graph, block_size=BLOCK_SIZE).run(ScheduledBatch((row,))).outputs
    assert (output.error is not None, output.token_ids) == (True, ())
    assert graph.cleared


def test_buckets_hold_what_they_are_asked_to() -> None:
    for num_tokens in range(1, 400):
        assert num_tokens <= pad_tokens(num_tokens) < num_tokens + 64
