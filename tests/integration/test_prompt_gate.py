"""A served router with a prompt gate: over HTTP, beside a server that does not obey it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch
import yaml

from server.routing.chat_frame import ChatFrame
from server.routing.prompt_gate import PromptGate
from server.routing.router import load_artefact, save_artefact
from tests.integration.tiny import make_tiny_root, serve_here

PROMPT = "Q:aaaaaabbbbbb\nA:"


def tokenize(url: str, text: str) -> list[int]:
    tokens: list[int] = httpx.post(f"{url}/tokenize", json={"prompt": text}).json()["tokens"]
    return tokens


def give_prompt_gate(root: Path, tokens_of: Callable[[str], list[int]], *, has_turns: bool = False) -> None:
    """The letter a speaks for the first adapter of the router and b for the second; questions stand as in `PROMPT`. If
    it `has_turns`, a semicolon ends the first task's answer."""
    artefact = load_artefact(root / "router")
    scores = torch.zeros(300, len(artefact.adapters), dtype=torch.float16)
    for column, letter in enumerate("ab"):
        scores[tokens_of(letter)[0], column] = 4.0
    answer, line_end = tokens_of("\nA:") if has_turns else [], tokens_of(";")[0]
    frame = ChatFrame(tuple(tokens_of("Q:")), tokens_of("\n")[0], tuple(answer), ((line_end, 1),))
    gate = PromptGate(scores, frame, answer_ends=(1,) * len(artefact.adapters))
    save_artefact(replace(artefact, prompt_gate=gate), root / "router")


def complete(url: str, **fields: Any) -> dict[str, Any]:
    body = {"model": "auto", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "routing": {"trace": "summary"}}
    response = httpx.post(f"{url}/v1/completions", json={**body, **fields}, timeout=60)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_a_prompts_clear_stretches_go_to_one_adapter(
    tmp_path: Path, tiny_llama: Callable[..., Any], make_adapter: Callable[..., Path]
) -> None:
    make_tiny_root(tmp_path, tiny_llama, make_adapter, num_adapters=3, num_configured=2)
    with serve_here(tmp_path) as server:
        tokens_of = partial(tokenize, server.url)
        before = complete(server.url)
        assert "prompt" not in before["choices"][0]["routing"]
        assert httpx.get(f"{server.url}/v1/router").json()["prompt_gate"] is None
        give_prompt_gate(tmp_path, tokens_of)
        swapped = httpx.post(f"{server.url}/v1/router", json={"path": "router"})
        assert swapped.json()["prompt_gate"]["confidence"] == 0.5, swapped.text

        after = complete(server.url)
        stretches = after["choices"][0]["routing"]["prompt"]
        assert stretches == [{"tokens": 8, "adapter": "a0"}, {"tokens": 6, "adapter": "a1"}]
        assert after["choices"][0]["text"] != before["choices"][0]["text"], "prompts must be computed otherwise"
        again = complete(server.url)
        assert again["choices"][0]["text"] == after["choices"][0]["text"]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 16

        conversation = PROMPT + "cccccccccccccc\nQ:bbbb\nA:"
        later = complete(server.url, prompt=conversation)
        assert later["choices"][0]["routing"]["prompt"][:2] == stretches
        assert later["choices"][0]["routing"]["prompt"][-1] == {"tokens": 6, "adapter": "a1"}
        assert sum(stretch["tokens"] for stretch in later["choices"][0]["routing"]["prompt"]) == 17 + 15 + 6
        assert later["usage"]["prompt_tokens_details"]["cached_tokens"] == 16, "a later question changes nothing before"
        alone = complete(server.url, prompt=conversation, cache_salt="another")
        assert alone["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert alone["choices"][0]["text"] == later["choices"][0]["text"]

        narrowed = complete(server.url, adapters=["a0"])
        assert narrowed["choices"][0]["routing"]["prompt"] == [{"tokens": 14, "adapter": "a0"}]
        pinned = complete(server.url, model="a1")
        assert "prompt" not in pinned["choices"][0]["routing"]
        registered = httpx.post(
            f"{server.url}/v1/adapters", json={"name": "a2", "source": "./sources/a2", "wait": True}, timeout=60
        )
        assert registered.status_code == 201, registered.text
        assert complete(server.url)["choices"][0]["text"] == after["choices"][0]["text"], "it is served by name only"

    config = yaml.safe_load((tmp_path / "adapters.yaml").read_text())
    config["server"]["prompt_gate"] = False
    (tmp_path / "adapters.yaml").write_text(yaml.safe_dump(config))
    with serve_here(tmp_path) as server:
        off = complete(server.url)
        assert "prompt" not in off["choices"][0]["routing"]
        assert off["choices"][0]["text"] == before["choices"][0]["text"]


def test_the_second_tasks_answer_begins_with_its_adapter(
    tmp_path: Path, tiny_llama: Callable[..., Any], make_adapter: Callable[..., Path]
) -> None:
    """Whether the first answer stands in the prompt or is generated; here every token of it is a semicolon."""
    make_tiny_root(tmp_path, tiny_llama, make_adapter, num_adapters=2, num_configured=2)
    with serve_here(tmp_path) as server:
        tokens_of = partial(tokenize, server.url)
        give_prompt_gate(tmp_path, tokens_of, has_turns=True)
        swapped = httpx.post(f"{server.url}/v1/router", json={"path": "router"})
        assert swapped.status_code == 200, swapped.text
        question = [{"tokens": 8, "adapter": "a0"}, {"tokens": 6, "adapter": "a1"}, {"tokens": 3, "adapter": "a0"}]
        written = complete(server.url, prompt=PROMPT + "cc;c")["choices"][0]["routing"]["prompt"]
        assert written == [*question, {"tokens": 2, "adapter": None}, {"tokens": 1, "adapter": "a1"}]

        bias = {str(tokens_of(";")[0]): 100}
        trace = {"routing": {"trace": "tokens"}, "max_tokens": 4, "logit_bias": bias, "logprobs": 0}
        generated = complete(server.url, **trace)["choices"][0]
        assert generated["text"] == ";;;;"
        assert [token["adapters"] for token in generated["routing"]["tokens"]] == [{"a0": 1.0}] + [{"a1": 1.0}] * 3
        assert generated["routing"]["prompt"] == question
        scored = complete(server.url, prompt=PROMPT + ";;;;", max_tokens=0, echo=True, logprobs=0, routing=None)
        whole = scored["choices"][0]["logprobs"]["token_logprobs"]
        for alone, together in zip(generated["logprobs"]["token_logprobs"], whole[-4:], strict=True):
            assert abs(alone - together) < 1e-4, "a continued answer is computed as it was generated"
