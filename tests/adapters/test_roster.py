"""What a request gets for its model, its pool, its weights and its k."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import LlamaForCausalLM

from server.adapters.calibration import Calibration
from server.adapters.roster import NotResidentError, ResidentAdapter, Roster, ServedAdapter, build_roster, routed_slots
from server.errors import InvalidRequestError, ModelNotFoundError
from server.routing.attach import RoutedModel, attach_routing
from server.routing.policy import BASE_PLAN, Policy
from tests.adapters.folders import BASE
from tests.adapters.harness import artefact_for

A, B, C, D = (ResidentAdapter(name, slot, f"digest-{name}", name != "c") for slot, name in enumerate("abcd", start=1))


@pytest.fixture(scope="module")
def routed(tiny_llama: "Callable[..., LlamaForCausalLM]") -> RoutedModel:
    return attach_routing(tiny_llama(), num_slots=9)


def roster_of(routed: RoutedModel, *adapters: ServedAdapter, rows: str = "abc", **options: Any) -> Roster:
    """A roster whose router has rows for the adapters named in `rows`."""
    artefact = artefact_for(routed, [(name, f"digest-{name}") for name in rows], **options)
    resident = [adapter for adapter in adapters if isinstance(adapter, ResidentAdapter)]
    return build_roster(BASE, adapters, routed.routers.stage(7, artefact, routed_slots(resident)))


def test_auto_routes_over_every_routed_adapter(routed: RoutedModel) -> None:
    plan, names = roster_of(routed, A, B, C, D).resolve("auto")
    assert (plan.policy, plan.allowed_slots, plan.top_k, plan.router_generation) == (Policy.ROUTED, (1, 2), 2, 7)
    assert names == {0: "base", 1: "a", 2: "b"}


def test_the_base_name_is_the_base_plan(routed: RoutedModel) -> None:
    assert roster_of(routed, A).resolve(BASE).plan is BASE_PLAN


def test_an_adapter_name_pins_it_whether_routed_or_not(routed: RoutedModel) -> None:
    for adapter in (A, C, D):
        plan, names = roster_of(routed, A, C, D).resolve(adapter.name)
        assert (plan.policy, plan.weights) == (Policy.PINNED, ((adapter.slot, 1.0),))
        assert names == {0: "base", adapter.slot: adapter.name}


def test_a_named_pool_narrows_the_choice_and_the_default_k(routed: RoutedModel) -> None:
    plan = roster_of(routed, A, B).resolve("auto", ["b"]).plan
    assert (plan.policy, plan.allowed_slots, plan.top_k) == (Policy.ROUTED, (2,), 1)


def test_weights_are_used_as_given_for_routed_and_unrouted_adapters(routed: RoutedModel) -> None:
    plan = roster_of(routed, A, C).resolve("auto", {"a": 0.7, "c": 1.5}).plan
    assert (plan.policy, plan.weights) == (Policy.WEIGHTED, ((1, 0.7), (3, 1.5)))
    assert Roster(BASE, roster_of(routed, A).adapters).resolve("auto", {"a": 1}).plan.weights == ((1, 1.0),)


def test_the_null_expert_takes_part_unless_a_pool_leaves_it_out(routed: RoutedModel) -> None:
    roster = roster_of(routed, A, B, has_null_expert=True)
    assert roster.resolve("auto").plan.allowed_slots == (0, 1, 2)
    assert roster.resolve("auto", ["a"]).plan.allowed_slots == (1,)
    assert roster.resolve("auto", ["a", "base"]).plan.allowed_slots == (0, 1)


@pytest.mark.parametrize("top_k", [1, 2])
def test_top_k_is_honoured_within_the_pool(routed: RoutedModel, top_k: int) -> None:
    assert roster_of(routed, A, B).resolve("auto", top_k=top_k).plan.top_k == top_k


@pytest.mark.parametrize(
    ("model", "adapters", "top_k", "param", "code"),
    [
        ("auto", ["a", "nobody"], None, "adapters", "adapter_not_found"),
        ("auto", ["base"], None, "adapters", "adapter_not_found"),
        ("auto", ["a", "c"], None, "adapters", "adapter_not_routed"),
        ("auto", ["a", "d"], None, "adapters", "adapter_not_routed"),
        ("auto", [], None, "adapters", "invalid_pool"),
        ("auto", ["a", "a"], None, "adapters", "invalid_pool"),
        ("auto", {}, None, "adapters", "invalid_pool"),
        ("auto", {"nobody": 1.0}, None, "adapters", "adapter_not_found"),
        ("auto", {"base": 1.0}, None, "adapters", "adapter_not_found"),
        ("auto", {"a": -0.1}, None, "adapters", "invalid_weight"),
        ("auto", {"a": 2.1}, None, "adapters", "invalid_weight"),
        ("auto", {"a": float("nan")}, None, "adapters", "invalid_weight"),
        ("auto", {"a": float("inf")}, None, "adapters", "invalid_weight"),
        ("auto", {"a": 1.0}, 1, "top_k_adapters", "invalid_request"),
        ("auto", None, 0, "top_k_adapters", "invalid_request"),
        ("auto", None, 3, "top_k_adapters", "invalid_request"),
        ("auto", ["a"], 2, "top_k_adapters", "invalid_request"),
        (BASE, ["a"], None, "adapters", "invalid_request"),
        (BASE, None, 1, "top_k_adapters", "invalid_request"),
        ("a", {"a": 1.0}, None, "adapters", "invalid_request"),
        ("a", None, 1, "top_k_adapters", "invalid_request"),
    ],
)
def test_what_cannot_be_had_is_refused_with_its_field(
    routed: RoutedModel, model: str, adapters: Any, top_k: int | None, param: str, code: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        roster_of(routed, A, B, C, D).resolve(model, adapters, top_k)
    assert (caught.value.param, caught.value.code) == (param, code)


@pytest.mark.parametrize("model", ["", "nobody", "base", "AUTO", "A"])
def test_unknown_models_are_not_found_and_never_the_base(routed: RoutedModel, model: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        roster_of(routed, A).resolve(model)
    assert caught.value.param == "model"


def test_auto_without_anything_to_route_to_says_what_to_do(routed: RoutedModel) -> None:
    without_router = build_roster(BASE, [A], None)
    nothing_routed = roster_of(routed, C, D)
    for roster, problem in ((without_router, "no router is loaded"), (nothing_routed, "no adapter is routed")):
        for adapters in (None, ["a"]):
            with pytest.raises(InvalidRequestError, match=problem) as caught:
                roster.resolve("auto", adapters)
            assert (caught.value.param, caught.value.code) == ("model", "router_unavailable")


def test_reasons_tell_why_an_adapter_is_not_routed(routed: RoutedModel) -> None:
    twin = ResidentAdapter("twin", 5, A.digest, True)
    changed = ResidentAdapter("b", 6, "digest-other", True)
    roster = roster_of(routed, A, twin, changed, C, D)
    reasons = {name: roster.unrouted_reason(name) for name in roster.adapters}
    assert reasons["a"] is None
    assert "the same weights are routed as 'a'" in str(reasons["twin"])
    assert "belongs to other weights" in str(reasons["b"])
    assert "routed: false" in str(reasons["c"])
    assert reasons["d"] == "no gate row in the router artefact: served by name only"
    assert "no router is loaded" in str(build_roster(BASE, [A], None).unrouted_reason("a"))


def test_why_a_gate_row_was_not_made_goes_before_whose_row_there_is(routed: RoutedModel) -> None:
    """Other weights under a name that the router knows are calibrated like any newcomer."""
    judged = cast("Calibration", SimpleNamespace(problems=("it answers to nobody's prompts",)))
    for fields, reason in (
        ({"calibration": judged}, "it answers to nobody's prompts: served by name only"),
        ({"calibration_problem": "no examples"}, "no examples: served by name only"),
    ):
        changed = ResidentAdapter("b", 6, "digest-other", True, **fields)
        assert roster_of(routed, A, changed).unrouted_reason("b") == reason


def test_a_warm_adapter_is_served_by_name_and_said_to_be_missing(routed: RoutedModel) -> None:
    warm = ServedAdapter("w", None, "digest-w", False)
    roster = roster_of(routed, A, warm, B)
    assert roster.resolve("auto").plan.allowed_slots == (1, 2)
    for model, adapters, names in (("w", None, ("w",)), ("auto", {"w": 0.5, "a": 1.0, "b": 0.0}, ("a", "w"))):
        with pytest.raises(NotResidentError) as caught:
            roster.resolve(model, adapters)
        assert caught.value.names == names
    assert roster.resolve("auto", {"w": 0.0, "a": 1.0}).plan.weights == ((1, 1.0),)
    with pytest.raises(InvalidRequestError, match="is not routed: registered with routed: false"):
        roster.resolve("auto", ["a", "w"])
    known = build_roster(BASE, [ServedAdapter("a", None, A.digest, True)], roster.router)
    assert "waits for room in memory" in str(known.unrouted_reason("a"))


def test_an_error_names_only_some_of_very_many() -> None:
    many = [ServedAdapter(f"n{index}", None, "d", False) for index in range(1000)]
    with pytest.raises(ModelNotFoundError, match="n17 and 982 more"):
        build_roster(BASE, many, None).resolve("nobody")


def test_fingerprints_depend_on_content_and_not_on_slots_or_names(routed: RoutedModel) -> None:
    moved = [ResidentAdapter("other", 6, A.digest, True), ResidentAdapter("b", 2, B.digest, True)]
    first, second = roster_of(routed, A, B), roster_of(routed, *moved)
    assert first.resolve("auto").plan.fingerprint == second.resolve("auto").plan.fingerprint
    assert first.resolve("a").plan.fingerprint == second.resolve("other").plan.fingerprint
    assert first.resolve("auto").plan.fingerprint != first.resolve("auto", ["a"]).plan.fingerprint


def test_adapters_outside_a_pool_leave_its_fingerprint_alone(routed: RoutedModel) -> None:
    alone = roster_of(routed, A).resolve("auto").plan
    beside = roster_of(routed, A, B).resolve("auto", ["a"]).plan
    assert alone.fingerprint == beside.fingerprint
