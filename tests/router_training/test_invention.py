"""Questions that the base model makes up: which are kept, where they begin and end, and the command that makes them."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from router_training.__main__ import main
from router_training.data import read_splits
from router_training.invention import (
    MAX_SAMPLES,
    ROWS,
    InventionSettings,
    collect_questions,
    invent_questions,
    question_frame,
)
from router_training.roster import load_roster
from router_training.self_answers import answer_prompts
from server.config import load_config
from server.errors import ConfigError, LoraMixerError
from server.model.tokenizer import ChatTokenizer
from tests.router_training.conftest import CHATML, byte_tokenizer

MAX_TOKENS = 24
HOT: dict[str, Any] = {"temperature": 5.0, "top_p": 1.0, "max_question_tokens": 80}
"""A random model talks noise; hot enough, some of it has spaces and ends."""


@pytest.fixture
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(byte_tokenizer())


def collect(tokenizer: ChatTokenizer, rounds: Iterator[list[str]], count: int, *excluded: str) -> list[str]:
    def sample() -> list[list[int]]:
        return [tokenizer.encode(text, add_special_tokens=False) for text in next(rounds)]

    settings = InventionSettings(count, max_question_tokens=MAX_TOKENS)
    return collect_questions(sample, tokenizer, settings, excluded=excluded)


def test_what_is_no_new_question_is_dropped_and_made_up_for(tokenizer: ChatTokenizer) -> None:
    first = [
        " What is rain?\n",
        "what  IS rain?",
        "Hello there",
        "",
        " \n\t ",
        "a b " + "c" * MAX_TOKENS,
        "a b<|im_start|> c",
        "Why is snow white?",
    ]
    rounds = iter([first, ["Who was it?", "Where is it?"], ["What is rain?", "When was\nthat?", "one too many"]])
    found = collect(tokenizer, rounds, 3, "why is SNOW white? ", "unasked")
    assert found == ["What is rain?", "Who was it?", "Where is it?"]
    assert len(next(rounds)) == 3


def test_a_question_may_be_as_long_as_the_limit(tokenizer: ChatTokenizer) -> None:
    longest = "a b " + "c" * (MAX_TOKENS - 4)
    assert collect(tokenizer, iter([[longest + "c", longest]]), 1) == [longest]


def test_rounds_end_with_an_error_that_says_how_many_were_found(tokenizer: ChatTokenizer) -> None:
    num_rounds = 0

    def rounds() -> Iterator[list[str]]:
        nonlocal num_rounds
        while True:
            num_rounds += 1
            yield ["What is rain?", "Why is it?"] * (ROWS // 2)

    with pytest.raises(LoraMixerError, match=rf"found 2 of 3 questions in {MAX_SAMPLES * ROWS} samples.*ask for fewer"):
        collect(tokenizer, rounds(), 3)
    assert num_rounds == MAX_SAMPLES


def test_a_question_begins_where_the_template_puts_it_behind_its_own_system_message(project: Path) -> None:
    loaded = load_roster(load_config(project / "adapters.yaml")).loaded
    changed = byte_tokenizer()
    changed.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}" + CHATML
    )
    opening, end = question_frame(replace(loaded, tokenizer=ChatTokenizer(changed)), 10)
    text = loaded.tokenizer.decode(opening, skip_special_tokens=False)
    assert text == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
    assert loaded.tokenizer.decode([end], skip_special_tokens=False) == "<|im_end|>"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for message in messages %}{{ message['content'] }}{% endfor %}", "no tokens around a user's words"),
        ("{{ messages[0]['content'] }}<|im_end|>", "no tokens around a user's words"),
        ("{{ raise_exception('not today') }}", "not today"),
        (None, "no chat template"),
    ],
    ids=["no marks", "no opening", "refuses", "none"],
)
def test_a_base_model_without_a_frame_is_refused(project: Path, template: str | None, why: str) -> None:
    roster = load_roster(load_config(project / "adapters.yaml"))
    changed = byte_tokenizer()
    changed.chat_template = template
    roster = replace(roster, loaded=replace(roster.loaded, tokenizer=ChatTokenizer(changed)))
    with pytest.raises(ConfigError, match=rf"cannot invent questions: .*{why}.*; pass --prompts FILE"):
        invent_questions(roster, InventionSettings(1))


def test_questions_are_those_of_their_seed_whatever_their_number(project: Path) -> None:
    roster = load_roster(load_config(project / "adapters.yaml"))

    def invent(count: int, seed: int) -> list[str]:
        return invent_questions(roster, InventionSettings(count, seed, **HOT))

    first = invent(2, 1)
    assert len(set(first)) == 2
    assert all(len(question.split()) >= 3 for question in first)
    assert invent(3, 1)[:2] == first
    assert not set(invent(2, 2)) & set(first)


def test_the_command_writes_questions_not_seen_before_with_greedy_answers(project: Path) -> None:
    roster = load_roster(load_config(project / "adapters.yaml"))
    seen = invent_questions(roster, InventionSettings(2, 1, **HOT))
    flags = ["--seed", "1", "--max-new-tokens", "4"]
    flags += [text for name, value in HOT.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    for index, question in enumerate(seen):
        path = project / f"seen{index}.jsonl"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]
        path.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
        flags += ["--exclude", str(path)]
    out = project / "data" / "base" / "train.jsonl"
    command = ["answer", "--config", str(project / "adapters.yaml"), "--out", str(out), "--invent", "2"]
    assert main([*command, *flags]) == 0
    chats = read_splits([project / "data"], ["base"], ("train",))["train"]["base"]
    questions = [chat.messages[0]["content"] for chat in chats]
    assert questions == invent_questions(roster, InventionSettings(2, 1, **HOT), excluded=seen)
    assert not set(questions) & set(seen)
    assert [chat.messages[1]["content"] for chat in chats] == answer_prompts(roster, questions, 4)


REFUSED: dict[str, tuple[list[str], str]] = {
    "no question": (["--invent", "0"], "--invent must be at least 1"),
    "several": (
        ["--invent", "-1", "--temperature", "0", "--top-p", "1.5", "--seed", "-1", "--max-question-tokens", "0"],
        "--invent must be at least 1; --seed must be from 0 to 2^63 - 1; --temperature must be above 0 and finite; "
        "--top-p must be above 0 and at most 1; --max-question-tokens must be at least 1",
    ),
    "not a number": (["--invent", "1", "--temperature", "nan"], "--temperature must be above 0"),
    "empty nucleus": (["--invent", "1", "--top-p", "0"], "--top-p must be above 0"),
    "no answer": (["--invent", "1", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
    "longer than the model": (["--invent", "1", "--max-question-tokens", "600"], "must be at most 505 for this base"),
    "unreadable exclusion": (["--invent", "1", "--exclude", "absent.jsonl"], "absent.jsonl"),
    "of no use": (["--prompts", "questions.txt", "--seed", "1", "--top-p", "1"], "no use for --seed, --top-p"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_flags_are_refused(project: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags, message = REFUSED[case]
    out = project / "out.jsonl"
    assert main(["answer", "--config", str(project / "adapters.yaml"), "--out", str(out), *flags]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [([], "one of the arguments --prompts --invent is required"), (["--prompts", "a", "--invent", "1"], "not allowed")],
)
def test_questions_come_from_one_place(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["answer", "--out", "x.jsonl", *flags])
    assert message in capsys.readouterr().err
