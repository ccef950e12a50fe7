"""What gates read on the native step, held to the torch model; in blocks of its own, beside running requests."""

import copy
from typing import Any

import pytest
import torch
import transformers

from server.adapters.torch_states import TorchStates
from server.engine.native_states import NativeStates, num_state_blocks
from server.errors import LoraMixerError
from server.native.library import libraries
from server.native.model import NativeModel
from server.routing.attach import RoutedModel, attach_routing
from server.routing.policy import BASE_PLAN, routed_plan
from server.routing.prototypes import GateColumn, HotRow
from server.routing.router import RouterArtefact
from server.routing.router_bank import RouterBank
from tests.native import rig

pytestmark = pytest.mark.skipif(not libraries(), reason="no native library was built, or none fits this CPU")

TOKENS = torch.randint(3, 300, (90,), generator=torch.Generator().manual_seed(5)).tolist()
CHOSEN = torch.arange(90) % 3 == 0
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "vocab_size": 320,
    "initializer_range": 0.2,
    "head_dim": 16,
}
POOL_BLOCKS = 20


def tiny() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    return model.eval().requires_grad_(False)


def native_states(model: Any, *, max_positions: int = 256) -> tuple[NativeStates, rig.Side]:
    """As `server.backend` makes them: spare blocks behind those of the pool."""
    spare = range(POOL_BLOCKS, POOL_BLOCKS + num_state_blocks(rig.BLOCK_SIZE))
    side = rig.native_side(model, spare.stop)
    rig.equip(side, {})
    native = getattr(side.graph, "_native")  # noqa: B009 - not part of the protocol
    assert isinstance(native, NativeModel)
    return NativeStates(native, side.routed, spare, max_positions=max_positions), side


def routing(routed: RoutedModel, artefact: RouterArtefact) -> RouterBank:
    """A router bank of its own in which slot 3 has a hot row."""
    generator = torch.Generator().manual_seed(9)
    hot = HotRow({key: GateColumn(torch.randn(64, generator=generator) * 0.3, 2.0) for key in artefact.rows})
    routers = RouterBank(num_slots=routed.num_slots, device=torch.device("cpu"))
    routers.publish(routers.stage(1, artefact, {"d1": 1, "d2": 2, "d4": 4}, {3: hot}))
    return routers


PLAN = routed_plan({s: f"d{s}" for s in range(5)}, dict.fromkeys(range(5), "r"), 1, "", 2)


@pytest.mark.parametrize("plan", [PLAN, BASE_PLAN], ids=["routed", "base"])
def test_states_are_those_of_the_torch_model(plan: Any) -> None:
    """fp32: three layers of roundings; values reach about 5."""
    model = tiny()
    states, side = native_states(model)
    reference = attach_routing(copy.deepcopy(model), num_slots=rig.NUM_SLOTS)
    for slot in rig.RANKS:
        reference.bank.publish(reference.bank.with_adapter(slot, rig.random_weights(reference, slot)))
    artefact = rig.random_artefact(reference, "layer", skip_layers=1)
    expected = TorchStates(reference).inputs(TOKENS, CHOSEN, plan, routing(reference, artefact), artefact)
    found = states.inputs(TOKENS, CHOSEN, plan, routing(side.routed, artefact), artefact)
    assert set(found) == set(expected) == {"layer.1", "layer.2"}
    for key, value in expected.items():
        assert value.shape == (30, 64)
        torch.testing.assert_close(found[key], value, rtol=0, atol=2e-4)


def test_a_running_request_and_its_router_do_not_notice() -> None:
    """The calibration's router has the same id as the request's, and its text more tokens."""
    model = tiny()
    logits = []
    for is_disturbed in (False, True):
        states, side = native_states(model)
        theirs = rig.random_artefact(side.routed, "layer", seed=4)
        slots = {f"d{slot}": slot for slot in rig.RANKS}
        side.routed.routers.publish(side.routed.routers.stage(1, theirs, slots))
        sequence = rig.make_sequence(TOKENS[:40], plan=PLAN)
        rig.step(side, [(sequence, 20)])
        if is_disturbed:
            artefact = rig.random_artefact(side.routed, "layer")
            states.inputs(TOKENS, CHOSEN, PLAN, routing(side.routed, artefact), artefact)
        logits.append(rig.step(side, [(sequence, 20)]).logits)
    assert torch.equal(logits[0], logits[1])


def test_what_an_earlier_text_left_in_the_blocks_does_not_matter() -> None:
    model = tiny()
    model.model.embed_tokens.weight[319] = torch.nan
    states, side = native_states(model)
    artefact = rig.random_artefact(side.routed, "layer")
    before = states.inputs(TOKENS, CHOSEN, BASE_PLAN, side.routed.routers, artefact)
    poisoned = states.inputs([319] * 90, CHOSEN, BASE_PLAN, side.routed.routers, artefact)
    assert poisoned["layer.1"].isnan().all()
    after = states.inputs(TOKENS, CHOSEN, BASE_PLAN, side.routed.routers, artefact)
    for key, value in before.items():
        assert torch.equal(after[key], value)


def test_what_it_cannot_tell_is_refused_with_what_to_do() -> None:
    states, side = native_states(tiny(), max_positions=60)
    routers = side.routed.routers
    with pytest.raises(LoraMixerError, match=r"granularity projection .* server\.backend: torch"):
        states.inputs(TOKENS, CHOSEN, BASE_PLAN, routers, rig.random_artefact(side.routed, "projection"))
    artefact = rig.random_artefact(side.routed, "layer")
    with pytest.raises(LoraMixerError, match=r"90 tokens, and this server computes 60; raise server\.max_model_len"):
        states.inputs(TOKENS, CHOSEN, BASE_PLAN, routers, artefact)
    with pytest.raises(LoraMixerError, match=r"weights alone on the native backend.*give examples"):
        states.weights(3, artefact)
