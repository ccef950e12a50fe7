"""Answers under two servers: which tokens are counted, and the table."""

from pathlib import Path

import httpx
import pytest

from benchmarks import answer_nll
from benchmarks.answer_nll import Total, answer_logprobs, read_chats, table, tokens_behind_the_end
from tests.router_training.conftest import chat_line


def test_the_first_chats_of_every_folder_are_read(tmp_path: Path) -> None:
    for name in ("letters", "digits"):
        (tmp_path / name).mkdir()
        lines = "".join(chat_line(name, index) for index in range(5))
        (tmp_path / name / "validation.jsonl").write_text(lines, encoding="utf-8")
    chats = read_chats(tmp_path, 3)
    assert {name: len(rows) for name, rows in chats.items()} == {"digits": 3, "letters": 3}
    assert all(messages[-1]["role"] == "assistant" for rows in chats.values() for messages in rows)
    with pytest.raises(SystemExit, match="no folders with a validation"):
        read_chats(tmp_path / "letters", 3)


async def test_the_tokens_behind_the_prompt_are_the_answers() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        body = httpx.Response(200, content=request.content).json()
        if request.url.path == "/tokenize":
            if not body["add_generation_prompt"] and body["messages"][-1]["content"] != "b":
                return httpx.Response(200, json={"tokens": [5, len(body["messages"][-1]["content"]), 2, 9]})
            tokens = [5, 6, 7] if body["add_generation_prompt"] else [5, 6, 7, 8, 2, 9]
            return httpx.Response(200, json={"tokens": tokens})
        assert body["prompt"] == [5, 6, 7, 8, 2, 9]
        found = [None, *({str(token): {"logprob": -float(token)}} for token in (6, 7, 8, 2, 9))]
        return httpx.Response(200, json={"choices": [{"prompt_logprobs": found}]})

    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://x") as client:
        behind = await tokens_behind_the_end(client, "auto")
        assert behind == 1, "2 ends an answer, 9 is the template's"
        assert await answer_logprobs(client, "auto", messages, behind) == [-8.0, -2.0]


async def test_a_refusal_ends_the_measurement_with_its_reason() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(404, text="no such model"))
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        with pytest.raises(SystemExit, match="POST /tokenize: 404 no such model"):
            await answer_nll.request(client, "POST", "/tokenize", {})


def test_ratios_of_tasks_and_of_their_mean() -> None:
    before = {("a", "base"): Total(8.0, 2), ("b", "base"): Total(4.0, 4), ("a", "auto"): Total(1.0, 1)}
    after = {("a", "base"): Total(4.0, 2), ("b", "base"): Total(8.0, 4), ("a", "auto"): Total(1.5, 1)}
    assert table(before, after).splitlines()[2:] == [
        "| a | 4.0000 | 0.5000 | 1.0000 | 1.5000 |",
        "| b | 1.0000 | 2.0000 | – | – |",
        "| mean | 2.5000 | 0.8000 | 1.0000 | 1.5000 |",
    ]
