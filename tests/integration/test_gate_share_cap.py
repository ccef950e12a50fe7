"""An adapter that captures everything, and the cap that ends it: over HTTP, across kill -9, under running requests."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
import yaml

from server.routing.attach import attach_routing
from server.routing.recording import InputRecorder
from server.routing.router import load_artefact, save_artefact
from tests.integration.tiny import make_tiny_root, serve_apart, serve_here

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

PROMPTS = ["the quick brown fox", "jumps over the lazy dog", "0123456789", "lorem ipsum dolor"]
CAP = 0.6


@pytest.fixture
def root(tiny_llama: "Callable[..., LlamaForCausalLM]", make_adapter: Callable[..., Path], tmp_path: Path) -> Path:
    """a0 and a1 under a router that sends a0 nearly everything; a0 has a cap."""
    make_tiny_root(tmp_path, tiny_llama, make_adapter, num_adapters=2, num_configured=2, gate_share_window=400)
    config = yaml.safe_load((tmp_path / "adapters.yaml").read_text())
    config["adapters"][0]["max_gate_share"] = CAP
    (tmp_path / "adapters.yaml").write_text(yaml.safe_dump(config))
    _make_greedy(tmp_path / "router", tiny_llama(tie_word_embeddings=True))
    return tmp_path


def _make_greedy(folder: Path, model: Any) -> None:
    """Rows along and against the mean of what the gates read, with k = 1: the first adapter wins wherever they can."""
    artefact = load_artefact(folder)
    routed = attach_routing(model, num_slots=2)
    tokens = torch.tensor([[index % 250 + 3 for index in range(200)]])
    everything = torch.ones(tokens.shape[1], dtype=torch.bool)
    recorder = InputRecorder(None, routed.bank.snapshot, granularity="layer", keys=artefact.rows, positions=everything)
    with torch.no_grad(), routed.context.running(recorder):
        model.base_model(input_ids=tokens, use_cache=False)
    rows = {}
    for key, inputs in recorder.inputs.items():
        mean = inputs.mean(dim=0)
        rows[key] = torch.stack([mean, -mean])
    fields = {name: getattr(artefact, name) for name in artefact.__dataclass_fields__}
    save_artefact(type(artefact)(**{**fields, "rows": rows, "top_k": 1}), folder)


def ask(url: str, prompt: str, **fields: Any) -> Any:
    body = {"model": "auto", "prompt": prompt, "max_tokens": 40, "ignore_eos": True, "temperature": 0, **fields}
    answer = httpx.post(f"{url}/v1/completions", json={**body, "routing": {"trace": "summary"}}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def info_of(url: str) -> Any:
    return httpx.get(f"{url}/v1/adapters/a0").json()


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f'lora_mixer_{name}{{adapter="a0"}}')).split()[-1])


def capture(url: str) -> float:
    """Traffic until the cap takes effect; a0's share of it, as the traces tell."""
    shares: list[float] = []
    while info_of(url)["exclusion"] is None:
        assert len(shares) < 200, "the cap never took effect"
        shares.append(ask(url, PROMPTS[len(shares) % len(PROMPTS)])["routing"]["adapters"].get("a0", 0.0))
    return sum(shares) / len(shares)


def test_an_adapter_that_captures_everything_is_out_until_an_operator_lets_it_in(root: Path) -> None:
    with serve_apart(root, {}) as (url, process):
        assert info_of(url)["routed"]
        assert metric(url, "adapter_excluded") == 0
        pinned = ask(url, PROMPTS[0], model="a0")["text"]
        assert capture(url) > CAP
        info = info_of(url)
        assert (info["state"], info["routed"], info["max_gate_share"]) == ("READY", False, CAP)
        assert info["exclusion"]["share"] > CAP
        assert "more than its max_gate_share of 0.6" in info["reason"]
        assert metric(url, "adapter_excluded") == 1
        without = ask(url, PROMPTS[0])
        assert without["routing"]["adapters"] == {"a1": 1.0}
        assert ask(url, PROMPTS[0], adapters=["a1"])["text"] == without["text"], "the function of the smaller pool"
        assert ask(url, PROMPTS[0], model="a0")["text"] == pinned, "by name it answers as before"
        refused = httpx.post(f"{url}/v1/completions", json={"model": "auto", "prompt": "x", "adapters": ["a0"]})
        assert refused.json()["error"]["code"] == "adapter_not_routed"
        kept = root / "adapters.state.excluded"
        deadline_s = time.monotonic() + 10
        while not kept.exists():
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        process.kill()
    with serve_apart(root, {}) as (url, process):
        assert info_of(url)["exclusion"] == info["exclusion"]
        assert ask(url, PROMPTS[0])["text"] == without["text"]
        body = {"name": "a0", "source": "sources/a0"}
        again = httpx.post(f"{url}/v1/adapters", json=body).json()
        assert (again["routed"], again["exclusion"], again["generation"]) == (True, None, info["generation"])
        assert metric(url, "adapter_excluded") == 0
        assert ask(url, PROMPTS[0])["routing"]["adapters"].get("a0", 0.0) > CAP
        process.kill()
    with serve_apart(root, {}) as (url, _):
        assert info_of(url)["routed"], "what was let in stays in"


def test_a_running_request_keeps_the_pool_that_it_began_with(root: Path) -> None:
    with serve_here(root) as server:
        options = {"max_tokens": 200, "return_token_ids": True}
        alone = ask(server.url, PROMPTS[0], **options)
        body = {"model": "auto", "prompt": PROMPTS[0], "ignore_eos": True, "temperature": 0, "stream": True, **options}
        tokens: list[int] = []
        slot = server.services.registry.roster.adapters["a0"].slot
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
            for line in stream.iter_lines():
                if not line.startswith("data: {"):
                    continue
                if not tokens:
                    server.services.registry.record_traffic([], [(slot, 1000.0)])
                    assert server.services.registry.has_leases, "it should still be running"
                    assert not info_of(server.url)["routed"]
                tokens += json.loads(line[6:])["choices"][0]["token_ids"]
        assert tokens == alone["token_ids"]
        assert ask(server.url, PROMPTS[0], **options)["routing"]["adapters"] == {"a1": 1.0}
