"""Exported adapters in PEFT's own hands: its logits are ours."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from router_training.encoding import TokenSequence, collate
from router_training.evaluation import gate_batch
from router_training.peft_export import export_adapter
from router_training.roster import Roster, attach_adapters
from router_training.trainable import TrainableAdapter, TrainableAdapters, loaded_adapters
from server.adapters.weights import load_adapter
from server.routing.attach import attach_routing
from server.routing.context import build_gate_batch
from server.routing.policy import BASE_PLAN, Policy, fixed_plan


def random_adapter(roster: Roster, ranks: dict[str, int], scaling: float) -> TrainableAdapter:
    generator = torch.Generator().manual_seed(5)

    def matrix(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(*shape, generator=generator) * 0.2)

    infos = roster.routed.projections
    a = {name: matrix(rank, infos[name].d_in) for name, rank in ranks.items()}
    b = {name: matrix(infos[name].d_out, rank) for name, rank in ranks.items()}
    return TrainableAdapter("alpha", scaling, a, b)


def rank_tables(roster: Roster) -> dict[str, dict[str, int]]:
    attention = [name for name in roster.routed.projections if name.endswith(("q_proj", "o_proj"))]
    uneven = {name: 4 if ".0." in name else 3 for name in attention}
    return {
        "even": dict.fromkeys(attention, 4),
        "uneven ranks": uneven,
        "some layers": {name: rank for name, rank in uneven.items() if ".1." not in name},
    }


@pytest.mark.parametrize("kind", ["even", "uneven ranks", "some layers"])
@pytest.mark.parametrize("scaling", [2.0, 0.7])
def test_peft_computes_the_logits_of_our_pinned_forward(
    roster: Roster, tiny_llama: Callable[..., Any], tmp_path: Path, kind: str, scaling: float
) -> None:
    from peft import PeftModel

    adapter = random_adapter(roster, rank_tables(roster)[kind], scaling)
    projections = roster.routed.projections
    export_adapter(adapter, tmp_path, base_model="tiny/llama", projections=projections)
    ids = torch.arange(3, 40)[None]
    base = tiny_llama()(input_ids=ids).logits
    with torch.inference_mode():
        peft = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))(input_ids=ids).logits
    read = load_adapter(tmp_path, "alpha", projections=projections, base_model_name="tiny/llama")
    ours_roster = attach_adapters(roster.loaded, roster.routed, [read])
    batch = collate([TokenSequence(tuple(ids[0].tolist()), 10, 1)])
    model: Any = roster.routed.model
    with (
        torch.inference_mode(),
        roster.routed.context.running(gate_batch(roster.routed, batch, ours_roster.own_adapter_plans())),
    ):
        ours = model(input_ids=ids).logits
    assert (peft - base).abs().max() > 1e-2
    assert (ours - peft).abs().max() < 1e-4


def test_peft_loads_adapters_of_a_base_that_stores_its_weights_transposed(
    tiny_gpt2: Callable[..., Any], tmp_path: Path
) -> None:
    from peft import PeftModel

    model = tiny_gpt2()
    routed = attach_routing(model, num_slots=2)
    infos = [info for info in routed.projections.values() if info.name.endswith("c_attn")]
    generator = torch.Generator().manual_seed(1)
    adapter = TrainableAdapter(
        "alpha",
        2.0,
        {info.name: nn.Parameter(torch.randn(4, info.d_in, generator=generator) * 0.2) for info in infos},
        {info.name: nn.Parameter(torch.randn(info.d_out, 4, generator=generator) * 0.2) for info in infos},
    )
    export_adapter(adapter, tmp_path, base_model="tiny/gpt2", projections=routed.projections)
    ids = torch.arange(3, 40)[None]
    bank = TrainableAdapters([adapter]).snapshot(torch.float32)
    plans = [BASE_PLAN, fixed_plan(Policy.PINNED, {1: 1.0}, {1: "alpha"})]
    gates = build_gate_batch(plans, torch.ones(37, dtype=torch.int64), bank=bank, routers=routed.routers)
    with torch.inference_mode():
        peft = PeftModel.from_pretrained(tiny_gpt2(), str(tmp_path))(input_ids=ids).logits
        with routed.context.running(gates):
            ours = model(input_ids=ids).logits
        assert (ours - model(input_ids=ids).logits).abs().max() > 1e-2
    assert (ours - peft).abs().max() < 1e-4


def test_loaded_adapters_come_back_with_their_own_weights(roster: Roster, tmp_path: Path) -> None:
    projections = roster.routed.projections
    for adapter, original in zip(loaded_adapters(roster.adapters).adapters, roster.adapters, strict=True):
        export_adapter(adapter, tmp_path / adapter.name, base_model="tiny/llama", projections=projections)
        read = load_adapter(
            tmp_path / adapter.name, adapter.name, projections=projections, base_model_name="tiny/llama"
        )
        assert read.weights.keys() == original.weights.keys()
        assert read.targets == original.targets
        for name, lora in read.weights.items():
            assert torch.equal(lora.A, original.weights[name].A)
            assert torch.equal(lora.B, original.weights[name].B)


def test_a_uniform_adapter_names_its_targets_by_leaf(roster: Roster, tmp_path: Path) -> None:
    adapter = random_adapter(roster, rank_tables(roster)["even"], 2.0)
    export_adapter(adapter, tmp_path, base_model="tiny/llama", projections=roster.routed.projections)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == ["o_proj", "q_proj"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 8, {})
