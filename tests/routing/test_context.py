"""Gates of a mixed batch, and the layers that apply them, on a tiny model."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from server.routing.attach import RoutedModel, attach_routing, detach_routing, find_projections
from server.routing.bank import LoraWeights
from server.routing.context import build_gate_batch
from server.routing.linear import RoutedLinear
from server.routing.policy import BASE_PLAN, GatePlan, Policy, fixed_plan, routed_plan
from server.routing.router import ArtefactAdapter, Granularity, RouterArtefact, gate_key

SLOTS = {1: "d1", 2: "d2", 3: "d3"}
PROMPT = torch.tensor([[5, 9, 200, 31, 7, 64, 3, 120]])
TinyLlama = Callable[..., LlamaForCausalLM]


def random_weights(routed: RoutedModel, slot: int, targets: tuple[str, ...]) -> dict[str, LoraWeights]:
    generator = torch.Generator().manual_seed(slot)
    return {
        name: LoraWeights(
            torch.randn(2 + slot, info.d_in, generator=generator) * 0.3,
            torch.randn(info.d_out, 2 + slot, generator=generator) * 0.3,
        )
        for name, info in routed.projections.items()
        if name.rpartition(".")[2] in targets
    }


def make_artefact(routed: RoutedModel, granularity: Granularity = "layer", seed: int = 0) -> RouterArtefact:
    generator = torch.Generator().manual_seed(seed)
    rows = {}
    for info in routed.projections.values():
        key = gate_key(granularity, info)
        if key not in rows:
            rows[key] = torch.randn(3, info.d_in, generator=generator)
    adapters = tuple(ArtefactAdapter(f"a{slot}", digest) for slot, digest in SLOTS.items())
    return RouterArtefact("tiny", 64, 3, granularity, 2, 1.0, adapters, rows)


def make_routed(
    model: nn.Module, granularity: Granularity = "layer", order: tuple[int, ...] = (1, 2, 3)
) -> RoutedModel:
    routed = attach_routing(model, num_slots=6)
    targets = {1: ("q_proj", "v_proj"), 2: ("q_proj", "k_proj", "o_proj"), 3: ("up_proj", "down_proj", "v_proj")}
    for slot in order:
        routed.bank.publish(routed.bank.with_adapter(slot, random_weights(routed, slot, targets[slot])))
    artefact = make_artefact(routed, granularity)
    routed.routers.publish(routed.routers.stage(1, artefact, {digest: slot for slot, digest in SLOTS.items()}))
    return routed


def routed_request(allowed: Mapping[int, str] = SLOTS, top_k: int = 2, generation: int = 1) -> GatePlan:
    return routed_plan(allowed, dict.fromkeys(allowed, "row"), generation, "layer", top_k)


@torch.no_grad()
def logits(routed: RoutedModel, *plans: GatePlan, prompt: Tensor = PROMPT) -> Tensor:
    """One row of tokens per plan, through transformers' own attention."""
    rows = prompt.expand(len(plans), -1)
    plan_of_token = torch.arange(len(plans)).repeat_interleave(prompt.shape[1])
    batch = build_gate_batch(plans, plan_of_token, bank=routed.bank.snapshot, routers=routed.routers)
    with routed.context.running(batch):
        output: Tensor = routed.model(rows, use_cache=False).logits
    return output


def test_attached_but_idle_is_the_bare_model_bit_for_bit(tiny_llama: TinyLlama) -> None:
    model = tiny_llama()
    bare = logits_of(model)
    routed = make_routed(model)
    assert torch.equal(logits_of(model), bare)
    assert torch.equal(logits(routed, BASE_PLAN), bare)


def test_base_tokens_beside_routed_ones_are_the_bare_model(tiny_llama: TinyLlama) -> None:
    model = tiny_llama()
    bare = logits_of(model)
    mixed = logits(make_routed(model), BASE_PLAN, routed_request())
    # Same numbers through a batch of two rows: only the kernels' blocking may differ.
    torch.testing.assert_close(mixed[:1], bare, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mixed[1:], bare, atol=1e-2)


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(PROMPT, use_cache=False).logits
    return output


@pytest.mark.parametrize("granularity", ["layer", "projection"])
def test_every_policy_alone_equals_it_in_a_mixed_batch(tiny_llama: TinyLlama, granularity: Granularity) -> None:
    routed = make_routed(tiny_llama(), granularity)
    plans = [
        routed_request(),
        fixed_plan(Policy.PINNED, {2: 1.0}, SLOTS),
        fixed_plan(Policy.WEIGHTED, {1: 0.3, 3: 0.9}, SLOTS),
        BASE_PLAN,
        routed_request({1: "d1", 3: "d3"}, top_k=1),
    ]
    mixed = logits(routed, *plans)
    for row, plan in enumerate(plans):
        torch.testing.assert_close(mixed[row], logits(routed, plan)[0], atol=2e-5, rtol=1e-5)


def test_a_routed_request_of_one_adapter_equals_pinning_it(tiny_llama: TinyLlama) -> None:
    routed = make_routed(tiny_llama())
    pinned = logits(routed, fixed_plan(Policy.PINNED, {2: 1.0}, SLOTS))
    assert torch.equal(logits(routed, routed_request({2: "d2"})), pinned)


def test_an_adapter_outside_the_pool_has_no_influence(tiny_llama: TinyLlama) -> None:
    routed = make_routed(tiny_llama())
    pool = routed_request({1: "d1", 3: "d3"})
    with_second = logits(routed, pool)
    routed.bank.publish(routed.bank.without_slots([2]))
    torch.testing.assert_close(logits(routed, pool), with_second, atol=2e-5, rtol=1e-5)


def test_slots_and_registration_order_do_not_matter(tiny_llama: TinyLlama) -> None:
    straight = logits(make_routed(tiny_llama()), routed_request())
    reordered = logits(make_routed(tiny_llama(), order=(3, 1, 2)), routed_request())
    torch.testing.assert_close(reordered, straight, atol=2e-5, rtol=1e-5)


def test_requests_of_two_router_generations_share_a_batch(tiny_llama: TinyLlama) -> None:
    routed = make_routed(tiny_llama())
    old = logits(routed, routed_request())
    other = make_artefact(routed, "projection", seed=8)
    routed.routers.publish(routed.routers.stage(2, other, {digest: slot for slot, digest in SLOTS.items()}))
    mixed = logits(routed, routed_request(), routed_request(generation=2))
    torch.testing.assert_close(mixed[:1], old, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(mixed[1:], old, atol=1e-2)
    torch.testing.assert_close(mixed[1:], logits(routed, routed_request(generation=2)), atol=2e-5, rtol=1e-5)


def test_routed_gates_match_the_formula_on_the_attention_input(tiny_llama: TinyLlama) -> None:
    """Layer 0's router reads input_layernorm(embedding): recompute its gates by hand."""
    model = tiny_llama()
    routed = make_routed(model)
    batch = build_gate_batch(
        [routed_request()],
        torch.zeros(8, dtype=torch.int64),
        bank=routed.bank.snapshot,
        routers=routed.routers,
        collect_layers=True,
    )
    with torch.no_grad(), routed.context.running(batch):
        model(PROMPT, use_cache=False)
    assert batch is not None
    layer_gates = batch.layer_gates(1)
    assert len(layer_gates) == 3
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(PROMPT[0]))
    scores = hidden @ routed.routers.generations[1].rows["layer.0"][1:4].T
    kept = scores.topk(2, dim=-1)
    expected = torch.zeros(8, 6).scatter(1, kept.indices + 1, torch.softmax(kept.values, dim=-1))
    torch.testing.assert_close(layer_gates[0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.share, torch.stack(layer_gates).mean(dim=0), atol=1e-6, rtol=0)
    torch.testing.assert_close(batch.share.sum(dim=-1), torch.ones(8), atol=1e-5, rtol=0)


def test_a_bias_moves_the_gate_of_its_slot_only(tiny_llama: TinyLlama) -> None:
    """An overwhelming bias makes routing equal to pinning; a bias of a slot outside the pool changes no bit."""
    routed = make_routed(tiny_llama())
    plain = logits(routed, routed_request({1: "d1", 2: "d2"}))
    generation = routed.routers.generations[1]

    def biased(slot: int) -> Tensor:
        bias = torch.zeros(routed.num_slots)
        bias[slot] = 1e6
        routed.routers.publish(replace(generation, biases=dict.fromkeys(generation.rows, bias)))
        return logits(routed, routed_request({1: "d1", 2: "d2"}))

    assert torch.equal(biased(3), plain)
    pinned = logits(routed, fixed_plan(Policy.PINNED, {2: 1.0}, SLOTS))
    torch.testing.assert_close(biased(2), pinned, rtol=0, atol=1e-5)


def test_layers_without_a_gate_stay_on_the_base(tiny_llama: TinyLlama) -> None:
    model = tiny_llama()
    bare = logits_of(model)
    routed = make_routed(model)
    artefact = make_artefact(routed)
    empty = RouterArtefact("tiny", 64, 3, "layer", 2, 1.0, artefact.adapters, {"layer.7": artefact.rows["layer.0"]})
    routed.routers.publish(routed.routers.stage(5, empty, {digest: slot for slot, digest in SLOTS.items()}))
    assert torch.equal(logits(routed, routed_request(generation=5)), bare)


def test_detach_puts_the_projections_back(tiny_llama: TinyLlama) -> None:
    model = tiny_llama()
    names = [name for name, _ in model.named_parameters()]
    routed = make_routed(model)
    assert any(isinstance(module, RoutedLinear) for module in model.modules())
    detach_routing(routed)
    assert not any(isinstance(module, RoutedLinear) for module in model.modules())
    assert [name for name, _ in model.named_parameters()] == names


def test_a_list_inside_a_layer_is_not_taken_for_the_decoder_layers() -> None:
    """StableLM with `qk_layernorm` keeps one norm per head, and may have more heads than layers."""
    from transformers import StableLmConfig, StableLmForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "qk_layernorm": True}
    model = StableLmForCausalLM(StableLmConfig(**sizes, **heads))
    assert len(find_projections(model)) == 2 * 7


def test_projections_are_the_linear_maps_of_the_decoder_layers(tiny_llama: TinyLlama, tiny_gpt2: TinyLlama) -> None:
    llama = find_projections(tiny_llama())
    assert len(llama) == 3 * 7
    assert llama["model.layers.1.mlp.down_proj"][1:] == (128, 64, 1, False)
    assert not any("lm_head" in name for name in llama)
    gpt2 = find_projections(tiny_gpt2())
    assert gpt2["transformer.h.2.attn.c_attn"][1:] == (64, 192, 2, True)


def test_forward_passes_do_not_nest(tiny_llama: TinyLlama) -> None:
    routed = make_routed(tiny_llama())
    with routed.context.running(None):
        routed.context.batch = build_gate_batch(
            [routed_request()], torch.zeros(8, dtype=torch.int64), bank=routed.bank.snapshot, routers=routed.routers
        )
        with pytest.raises(AssertionError), routed.context.running(None):
            pass
