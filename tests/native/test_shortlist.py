"""Shortlists of large pools save time and nothing else: gates and logits are those of the router that looks at all, bit
for bit."""

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers

from server.engine.graph import GraphOutput
from server.native.library import libraries
from server.native.routers import NativeRouter
from server.routing.policy import BASE_PLAN, GatePlan, Policy, fixed_plan, routed_plan
from server.routing.prototypes import GateColumn, HotRow
from server.routing.router import ArtefactAdapter, Granularity, RouterArtefact, gate_key
from tests.native import rig

pytestmark = pytest.mark.skipif(not libraries(), reason="no native library was built, or none fits this CPU")

POOL = 256
PROMPT = torch.randint(3, 300, (70,), generator=torch.Generator().manual_seed(5)).tolist()
ROW_DIGESTS = dict.fromkeys(range(POOL + 1), "r")


def make_model(dtype: torch.dtype) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=72,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=3,
            intermediate_size=100,
            vocab_size=320,
            head_dim=16,
            initializer_range=0.2,
        )
        return transformers.LlamaForCausalLM(config).eval().requires_grad_(False).to(dtype)


def artefact(side: rig.Side, granularity: Granularity, *, seed: int = 1) -> RouterArtefact:
    """Rows that are hard to tell apart: each of 64 four times, of which two are equal and two a millionth away."""
    generator = torch.Generator().manual_seed(seed)
    rows = {}
    for info in side.routed.projections.values():
        key = gate_key(granularity, info)
        if key not in rows and info.layer >= 1:
            base = torch.randn(POOL // 4, info.d_in, generator=generator) * 0.3
            near = base + 1e-6 * torch.randn(base.shape, generator=generator)
            rows[key] = torch.cat([base, base, near, base * (1 + 2e-6)])
    adapters = tuple(ArtefactAdapter(f"d{slot}", f"d{slot}") for slot in range(1, POOL + 1))
    return RouterArtefact("tiny", 72, 3, granularity, 2, 0.7, adapters, rows)


def make_side(
    monkeypatch: pytest.MonkeyPatch, model: Any, granularity: Granularity, shortlist_from: int | None, **options: Any
) -> rig.Side:
    """A native side with one router of generation 1 over all slots."""
    monkeypatch.setattr(rig, "NUM_SLOTS", POOL + 4)
    side = rig.native_side(model, 128)
    native = getattr(side.graph, "_native")  # noqa: B009 - not part of the protocol
    side.routed.routers.pack = functools.partial(
        NativeRouter, routed=side.routed, native=native, shortlist_from=shortlist_from
    )
    rig.equip(side, {})
    slots = {f"d{slot}": slot for slot in range(1, POOL + 1)}
    side.routed.routers.publish(side.routed.routers.stage(1, artefact(side, granularity), slots, **options))
    return side


def pool_plan(slots: Sequence[int], top_k: int) -> GatePlan:
    return routed_plan({slot: f"d{slot}" for slot in slots}, ROW_DIGESTS, 1, "", top_k)


PLANS = [
    *(pool_plan(range(1, POOL + 1), top_k) for top_k in (1, 2, 3, 9)),
    pool_plan(range(5, POOL + 1), 2),  # most of them
    pool_plan(range(1, POOL + 1, 2), 4),  # exactly half
    pool_plan(range(1, POOL + 1, 7), 2),  # too few for a shortlist
    BASE_PLAN,
    fixed_plan(Policy.PINNED, {3: 1.0}, {3: "d3"}),
]


def run(side: rig.Side, prompt: list[int] = PROMPT) -> list[GraphOutput]:
    """All plans in one batch: a prompt, then a token each."""
    sequences = [rig.make_sequence(prompt[index:], 1 + 10 * index, plan) for index, plan in enumerate(PLANS)]
    first = [(sequence, 30 + index) for index, sequence in enumerate(sequences)]
    return [
        rig.step(side, first, collect_layers=True),
        rig.step(side, [(sequence, 1) for sequence in sequences], collect_layers=True),
    ]


def assert_equal(found: list[GraphOutput], expected: list[GraphOutput]) -> None:
    for left, right in zip(found, expected, strict=True):
        assert left.gates is not None
        assert right.gates is not None
        torch.testing.assert_close(left.logits, right.logits, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(left.gates.share, right.gates.share)
        layers = [output.gates.layer_gates(1) for output in (left, right) if output.gates is not None]
        assert len(layers[0]) > 0
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*layers, strict=True))


@pytest.mark.parametrize("granularity", ["layer", "projection"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_are_those_of_the_router_that_looks_at_all(
    dtype: torch.dtype, granularity: Granularity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal rows and rows a millionth apart, so that a bound too narrow by a rounding would show."""
    model = make_model(dtype)
    sides = [make_side(monkeypatch, model, granularity, start) for start in (None, 1)]
    expected, found = map(run, sides)
    assert_equal(found, expected)
    assert expected[0].gates is not None
    chosen = [(layer > 0).any(0).sum() for layer in expected[0].gates.layer_gates(1)]
    assert min(chosen) > 40, "many different slots are chosen"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_of_hot_rows_count(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(dtype)
    generator = torch.Generator().manual_seed(9)
    keys = ["layer.1", "layer.2"]
    hot = {
        POOL + offset: HotRow(
            {key: GateColumn(torch.randn(72, generator=generator) * 0.3, bias) for key in keys}
        )
        for offset, bias in ((1, 8.0), (2, -2.0), (3, 1e-3))
    }  # fmt: skip
    whole = routed_plan(
        {slot: f"d{slot}" for slot in range(1, POOL + 4)}, dict.fromkeys(range(POOL + 4), "r"), 1, "", 2
    )
    shares = []
    for start in (None, 1):
        side = make_side(monkeypatch, model, "layer", start, hot_rows=hot)
        gates = rig.step(side, [(rig.make_sequence(PROMPT, plan=whole), 70)]).gates
        assert gates is not None
        shares.append(gates.share)
    assert torch.equal(shares[0], shares[1])
    assert shares[0][:, POOL + 1].mean() > 0.2, "the bias decides"


def test_numbers_that_are_not_finite_are_left_to_the_router(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(torch.bfloat16)
    model.model.embed_tokens.weight[319] = torch.nan
    model.model.embed_tokens.weight[318] = 3e38
    prompt = [*PROMPT[:20], 319, *PROMPT[21:40], 318, *PROMPT[41:]]
    assert_equal(*(run(make_side(monkeypatch, model, "layer", start), prompt) for start in (1, None)))


def test_a_slot_outside_the_shortlist_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the prototypes of another router in place of its own: what they leave out, the router does not see."""
    model = make_model(torch.bfloat16)
    side = make_side(monkeypatch, model, "layer", 1)
    expected = run(side)
    own = side.routed.routers.generations[1].packed
    slots = {f"d{slot}": slot for slot in range(1, POOL + 1)}
    other = side.routed.routers.stage(2, artefact(side, "layer", seed=2), slots).packed
    assert isinstance(own, NativeRouter)
    assert isinstance(other, NativeRouter)
    monkeypatch.setattr(own, "_shortlist", other._shortlist)
    found = run(side)[0].gates
    assert found is not None
    assert expected[0].gates is not None
    assert not torch.equal(found.share, expected[0].gates.share)


def test_small_routers_have_no_shortlist(monkeypatch: pytest.MonkeyPatch) -> None:
    side = make_side(monkeypatch, make_model(torch.float32), "layer", POOL + 1)
    packed = side.routed.routers.generations[1].packed
    assert isinstance(packed, NativeRouter)
    assert packed._shortlist is None
    side = make_side(monkeypatch, make_model(torch.float32), "layer", POOL)
    packed = side.routed.routers.generations[1].packed
    assert isinstance(packed, NativeRouter)
    assert packed._shortlist is not None
