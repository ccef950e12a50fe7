"""Answers with very many log probabilities: how they are written, and how many there may be."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from server.api import long_json
from server.api.errors import encode_json
from server.api.long_json import MAX_ENTRIES, encode_long
from tests.api.envelope import refusal
from tests.api.fakes import Harness

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

CONTENTS: list[Any] = [
    {},
    [],
    {"id": "x", "choices": [], "usage": {"total_tokens": 3}},
    {"a": {"b": list(range(3 * MAX_ENTRIES + 1)), "c": {}, "d": None}, "e": "\ud800é\n"},
    [{"token": "é", "top": {"a": -1.5}} for _ in range(2 * MAX_ENTRIES)],
]


@pytest.mark.parametrize("content", CONTENTS)
def test_pieces_are_the_bytes_of_the_whole(content: Any) -> None:
    assert encode_long(content) == encode_json(content)


def test_entries_of_an_iterator_are_made_one_at_a_time_and_pieces_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    made: list[int] = []

    def recording(content: Any) -> bytes:
        lengths.append(len(content) if isinstance(content, list) else 0)
        return encode_json(content)

    def choices() -> Iterator[dict[str, Any]]:
        for index in range(3):
            made.append(len(lengths))
            yield {"index": index, "logprobs": {"tokens": list(range(1000))}}

    monkeypatch.setattr(long_json, "encode_json", recording)
    answer = json.loads(encode_long({"choices": choices(), "usage": {}}))
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert max(lengths) == MAX_ENTRIES
    assert made[0] < made[1] < made[2], "each is made after the one before was written"


def test_streamed_and_whole_answers_agree_where_prompts_are_long(client: httpx.Client) -> None:
    body = {"model": "auto", "prompt": "x" * 400, "max_tokens": 0, "prompt_logprobs": 1, "echo": True, "logprobs": 2}
    (whole,) = client.post(COMPLETIONS, json=body).json()["choices"]
    lines = client.post(COMPLETIONS, json={**body, "stream": True}).text.split("\n\n")
    assert json.loads(lines[0].removeprefix("data: "))["choices"] == [whole]
    assert len(whole["logprobs"]["tokens"]) == 400


MANY = ["x" * 299] * 1024


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (COMPLETIONS, {"prompt": MANY, "max_tokens": 0, "echo": True, "logprobs": 20}, "logprobs"),
        (COMPLETIONS, {"prompt": MANY, "max_tokens": 1, "prompt_logprobs": 20, "logprobs": 1}, "prompt_logprobs"),
        (COMPLETIONS, {"prompt": MANY[:64], "n": 16, "max_tokens": 100, "logprobs": 20}, "logprobs"),
    ],
)
def test_more_than_fit_into_an_answer_are_refused_by_name(
    client: httpx.Client, harness: Harness, path: str, fields: dict[str, Any], param: str
) -> None:
    error = refusal(client.post(path, json={"model": "auto", **fields}), 400)
    assert error["param"] == param
    assert "at most 2097152 fit into one answer" in error["message"]
    assert harness.registry.num_open_leases == 0


def test_no_single_sequence_has_too_many(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.prompts.MAX_LOGPROBS_IN_ANSWER", 10)
    body = {"model": "auto", "messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 20}
    assert client.post(CHAT, json=body).status_code == 200
    error = refusal(client.post(CHAT, json={**body, "n": 2}), 400)
    assert error["param"] == "top_logprobs"
    assert client.post(CHAT, json={**body, "n": 2, "max_tokens": 9}).status_code == 200
