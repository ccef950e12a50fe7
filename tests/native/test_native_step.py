"""The native step, held to the torch graph and to transformers: numbers, gates, and independence of the batch."""

import copy
import dataclasses
import functools
import gc
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from server.engine.layout import lay_out
from server.engine.native_graph import NativeGraph
from server.engine.sequence import ScheduledBatch, ScheduledSequence
from server.errors import AdapterMemoryError, OverloadedError
from server.native.library import libraries
from server.native.model import NativeModel, why_not
from server.native.routers import NativeRouter
from server.routing.attach import attach_routing
from server.routing.policy import BASE_PLAN, GatePlan, Policy, fixed_plan, routed_plan
from server.routing.prototypes import GateColumn, HotRow
from server.routing.router import ArtefactAdapter, Granularity
from tests.native import rig

pytestmark = pytest.mark.skipif(not libraries(), reason="no native library was built, or none fits this CPU")

PROMPT = torch.randint(3, 300, (70,), generator=torch.Generator().manual_seed(5)).tolist()
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "vocab_size": 320,
    "initializer_range": 0.2,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def llama(**overrides: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **overrides}))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "grouped heads": llama,
    "one K/V head for 16": lambda: llama(num_attention_heads=16, num_key_value_heads=1, head_dim=16),
    "as many K/V heads": lambda: llama(num_key_value_heads=4, head_dim=32),
    "odd widths": lambda: llama(hidden_size=72, intermediate_size=100, vocab_size=333, head_dim=16),
    "tied head": lambda: llama(tie_word_embeddings=True),
    "biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama3 rope": lambda: llama(rope_parameters=LLAMA3_ROPE),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SIZES, sliding_window=None, head_dim=16)
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),
}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def ready(model: nn.Module) -> Any:
    """Frozen, with biases that are not zero."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers_own(name: str) -> None:
    """fp32: both sum the same products in another order; logits reach about 30."""
    model = ready(MODELS[name]())
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0]
    for library in libraries():
        found = rig.prefill(rig.native_side(model, library=library), PROMPT, [len(PROMPT)])
        assert (found - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("head_dim", [16, 64])
def test_scores_that_outgrow_those_of_the_keys_before(head_dim: int) -> None:
    """Weights are relative to the first keys' greatest score, and are rescaled before powers of two might overflow."""
    model = ready(llama(head_dim=head_dim, num_hidden_layers=1))
    attention = model.model.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight.mul_(8)  # scores of hundreds
    prompt = (PROMPT * 3)[:160]
    rounded = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        single, low = (side(torch.tensor([prompt])).logits[0] for side in (model, rounded))
        exact, exact_low = (copy.deepcopy(side).double()(torch.tensor([prompt])).logits[0] for side in (model, rounded))
    for library in libraries():
        native, native_low = (
            rig.prefill(rig.native_side(side, library=library), prompt, [97, 63]) for side in (model, rounded)
        )
        assert (native - exact).abs().max() < 3 * (single - exact).abs().max()
        assert (native_low - exact_low).square().mean() < (low - exact_low).square().mean()


def test_bfloat16_is_nearer_to_float32_than_the_torch_graph() -> None:
    model = ready(llama(num_hidden_layers=6))
    rounded = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        exact = copy.deepcopy(rounded).float()(torch.tensor([PROMPT])).logits[0]  # the same weights in float32
        graph = rounded(torch.tensor([PROMPT])).logits[0].float()
    for library in libraries():
        native = rig.prefill(rig.native_side(rounded, library=library), PROMPT, [len(PROMPT)])
        assert (native - exact).square().mean() < (graph - exact).square().mean()


@pytest.mark.parametrize(("head_dim", "block_size"), [(16, 16), (64, 32), (96, 16)])
def test_bfloat16_with_adapters_is_nearer_to_float32_than_the_torch_graph(head_dim: int, block_size: int) -> None:
    """Heads that the matrix unit can and cannot take whole, and ranks below, at and above its tiles."""
    model = ready(llama(head_dim=head_dim)).bfloat16()
    exact, graph = rig.torch_side(copy.deepcopy(model).float()), rig.torch_side(model)
    digests = {slot: f"d{slot}" for slot in rig.RANKS}
    plans = [fixed_plan(Policy.PINNED, {slot: 1.0}, digests) for slot in rig.RANKS]
    plans.append(fixed_plan(Policy.WEIGHTED, {1: 0.4, 2: 1.0, 4: 0.7}, digests))
    rig.equip(exact, {})
    rig.equip(graph, {})
    for library in libraries():
        native = rig.native_side(model, library=library, block_size=block_size)
        rig.equip(native, {})
        for plan in plans:
            expected, theirs, ours = (rig.prefill(side, PROMPT, [61, 9], plan) for side in (exact, graph, native))
            assert (ours - expected).square().mean() < (theirs - expected).square().mean()


@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_batches_and_threads_change_no_bit(dtype: torch.dtype, head_dim: int) -> None:
    model = ready(llama(head_dim=head_dim)).to(dtype)
    artefact = rig.random_artefact(attach_routing(copy.deepcopy(model), num_slots=rig.NUM_SLOTS), "layer")
    plans = plans_over({slot: f"r{slot}" for slot in range(5)})
    for library in libraries():
        alone, team = (rig.native_side(model, num_threads=threads, library=library) for threads in (1, 2))
        for side in (alone, team):
            rig.equip(side, {1: artefact})
        for plan in plans:
            whole = rig.prefill(alone, PROMPT, [70], plan)
            assert torch.equal(rig.prefill(team, PROMPT, [70], plan), whole)
            assert torch.equal(rig.prefill(team, PROMPT, [17, 1, 1, 40, 11], plan), whole)
            assert torch.equal(rig.prefill(alone, PROMPT, [1] * 70, plan), whole)
        mixed = [rig.make_sequence(PROMPT, 1 + 10 * index, plan) for index, plan in enumerate(plans)]
        logits = rig.step(team, [(sequence, 70) for sequence in mixed]).logits
        together = [logits[start : start + 70] for start in range(0, len(logits), 70)]
        for plan, found in zip(plans, together, strict=True):
            assert torch.equal(found, rig.prefill(alone, PROMPT, [70], plan))


def plans_over(row_digests: dict[int, str]) -> list[GatePlan]:
    digests = {0: "base", **{slot: f"d{slot}" for slot in rig.RANKS}}
    pool = {1: "d1", 4: "d4"}
    return [
        BASE_PLAN,
        routed_plan(digests, row_digests, 1, "", 2),
        fixed_plan(Policy.PINNED, {3: 1.0}, digests),
        routed_plan(pool, row_digests, 1, "", 1),
        routed_plan(digests, row_digests, 1, "", 5),
        fixed_plan(Policy.WEIGHTED, {1: 0.4, 2: 2.0, 4: 0.7}, digests),
    ]


TARGETS = {1: ["q_proj", "v_proj"], 2: ["gate_proj", "up_proj", "down_proj"], 4: ["o_proj", "k_proj"]}


@pytest.mark.parametrize("targets", [None, TARGETS], ids=["all targets", "some targets"])
@pytest.mark.parametrize("granularity", ["layer", "projection"])
def test_mixed_batches_have_the_torch_graphs_logits_and_gates(
    granularity: Granularity, targets: dict[int, list[str]] | None
) -> None:
    """fp32, all policies and two routers of different granularity in one batch; prompt and decoding.

    Router logits reach 10 here, and three layers of roundings stand before the last.
    """
    model = ready(llama(head_dim=16))
    other: Granularity = "projection" if granularity == "layer" else "layer"
    sides = [rig.torch_side(model, 128), rig.native_side(model, 128)]
    routers = {
        1: rig.random_artefact(sides[0].routed, granularity, skip_layers=1, temperature=0.7),
        2: rig.random_artefact(sides[0].routed, other, seed=2),
    }
    row_digests = {slot: f"r{slot}" for slot in range(5)}
    second = routed_plan({slot: f"d{slot}" for slot in rig.RANKS}, row_digests, 2, "", 3)
    plans = [*plans_over(row_digests), second]
    results = []
    for side in sides:
        rig.equip(side, routers, targets)
        sequences = [rig.make_sequence(PROMPT[index:], 1 + 10 * index, plan) for index, plan in enumerate(plans)]
        outputs = [
            rig.step(side, [(sequence, 30 + index) for index, sequence in enumerate(sequences)], collect_layers=True),
            rig.step(side, [(sequence, 1) for sequence in sequences], collect_layers=True),
        ]
        results.append(outputs)
    for expected, found in zip(*results, strict=True):
        num_tokens = found.logits.shape[0]
        assert (found.logits - expected.logits).abs().max() < 2e-4 * expected.logits.abs().max()
        assert expected.gates is not None
        assert found.gates is not None
        torch.testing.assert_close(found.gates.share, expected.gates.share[:num_tokens], atol=1e-4, rtol=0)
        for generation in (1, 2):
            ours, theirs = (gates.layer_gates(generation) for gates in (found.gates, expected.gates))
            assert len(ours) == len(theirs)
            for left, right in zip(ours, theirs, strict=True):
                torch.testing.assert_close(left, right[:num_tokens], atol=1e-4, rtol=0)
        assert found.greatest is not None
        values, ids = found.greatest
        assert values == found.logits.amax(-1).tolist()
        assert ids == found.logits.argmax(-1).tolist()


@pytest.mark.parametrize("granularity", ["layer", "projection"])
def test_biases_of_hot_rows_give_the_torch_graphs_gates(granularity: Granularity) -> None:
    """fp32. Slot 3 is no adapter of the artefact: its row has a bias, large enough to decide at every other gate."""
    model = ready(llama(head_dim=16))
    sides = [rig.torch_side(model), rig.native_side(model)]
    artefact = rig.random_artefact(sides[0].routed, granularity)
    generator = torch.Generator().manual_seed(9)
    hot = HotRow(
        {
            key: GateColumn(torch.randn(rows.shape[1], generator=generator) * 0.3, 8.0 if index % 2 else -8.0)
            for index, (key, rows) in enumerate(artefact.rows.items())
        }
    )
    plan = routed_plan({s: f"d{s}" for s in rig.RANKS}, dict.fromkeys(rig.RANKS, "r"), 1, "", 2)
    shares, layers = [], []
    for side in sides:
        rig.equip(side, {})
        slots = {f"d{slot}": slot for slot in rig.RANKS if slot != 3}
        side.routed.routers.publish(side.routed.routers.stage(1, artefact, slots, {3: hot}))
        gates = rig.step(side, [(rig.make_sequence(PROMPT, plan=plan), 70)], collect_layers=True).gates
        assert gates is not None
        shares.append(gates.share[:70])
        layers.append([layer[:70] for layer in gates.layer_gates(1)])
    torch.testing.assert_close(shares[1], shares[0], atol=1e-4, rtol=0)
    for found, expected in zip(layers[1], layers[0], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert layers[1][1][:, 3].mean() > layers[1][0][:, 3].mean() + 0.3, "the bias decides"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_which_slots_adapters_have_changes_no_bit(dtype: torch.dtype) -> None:
    """An adapter that comes back from disk may have another slot: what it is summed with, and when, stays the same."""
    model = ready(llama()).to(dtype)
    places = {"a": 1, "b": 2, "c": 3}, {"a": 3, "b": 1, "c": 2}
    artefact = rig.random_artefact(attach_routing(copy.deepcopy(model), num_slots=rig.NUM_SLOTS), "layer")
    adapters = (ArtefactAdapter("base", "base"), *(ArtefactAdapter(name, name) for name in "abc"))
    rows = {key: values[:4] for key, values in artefact.rows.items()}
    artefact = dataclasses.replace(artefact, adapters=adapters, rows=rows, top_k=3)
    for library in libraries():
        found = []
        for slots in places:
            side = rig.native_side(model, library=library)
            bank, routers = side.routed.bank, side.routed.routers
            for index, name in enumerate("abc"):
                weights = rig.random_weights(side.routed, index + 1)
                bank.publish(bank.with_adapter(slots[name], weights))
            routers.publish(routers.stage(1, artefact, slots))
            digests = {slot: name for name, slot in slots.items()}
            plans = [
                fixed_plan(Policy.WEIGHTED, {slots["a"]: 0.4, slots["b"]: 0.7, slots["c"]: 0.3}, digests),
                routed_plan({0: "base", **digests}, dict.fromkeys((0, *digests), "r"), 1, "", 3),
            ]
            found.append([rig.prefill(side, PROMPT, [70], plan) for plan in plans])
        for first, second in zip(*found, strict=True):
            assert torch.equal(first, second)


def test_ties_between_slots_go_to_the_lower_one() -> None:
    """Equal rows give equal logits here; on the torch graph a GEMM may round equal columns differently."""
    side = rig.native_side(ready(llama()))
    artefact = rig.random_artefact(side.routed, "layer")
    for rows in artefact.rows.values():
        rows[:] = rows[:1]
    plan = routed_plan({s: f"d{s}" for s in (2, 3, 4)}, dict.fromkeys((2, 3, 4), "r"), 1, "", 2)
    rig.equip(side, {1: artefact})
    gates = rig.step(side, [(rig.make_sequence(PROMPT, plan=plan), 20)]).gates
    assert gates is not None
    assert torch.equal(gates.share[:, 2:5], torch.tensor([[0.5, 0.5, 0.0]]).expand(20, -1))


def pack_routers(side: rig.Side, shortlist_from: int | None) -> None:
    """As a server does; nothing on the torch graph."""
    if isinstance(side.graph, NativeGraph):
        side.routed.routers.pack = functools.partial(
            NativeRouter, routed=side.routed, native=side.graph._native, shortlist_from=shortlist_from
        )


@pytest.mark.parametrize("shortlist_from", [None, 1])
def test_a_token_whose_greatest_logit_is_not_finite_has_zero_gates_as_on_torch(shortlist_from: int | None) -> None:
    """One adapter's rows are finite and huge: its logits are infinite, of either sign, or huge."""
    model = ready(llama())
    sides = [rig.torch_side(model), rig.native_side(model)]
    artefact = rig.random_artefact(sides[0].routed, "layer")
    for rows in artefact.rows.values():
        rows[2] = 0.0
        rows[2, 0] = 3e38  # one value alone: no order of a sum makes a difference
    plan = routed_plan({s: f"d{s}" for s in rig.RANKS}, dict.fromkeys(rig.RANKS, "r"), 1, "", 2)
    found = []
    for side in sides:
        pack_routers(side, shortlist_from)
        rig.equip(side, {1: artefact})
        gates = rig.step(side, [(rig.make_sequence(PROMPT, plan=plan), 40)], collect_layers=True).gates
        assert gates is not None
        found.append(torch.stack([layer[:40] for layer in gates.layer_gates(1)]))
    expected, ours = found
    assert 0 < int((expected == 0).all(dim=-1).sum()) < expected[..., 0].numel()
    assert torch.isfinite(ours).all()
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_a_row_that_is_not_finite_shows_and_spares_the_others() -> None:
    model = ready(llama())
    poison = 319
    model.model.embed_tokens.weight[poison] = torch.nan
    side = rig.native_side(model)
    bad, good = rig.make_sequence([*PROMPT[:20], poison, 5], 1), rig.make_sequence(PROMPT[:22], 20)
    output = rig.step(side, [(bad, 22), (good, 22)])
    assert output.greatest is not None
    assert all(map(math.isnan, output.greatest[0][20:22])), "the row ends in something that is not a number"
    assert all(map(math.isfinite, output.greatest[0][22:]))
    fresh = (rig.make_sequence(bad.prompt_token_ids, 30), rig.make_sequence(good.prompt_token_ids, 40))
    layout = lay_out(ScheduledBatch(tuple(ScheduledSequence(sequence, 22) for sequence in fresh)))
    checked = side.graph.forward(layout, [], checks=[21, 22, 43], collect_layers=False)
    assert checked.finite is not None
    assert checked.finite.tolist() == [False, True, True], "and so without logits"
    side.graph.clear(bad.block_table)
    reused = rig.make_sequence(PROMPT[:22], 1)
    assert torch.equal(rig.step(side, [(reused, 22)]).logits, output.logits[22:])


def test_what_it_cannot_serve_is_said() -> None:
    config = transformers.GPT2Config(n_embd=64, n_head=4, n_layer=2, vocab_size=320)
    cases = {
        "Llama family": (transformers.GPT2LMHeadModel(config), 16),
        "float16": (llama().half(), 16),
        "sliding window": (transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES)), 16),
        "gelu": (llama(hidden_act="gelu"), 16),
        "heads of 8": (llama(head_dim=8), 16),
        "block_size 24": (llama(), 24),
    }
    for words, (model, block_size) in cases.items():
        reason = why_not(model, block_size=block_size)
        assert reason is not None, words
        assert words in reason
    assert why_not(llama(), block_size=32) is None


def test_retired_adapters_and_dropped_models_are_freed() -> None:
    side = rig.native_side(ready(llama()))
    rig.equip(side, {})
    assert side.routed.bank.pack is not None
    adapter = weakref.ref(side.routed.bank.snapshot.packed[4])
    side.routed.bank.publish(side.routed.bank.without_slots([4]))
    assert side.routed.bank.snapshot.slots == {1, 2, 3}
    rig.step(side, [(rig.make_sequence(PROMPT), 5)])  # the graph lets go of the old table
    gc.collect()
    assert adapter() is None
    native = weakref.ref(getattr(side.graph, "_native"))  # noqa: B009 - not part of the protocol
    assert isinstance(native(), NativeModel)
    del side
    gc.collect()
    assert native() is None


def test_a_step_computes_with_the_adapters_that_are_there_now() -> None:
    """One comes into another's slot between two steps."""
    side = rig.native_side(ready(llama()))
    bank = side.routed.bank
    plan = fixed_plan(Policy.PINNED, {1: 1.0}, {1: "d1"})
    found = []
    for other in (1, 2, 1):
        emptied = bank.without_slots([1])
        bank.publish(bank.with_adapter(1, rig.random_weights(side.routed, other), onto=emptied))
        found.append(rig.prefill(side, PROMPT, [70], plan))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_plans_of_a_step_outlive_their_place_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """More plans than are kept arrive in one step: each must still be what it was when the step reads it."""
    model = ready(llama())
    digests = {slot: f"d{slot}" for slot in rig.RANKS}
    plans = [
        fixed_plan(Policy.WEIGHTED, {slot: weight}, digests) for weight in (0.25, 0.5, 0.75, 2.0) for slot in (1, 2)
    ]
    side = rig.native_side(model)
    rig.equip(side, {})
    alone = [rig.prefill(side, PROMPT[:20], [20], plan)[-1].clone() for plan in plans]
    monkeypatch.setattr("server.engine.native_graph.MAX_KEPT_PLANS", 2)
    native: Any = side.graph
    native._plans.clear()
    run = native._native.run

    def run_later(step: Any) -> None:
        junk = [np.full(1, 3, np.int32) for _ in range(2000)]  # takes whatever memory was given back
        run(step)
        del junk

    monkeypatch.setattr(native._native, "run", run_later)
    rows = [(rig.make_sequence(PROMPT[:20], 1 + 2 * index, plan), 20) for index, plan in enumerate(plans)]
    together = rig.step(side, rows).logits
    for index, expected in enumerate(alone):
        torch.testing.assert_close(together[20 * index + 19], expected)


@pytest.mark.parametrize("rank", [1, 5, 16, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_an_adapter_counts_its_padding(dtype: torch.dtype, rank: int) -> None:
    """Narrow matrices are padded to whole panels: a budget of unpadded bytes would be overdrawn several times over."""
    side = rig.native_side(ready(llama()).to(dtype))
    native: Any = getattr(side.graph, "_native")  # noqa: B009 - not part of the protocol
    slot = next(slot for slot, other in rig.RANKS.items() if other == rank)
    weights = rig.random_weights(side.routed, slot)
    counted = native.adapter_bytes(weights)
    padded = -(-rank // 16) * 16
    values = sum(padded * info.d_in + -(-info.d_out // 32) * 32 * rank for info in side.routed.projections.values())
    # At least whole panels, of 16 rows of A and 32 columns of B; at most what rounding all up twice makes of it.
    assert (
        values * dtype.itemsize
        <= counted
        <= sum(
            (-(-rank // 16) * 16 * (info.d_in + 32) + (info.d_out + 32) * (rank + 32)) * dtype.itemsize
            for info in side.routed.projections.values()
        )
    )
    side.routed.bank.packed_bytes = native.adapter_bytes
    assert side.routed.bank.bytes_of(weights) == counted == native.pack_adapter(weights).num_bytes


def test_a_token_beyond_the_vocabulary_is_an_error_and_not_somebody_elses_memory() -> None:
    side = rig.native_side(ready(llama()))
    for token in (320, -1):
        with pytest.raises(RuntimeError, match=f"token {token} is beyond the vocabulary"):
            rig.prefill(side, [5, token, 7], [3])
    assert rig.prefill(side, [5, 319, 7], [3]).isfinite().all()


class OtherLibrary:
    """The library, but for one function."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name = name
        self._function = function

    def __getattr__(self, name: str) -> Any:
        return self._function if name == self._name else getattr(libraries()[0], name)


def test_a_head_that_has_to_be_copied_lives_until_it_is_packed() -> None:
    """On a busy machine, where memory that was freed is somebody else's at once."""
    model = ready(llama())
    expected = rig.prefill(rig.native_side(model), PROMPT, [len(PROMPT)])
    head: Any = model.lm_head
    head.weight = nn.Parameter(head.weight.t().contiguous().t(), requires_grad=False)

    def set_head(*arguments: Any) -> Any:
        others = [torch.full(head.weight.shape, torch.nan) for _ in range(4)]
        assert others
        return libraries()[0].lm_set_head(*arguments)

    library: Any = OtherLibrary("lm_set_head", set_head)
    assert torch.equal(rig.prefill(rig.native_side(model, library=library), PROMPT, [len(PROMPT)]), expected)


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("lm_engine_new", MemoryError),
        ("lm_adapter_new", AdapterMemoryError),
        ("lm_shortlist_new", OverloadedError),
    ],
)
def test_no_memory_is_called_no_memory(function: str, error: type[Exception]) -> None:
    """Not a fault of the native step, that torch would help against."""
    library: Any = OtherLibrary(function, lambda *_: b"std::bad_alloc")

    def serve() -> None:
        side = rig.native_side(ready(llama()), library=library)
        pack_routers(side, shortlist_from=1)
        rig.equip(side, {1: rig.random_artefact(side.routed, "layer")})

    with pytest.raises(error, match="no memory"):
        serve()
