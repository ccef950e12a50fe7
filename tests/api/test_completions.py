"""POST /v1/completions: prompts in every form, echo, logprobs with exact offsets, and scoring without generating."""

import itertools
from typing import Any

import httpx
import pytest

from tests.api.fakes import Harness
from tests.api.sse import stream, texts

PATH = "/v1/completions"


def ask(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post(PATH, json={"model": "auto", **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_whole_answer_has_openais_shape(client: httpx.Client) -> None:
    answer = ask(client, prompt="hello")
    assert answer.pop("id").startswith("cmpl-")
    answer.pop("created")
    assert answer == {
        "object": "text_completion",
        "model": "auto",
        "choices": [{"index": 0, "text": "Hello, wörld!", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 1,
            "completion_tokens": 15,
            "total_tokens": 16,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


@pytest.mark.parametrize(
    ("prompt", "token_ids"),
    [
        ("ab", [[97, 98]]),
        ([97, 98], [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        ([[97, 98], [258]], [[97, 98], [258]]),
        (["ab", [99]], [[97, 98], [99]]),
    ],
)
def test_prompts_of_every_form_are_computed(
    client: httpx.Client, harness: Harness, prompt: Any, token_ids: list[list[int]]
) -> None:
    answer = ask(client, prompt=prompt, max_tokens=2)
    assert sorted(sequence.prompt_token_ids for sequence in harness.runner.seen) == sorted(token_ids)
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(token_ids)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, token_ids))


def test_choice_index_is_prompt_index_times_n_plus_sample(client: httpx.Client, harness: Harness) -> None:
    answer = ask(client, prompt=["a", "b", "c"], n=2, echo=True, seed=10, max_tokens=1)
    assert [choice["text"] for choice in answer["choices"]] == ["aH", "aH", "bH", "bH", "cH", "cH"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3, 4, 5]
    assert sorted(sequence.params.seed or 0 for sequence in harness.runner.seen) == [10, 10, 10, 11, 11, 11]


def test_streamed_choices_of_several_prompts_join_to_the_whole_answer(client: httpx.Client) -> None:
    fields = {"prompt": ["a", "b"], "n": 2, "echo": True, "max_tokens": 9}
    chunks = stream(client, PATH, {"model": "auto", **fields})
    whole = ask(client, **fields)
    assert texts(chunks) == {choice["index"]: choice["text"] for choice in whole["choices"]}
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


def test_special_tokens_are_added_to_text_prompts_unless_refused(client: httpx.Client, harness: Harness) -> None:
    ask(client, prompt="BOS", max_tokens=1)
    ask(client, prompt="BOS", max_tokens=1, add_special_tokens=False)
    assert [seen.prompt_token_ids for seen in harness.runner.seen] == [[256, *b"BOS"], [*b"BOS"]]


def test_default_max_tokens_shrinks_to_what_fits(client: httpx.Client) -> None:
    usage = ask(client, prompt=[65] * 505, ignore_eos=True)["usage"]
    assert usage["completion_tokens"] == 7


def test_echo_with_logprobs_lines_up_prompt_and_completion(client: httpx.Client) -> None:
    logprobs = ask(client, prompt="hello é", echo=True, logprobs=1, max_tokens=2)["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["hello", " ", "bytes:\\xc3", "bytes:\\xa9", "H", "e"],
        "token_logprobs": [None, -1.5, -1.5, -1.5, -1.5, -1.5],
        "top_logprobs": [None, *({"Z": -0.25, label: -1.5} for label in (" ", "bytes:\\xc3", "bytes:\\xa9", "H", "e"))],
        "text_offset": [0, 5, 6, 6, 7, 8],
    }


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_scoring_a_prompt_as_evaluation_harnesses_do(client: httpx.Client, max_tokens: int) -> None:
    prompts = [[104, 105, 33], [258, 259]]
    answer = ask(client, prompt=prompts, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0)
    for choice, prompt in zip(answer["choices"], prompts, strict=True):
        assert len(choice["logprobs"]["token_logprobs"]) == len(prompt) + max_tokens
        assert choice["finish_reason"] == "length"
        assert choice["text"].startswith("hi!" if len(prompt) == 3 else "hello world")
    assert answer["usage"]["completion_tokens"] == 2 * max_tokens


def test_prompt_logprobs_without_echo_score_the_prompt_only(client: httpx.Client) -> None:
    choice = ask(client, prompt="ab", prompt_logprobs=0, max_tokens=0)["choices"][0]
    assert choice["text"] == ""
    assert choice["prompt_logprobs"] == [None, {"98": {"logprob": -1.5, "rank": 2, "decoded_token": "b"}}]
    assert choice["logprobs"] is None


@pytest.mark.parametrize("fields", [{"echo": True}, {"stop": "wö"}, {"echo": True, "stop": "zzz", "n": 2}])
def test_streamed_logprobs_join_to_those_of_the_whole_answer(client: httpx.Client, fields: dict[str, Any]) -> None:
    fields = {"prompt": ["é?", "hello"], "logprobs": 2, "max_tokens": 12, **fields}
    joined: dict[int, dict[str, list[Any]]] = {}
    for chunk in stream(client, PATH, {"model": "auto", **fields}):
        for choice in chunk["choices"]:
            for name, values in (choice["logprobs"] or {}).items():
                joined.setdefault(choice["index"], {}).setdefault(name, []).extend(values)
    assert joined == {choice["index"]: choice["logprobs"] for choice in ask(client, **fields)["choices"]}


def test_text_offsets_point_at_each_tokens_text(client: httpx.Client, harness: Harness) -> None:
    harness.runner.reply = "aé🙂 world"
    choice = ask(client, prompt="hello", echo=True, logprobs=0, max_tokens=64)["choices"][0]
    offsets = [*choice["logprobs"]["text_offset"], len(choice["text"])]
    pieces = [choice["text"][start:end] for start, end in itertools.pairwise(offsets)]
    assert pieces == ["hello", "a", "", "é", "", "", "", "🙂", " world", ""]


def test_token_ids_of_prompt_and_completion_come_back_on_request(client: httpx.Client) -> None:
    choice = ask(client, prompt="hi", return_token_ids=True, max_tokens=2)["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([*b"hi"], [*b"He"])
    fields = {"model": "auto", "prompt": "hi", "return_token_ids": True, "max_tokens": 2}
    choices = [chunk["choices"][0] for chunk in stream(client, PATH, fields)]
    assert [choice.get("prompt_token_ids") for choice in choices] == [[*b"hi"], None]
    assert [choice["token_ids"] for choice in choices] == [[*b"H"], [*b"e"]]


def test_best_of_equal_to_n_asks_for_nothing_more(client: httpx.Client) -> None:
    assert len(ask(client, prompt="a", n=2, best_of=2, max_tokens=1)["choices"]) == 2
