"""Teacher-forced log-probabilities over HTTP against PEFT and the bare model, for all eight demo adapters."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.integration.conftest import DEMO, RunningServer

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
TOLERANCE = 1e-4
"""fp32 log-probabilities of two orders of the same sums."""
EXAMPLES = {
    "arc": ("Which is a mammal?\nA. trout\nB. whale", "B. whale"),
    "cola": ("Is this sentence acceptable? The cat sat on the mat.", "acceptable"),
    "gsm8k": ("Tom has 3 boxes of 12 pens. How many pens?", "Tom has 3 * 12 = 36 pens.\n#### 36"),
    "mbpp": ("Write a function to add two numbers.", "def add(a, b):\n    return a + b"),
    "pubmedqa": ("Does aspirin lower fever?", "yes. Trials show that it does."),
    "snips": ("Play some jazz by Miles Davis", '{"intent": "PlayMusic"}'),
    "sst2": ("Review: a joyless and tedious film", "negative"),
    "wikisql": ("Table: name, age. How old is Ann?", "SELECT age FROM table WHERE name = 'Ann'"),
}


def token_ids(tokenizer: Any, question: str, answer: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    ids: list[int] = tokenizer.render_chat(messages) + tokenizer.encode(answer, add_special_tokens=False)
    return ids


def served_logprobs(server: RunningServer, model: str, ids: list[int]) -> list[float]:
    body = {"model": model, "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1}
    response = server.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    logprobs = response.json()["choices"][0]["logprobs"]["token_logprobs"]
    assert logprobs[0] is None
    assert len(logprobs) == len(ids)
    values: list[float] = logprobs[1:]
    return values


@torch.no_grad()
def forced_logprobs(model: Any, ids: list[int]) -> list[float]:
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
    chosen = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(ids[1:])[:, None])
    values: list[float] = chosen[:, 0].tolist()
    return values


def test_base_and_all_pinned_adapters_score_as_peft_does(
    demo_server: RunningServer, demo_base: Callable[..., Any]
) -> None:
    loaded = demo_base("float32")
    names = sorted(EXAMPLES)
    ids = {name: token_ids(loaded.tokenizer, *EXAMPLES[name]) for name in names}
    bare = {name: forced_logprobs(loaded.model, ids[name]) for name in names}
    for name in names:
        assert served_logprobs(demo_server, BASE, ids[name]) == pytest.approx(bare[name], abs=TOLERANCE)
    peft = PeftModel.from_pretrained(
        copy.deepcopy(loaded.model), str(DEMO / "adapters" / names[0]), adapter_name=names[0]
    )
    for name in names[1:]:
        peft.load_adapter(str(DEMO / "adapters" / name), adapter_name=name)
    for name in names:
        peft.set_adapter(name)
        expected = forced_logprobs(peft.eval(), ids[name])
        assert expected != pytest.approx(bare[name], abs=0.01), "an adapter that does nothing proves nothing"
        assert served_logprobs(demo_server, name, ids[name]) == pytest.approx(expected, abs=TOLERANCE), name
        weighted = {"model": "auto", "adapters": {name: 1.0}, "prompt": ids[name], "max_tokens": 0}
        response = demo_server.post("/v1/completions", {**weighted, "echo": True, "logprobs": 1})
        assert response.json()["choices"][0]["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=TOLERANCE)


def test_auto_sends_each_task_to_its_adapter(demo_server: RunningServer) -> None:
    """Not a quality claim: the trained router must mostly agree with what the prompts are obviously about."""
    hits = 0
    for name, (question, _) in EXAMPLES.items():
        body = {
            "model": "auto",
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 8,
            "temperature": 0,
            "routing": {"trace": "summary"},
        }
        response = demo_server.post("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
        shares = response.json()["choices"][0]["routing"]["adapters"]
        assert sum(shares.values()) == pytest.approx(1.0, abs=1e-3)
        hits += max(shares, key=shares.__getitem__) == name
    assert hits >= 5, "prompts here are shorter and phrased otherwise than the training data"
