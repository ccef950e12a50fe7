"""The routing trace: names, levels, and streams that carry the same as whole answers."""

from typing import Any

import httpx
import pytest

from server.routing.plan_course import ENDLESS, PlanCourse, PlanSpan
from server.routing.policy import BASE_PLAN, GatePlan, Policy, fixed_plan, without
from tests.api.fakes import BASE_NAME, Harness
from tests.api.sse import stream

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]


def trace(client: httpx.Client, level: str, **fields: Any) -> dict[str, Any]:
    body = {"model": "auto", "messages": MESSAGES, "max_tokens": 2, "routing": {"trace": level}, **fields}
    response = client.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    routing: dict[str, Any] = response.json()["choices"][0]["routing"]
    return routing


def test_summary_is_the_mean_share_per_adapter_heaviest_first(client: httpx.Client) -> None:
    # Tokens: 0.75 to slot 1 and 0.25 to slot 2, then 0.75 to slot 2 and 0.25 to slot 3.
    routing = trace(client, "summary")
    assert routing == {
        "policy": "routed",
        "router_generation": 3,
        "adapters": {"mbpp": 0.5, "gsm8k": 0.375, "sst2": 0.125},
    }
    assert list(routing["adapters"]) == ["mbpp", "gsm8k", "sst2"]


def test_tokens_adds_the_share_of_every_token(client: httpx.Client) -> None:
    routing = trace(client, "tokens")
    assert routing["tokens"] == [
        {"token_id": 72, "token": "H", "adapters": {"gsm8k": 0.75, "mbpp": 0.25}},
        {"token_id": 101, "token": "e", "adapters": {"mbpp": 0.75, "sst2": 0.25}},
    ]
    assert routing["adapters"] == {"mbpp": 0.5, "gsm8k": 0.375, "sst2": 0.125}


def test_layers_adds_every_layer_of_every_token(client: httpx.Client) -> None:
    token = trace(client, "layers")["tokens"][0]
    assert token["layers"] == [{"gsm8k": 0.75, "mbpp": 0.25}] * 2


@pytest.mark.parametrize(
    ("fields", "policy", "adapters"),
    [
        ({"model": BASE_NAME}, "base", {"base": 1.0}),
        ({"model": "sst2"}, "pinned", {"sst2": 1.0}),
        ({"adapters": {"gsm8k": 1.5, "mbpp": 0.25}}, "weighted", {"gsm8k": 1.5, "mbpp": 0.25}),
        ({"adapters": {"gsm8k": 0}}, "weighted", {"base": 1.0}),
        ({"adapters": ["mbpp"]}, "routed", {"mbpp": 1.0}),
    ],
)
def test_every_policy_is_traced_by_name(
    client: httpx.Client, fields: dict[str, Any], policy: str, adapters: dict[str, float]
) -> None:
    routing = trace(client, "summary", **fields)
    assert (routing["policy"], routing["adapters"]) == (policy, adapters)
    assert routing["router_generation"] == (3 if policy == "routed" else None)


def test_the_prompt_gates_stretches_are_told_by_name(harness: Harness, client: httpx.Client) -> None:
    harness.registry.has_prompt_gate = True
    stretches = [{"tokens": 2, "adapter": "mbpp"}, {"tokens": 1, "adapter": "base"}]
    assert trace(client, "summary")["prompt"] == stretches
    assert "prompt" not in trace(client, "summary", model="sst2"), "a pinned request has none"
    body = {"model": "auto", "prompt": ["long enough", "a", "also long"], "max_tokens": 1, "n": 2}
    choices = client.post(COMPLETIONS, json={**body, "routing": {"trace": "summary"}}).json()["choices"]
    assert [choice["routing"].get("prompt") for choice in choices] == [stretches] * 2 + [None] * 2 + [stretches] * 2
    assert harness.registry.readers
    assert all(name.startswith("tokenizer") for name in harness.registry.readers), "not the event loop"


def test_of_a_stretch_that_goes_on_in_the_answer_the_prompts_part_is_told(
    harness: Harness, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = (PlanSpan(2, BASE_PLAN), PlanSpan(ENDLESS, fixed_plan(Policy.PINNED, {2: 1.0}, {2: "mbpp"})))
    monkeypatch.setattr(harness.registry, "prompt_course", lambda *_: PlanCourse(spans))
    body = {"model": "auto", "prompt": "long enough", "max_tokens": 1, "routing": {"trace": "summary"}}
    answer = client.post(COMPLETIONS, json=body).json()
    first, second = answer["choices"][0]["routing"]["prompt"]
    assert first == {"tokens": 2, "adapter": "base"}
    assert second == {"tokens": answer["usage"]["prompt_tokens"] - 2, "adapter": "mbpp"}


def test_of_an_unsure_stretch_the_weights_of_all_that_act_are_told(
    harness: Harness, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = {1: "gsm8k", 2: "mbpp"}
    mixture = fixed_plan(Policy.WEIGHTED, {1: 0.375, 2: 0.625}, digests)
    monkeypatch.setattr(
        harness.registry, "prompt_course", lambda *_: PlanCourse((PlanSpan(2, mixture), PlanSpan(3, BASE_PLAN)))
    )
    assert trace(client, "summary")["prompt"] == [
        {"tokens": 2, "adapter": "mbpp", "weights": {"gsm8k": 0.375, "mbpp": 0.625}},
        {"tokens": 1, "adapter": "base"},
    ]


def test_adapters_that_the_router_leaves_out_are_told(
    harness: Harness, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def course(plan: GatePlan, *_: object) -> PlanCourse:
        left_out = max(plan.allowed_slots)
        return PlanCourse((PlanSpan(2, BASE_PLAN), PlanSpan(ENDLESS, without(plan, [left_out], {left_out: "digest"}))))

    monkeypatch.setattr(harness.registry, "prompt_course", course)
    first, second = trace(client, "summary")["prompt"]
    assert first == {"tokens": 2, "adapter": "base"}
    assert (second["adapter"], len(second["left_out"])) == (None, 1)


@pytest.mark.parametrize("level", ["summary", "tokens", "layers"])
@pytest.mark.parametrize("stop", [None, "wö"])
def test_streamed_trace_joins_to_that_of_the_whole_answer(client: httpx.Client, level: str, stop: str | None) -> None:
    fields = {"max_tokens": 20, "stop": stop}
    whole = trace(client, level, **fields)
    body = {"model": "auto", "messages": MESSAGES, "routing": {"trace": level}, **fields}
    traces = [c["choices"][0]["routing"] for c in stream(client, CHAT, body) if "routing" in c["choices"][0]]
    joined = dict(traces[-1])
    if level == "summary":
        assert len(traces) == 1
    else:
        joined["tokens"] = [token for part in traces for token in part["tokens"]]
        assert all(part.keys() == {"tokens"} for part in traces[:-1])
    assert joined == whole


def test_every_choice_has_its_own_trace(client: httpx.Client) -> None:
    body = {"model": "auto", "prompt": ["a", "b"], "n": 2, "max_tokens": 3, "routing": {"trace": "tokens"}}
    choices = client.post(COMPLETIONS, json=body).json()["choices"]
    assert [len(choice["routing"]["tokens"]) for choice in choices] == [3, 3, 3, 3]


def test_no_trace_unless_asked_for(client: httpx.Client) -> None:
    response = client.post(CHAT, json={"model": "auto", "messages": MESSAGES})
    assert "routing" not in response.json()["choices"][0]


def test_scoring_only_has_an_empty_summary(client: httpx.Client) -> None:
    body = {"model": "auto", "prompt": "ab", "max_tokens": 0, "echo": True, "routing": {"trace": "tokens"}}
    routing = client.post(COMPLETIONS, json=body).json()["choices"][0]["routing"]
    assert (routing["adapters"], routing["tokens"]) == ({}, [])
