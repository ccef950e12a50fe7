"""Weights of 8 bits in the native step, held to a reference that rounds and multiplies group by group in torch."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from server.model.quantization import GROUP, LARGEST, Int8Weight, quantize_model
from server.native.library import libraries
from server.routing.attach import attach_routing
from tests.native import rig
from tests.native.test_native_step import MODELS, PROMPT, _seeded, llama, plans_over, ready

pytestmark = pytest.mark.skipif(not libraries(), reason="no native library was built, or none fits this CPU")

__all__ = ["_seeded"]  # a fixture that applies here too


class RoundingLinear(nn.Linear):
    """What `int8.h` computes: whole numbers per group, groups in float32."""

    int8: Int8Weight

    def forward(self, x: Tensor) -> Tensor:
        groups = _grouped(x.float())
        greatest = groups.abs().amax(-1, keepdim=True)  # (..., G, 1)
        rounded = (groups * torch.where(greatest > 0, LARGEST / greatest, 0)).round()
        whole = torch.einsum("...gk,ngk->...ng", rounded, _grouped(self.int8.values.float()))  # exact: below 2 ** 24
        out = (whole * (greatest / LARGEST).squeeze(-1).unsqueeze(-2) * self.int8.scales.float()).sum(-1)
        biased: Tensor = out if self.bias is None else out + self.bias.float()
        return biased.to(x.dtype)


def _grouped(x: Tensor) -> Tensor:
    """(..., K) -> (..., groups, GROUP), zeros behind the last."""
    return nn.functional.pad(x, (0, -x.shape[-1] % GROUP)).view(*x.shape[:-1], -1, GROUP)


def rounded(model: nn.Module) -> tuple[Any, Mapping[str, Int8Weight]]:
    """The model that bytes stand for, and the bytes."""
    model = copy.deepcopy(model)
    return model, quantize_model(model)


def reference(model: nn.Module, quantized: Mapping[str, Int8Weight]) -> Any:
    """A copy whose linear layers round their inputs."""
    model = copy.deepcopy(model)
    for name, weight in quantized.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.__class__ = RoundingLinear
        linear.int8 = weight  # type: ignore[assignment]
    return model


def assert_near(found: Tensor, expected: Tensor, plain: Tensor) -> None:
    """Logits (texts, tokens, V). Equal but for inputs on the edge between two whole numbers, which the last bit of a
    sum decides: those are rare, and move the logits of their text by less than rounding all inputs does, whose size
    `plain`, without rounding, shows."""
    off, rounding = (found - expected).abs(), (plain - expected).abs()
    assert off.max() < rounding.max()
    assert (off.amax((1, 2)) < 1e-3 * rounding.amax((1, 2))).float().mean() > 0.7


TEXTS = [PROMPT[start : start + 4] for start in range(0, 60, 2)]


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_references(name: str) -> None:
    model, quantized = rounded(ready(MODELS[name]()))
    with torch.no_grad():
        plain = model(torch.tensor(TEXTS)).logits
        expected = reference(model, quantized)(torch.tensor(TEXTS)).logits
    for library in libraries():
        side = rig.native_side(model, 400, library=library, quantized=quantized)
        rows = [(rig.make_sequence(text, 1 + 10 * index), 4) for index, text in enumerate(TEXTS)]
        assert_near(rig.step(side, rows).logits.view(len(TEXTS), 4, -1), expected, plain)


def test_adapters_and_routers_stand_beside_it() -> None:
    """Every policy in one batch, adapters on all projections: they read the inputs as they are."""
    model, quantized = rounded(ready(llama(head_dim=16)))
    expected, plain = rig.torch_side(reference(model, quantized), 400), rig.torch_side(model, 400)
    plans = plans_over({slot: f"r{slot}" for slot in range(5)}) * 5
    outputs = []
    native = [rig.native_side(model, 400, library=library, quantized=quantized) for library in libraries()]
    for side in (expected, plain, *native):
        rig.equip(side, {1: rig.random_artefact(side.routed, "layer")})
        rows = [
            (rig.make_sequence([*text, 7], 1 + 10 * i, plan), 4)
            for i, (text, plan) in enumerate(zip(TEXTS, plans, strict=True))
        ]
        first = rig.step(side, rows).logits[: 4 * len(rows)].view(len(rows), 4, -1)
        second = rig.step(side, [(row, 1) for row, _ in rows]).logits[: len(rows), None]
        outputs.append(torch.cat([first, second], 1))
    for found in outputs[2:]:
        assert_near(found, outputs[0], outputs[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_batches_and_threads_change_no_bit(dtype: torch.dtype) -> None:
    """Rows at once, from one to more than any tile, are what the products are cut into."""
    model, quantized = rounded(ready(llama(hidden_size=96, intermediate_size=200, head_dim=16)).to(dtype))
    artefact = rig.random_artefact(attach_routing(copy.deepcopy(model), num_slots=rig.NUM_SLOTS), "layer")
    plans = plans_over({slot: f"r{slot}" for slot in range(5)})
    for library in libraries():
        alone, team = (
            rig.native_side(model, num_threads=threads, library=library, quantized=quantized) for threads in (1, 2)
        )
        for side in (alone, team):
            rig.equip(side, {1: artefact})
        for plan in plans[:3]:
            whole = rig.prefill(alone, PROMPT, [70], plan)
            assert torch.equal(rig.prefill(team, PROMPT, [*range(1, 12), 4], plan), whole)
            assert torch.equal(rig.prefill(team, PROMPT, [57, 13], plan), whole)
        mixed = [rig.make_sequence(PROMPT, 1 + 10 * index, plan) for index, plan in enumerate(plans)]
        logits = rig.step(team, [(sequence, 70) for sequence in mixed]).logits
        for plan, found in zip(plans, logits.view(len(plans), 70, -1), strict=True):
            assert torch.equal(found, rig.prefill(alone, PROMPT, [70], plan))


def test_embeddings_of_a_tied_head_are_what_its_bytes_stand_for() -> None:
    """One layer that adds nothing: the logits are those of the embeddings."""
    model = ready(llama(tie_word_embeddings=True, num_hidden_layers=1)).bfloat16()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.get_submodule(f"model.layers.0.{name}").weight.zero_()
    model, quantized = rounded(model)
    with torch.no_grad():
        expected = reference(model, quantized)(torch.tensor([PROMPT])).logits[0].float()
    for library in libraries():
        found = rig.prefill(rig.native_side(model, library=library, quantized=quantized), PROMPT, [len(PROMPT)])
        assert (found - expected).abs().max() < 0.02 * expected.abs().max(), "the torch graph rounds its norm again"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_shows_and_spares_the_others(value: float) -> None:
    """A scale cannot hide it, whatever the greatest magnitude of something that is not a number is."""
    model, quantized = rounded(ready(llama()))
    poison = 319
    model.model.embed_tokens.weight[poison, 5] = value
    for library in libraries():
        side = rig.native_side(model, library=library, quantized=quantized)
        alone = rig.prefill(side, PROMPT[:22], [22])
        bad, good = rig.make_sequence([*PROMPT[:20], poison, 5], 20), rig.make_sequence(PROMPT[:22], 30)
        output = rig.step(side, [(bad, 22), (good, 22)])
        assert output.greatest is not None
        assert all(map(math.isnan, output.greatest[0][20:22]))
        assert torch.equal(output.logits[22:], alone)
