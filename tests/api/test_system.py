"""Health, readiness, metrics, the playground's files and the OpenAPI document."""

import re
from pathlib import Path

import httpx
import pytest

from server.api.auth import PROTECTED_PREFIXES
from server.api.system import PLAYGROUND_FOLDER
from tests.api.fakes import Harness

CHANGING = ("/v1/adapters", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/router")


def test_health_and_readiness_of_a_serving_app(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    ready = client.get("/ready")
    assert (ready.status_code, ready.json()["ready"], ready.json()["reason"]) == (200, True, None)


async def test_nothing_is_ready_before_the_start() -> None:
    transport = httpx.ASGITransport(Harness().app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        response = await client.get("/ready")
        assert (response.status_code, response.json()["reason"]) == (503, "starting")
        assert (await client.get("/health")).status_code == 503
        response = await client.post("/v1/completions", json={"model": "auto", "prompt": "x"})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
        assert response.headers["retry-after"] == "5"


def test_failed_warm_up_keeps_the_server_unready(caplog: pytest.LogCaptureFixture) -> None:
    harness = Harness()
    harness.runner.fail_after = 0
    with harness.serve(waits=False) as client:
        for _ in range(500):
            response = client.get("/ready")
            if "failed" in response.json()["reason"]:
                break
        assert (response.status_code, response.json()["reason"]) == (503, "warm-up failed; see the server's log")
        assert client.get("/health").status_code == 200
    assert "warm-up failed" in caplog.text


def test_dead_engine_is_unhealthy_and_unready() -> None:
    harness = Harness()
    with harness.serve() as client:
        harness.engine.stop()
        assert client.get("/health").status_code == 503
        assert client.get("/ready").json()["reason"] == "the engine has stopped"
        assert client.post("/v1/completions", json={"model": "auto", "prompt": "x"}).status_code == 503


def test_metrics_are_prometheus_text(client: httpx.Client) -> None:
    client.post("/v1/completions", json={"model": "gsm8k", "prompt": "x", "max_tokens": 2})
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert 'lora_mixer_requests_total{finish_reason="length",model="gsm8k"}' in response.text
    assert "lora_mixer_running_requests 0.0" in response.text


def test_token_counters_add_up_to_what_answers_report() -> None:
    harness = Harness()
    with harness.serve() as client:
        body = {"model": "auto", "prompt": "x" * 40, "max_tokens": 3, "ignore_eos": True}
        usages = [client.post("/v1/completions", json=body).json()["usage"] for _ in range(3)]
    value = harness.metrics.registry.get_sample_value
    assert usages[1]["prompt_tokens_details"]["cached_tokens"] == 32
    assert value("lora_mixer_prompt_tokens_total") == sum(usage["prompt_tokens"] for usage in usages)
    assert value("lora_mixer_generation_tokens_total") == sum(usage["completion_tokens"] for usage in usages)
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert value("lora_mixer_prefix_cache_hit_tokens_total") == cached


def test_metrics_never_take_labels_from_clients(client: httpx.Client) -> None:
    client.post("/v1/completions", json={"model": "made-up-model", "prompt": "x"})
    client.post("/v1/completions", json={"model": "auto", "prompt": "x", "adapters": ["made-up-adapter"]})
    assert "made-up" not in client.get("/metrics").text


@pytest.mark.parametrize("path", ["/", "/playground/playground.js", "/playground/playground.css"])
def test_playground_is_served_under_a_strict_policy(client: httpx.Client, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"


def test_playground_loads_nothing_from_elsewhere_and_writes_no_html() -> None:
    files = {path.name: path.read_text() for path in PLAYGROUND_FOLDER.iterdir()}
    assert files.keys() == {"index.html", "playground.css", "playground.js", "answer.js", "dom.js", "requests.js"}
    for text in files.values():
        assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    assert not re.search(r"<script>|<style|\sstyle=|\son\w+=", files["index.html"])


def test_playground_serves_no_other_file(client: httpx.Client) -> None:
    for path in ("/playground/nothing.js", "/playground/../app.py", "/playground/%2e%2e/app.py"):
        assert client.get(path).status_code == 404


def test_openapi_describes_every_route_and_field(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert document["paths"].keys() >= {
        "/health", "/ready", "/metrics", "/v1/models", "/v1/models/{model_id}", "/v1/chat/completions",
        "/v1/completions", "/v1/adapters", "/v1/adapters/{name}", "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter", "/v1/router", "/tokenize", "/detokenize",
    }  # fmt: skip
    chat = document["components"]["schemas"]["ChatBody"]
    assert chat["required"] == ["model", "messages"]
    assert chat["additionalProperties"] is False
    assert chat["properties"]["temperature"]["maximum"] == 2
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_openapi_has_fields_of_one_type_that_may_be_null(client: httpx.Client) -> None:
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": float}
    document = client.get("/openapi.json").json()
    for body in ("ChatBody", "CompletionBody", "TokenizeBody", "RegisterBody", "StreamOptions"):
        schema = document["components"]["schemas"][body]
        for name, field in schema["properties"].items():
            types = {field["type"]} if isinstance(field.get("type"), str) else set(field.get("type", ()))
            types |= {alternative.get("type") for alternative in field.get("anyOf", ())}
            assert ("null" in types) == (name not in schema.get("required", ())), (body, name)
            if "default" in field and field["default"] is not None:
                assert any(isinstance(field["default"], kinds[type_]) for type_ in types & kinds.keys()), (body, name)


def test_openapi_names_what_is_answered_besides_json(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path in ("/v1/chat/completions", "/v1/completions"):
        content = paths[path]["post"]["responses"]["200"]["content"]
        assert content.keys() == {"application/json", "text/event-stream"}
    assert paths["/metrics"]["get"]["responses"]["200"]["content"].keys() == {"text/plain"}
    assert "503" in paths["/health"]["get"]["responses"]
    assert "503" in paths["/ready"]["get"]["responses"]
    assert "202" in paths["/v1/adapters/{name}/calibrate"]["post"]["responses"]


def test_openapi_says_which_keys_a_route_takes(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert document["components"]["securitySchemes"].keys() == {"key", "adminKey"}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            names = {name for alternative in operation.get("security", ()) for name in alternative}
            assert ("key" in names) == path.startswith(PROTECTED_PREFIXES), path
            changes = method == "delete" or (method == "post" and path.startswith(CHANGING))
            assert ("adminKey" in names) == changes, path


def test_no_route_but_ours_is_served(client: httpx.Client) -> None:
    for path in ("/docs", "/redoc", "/playground.html"):
        assert client.get(path).status_code == 404
    assert Path(PLAYGROUND_FOLDER / "index.html").exists()
