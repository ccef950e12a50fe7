"""Reading, checking, sampling and hashing chat folders."""

import codecs
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from router_training.data import (
    Chat,
    TrainingDataError,
    balanced_sample,
    data_digest,
    has_task,
    read_chats,
    read_splits,
)


def row(question: str = "2+2?", answer: str = "4") -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"task": "anything", "messages": messages}


def write(path: Path, *lines: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in lines),
        encoding="utf-8",
    )


def make_chats(task: str, count: int) -> list[Chat]:
    return [Chat(task, ({"role": "user", "content": f"{task} {i}"},), f"{task}:{i}") for i in range(count)]


def test_chats_are_labelled_by_their_folder_and_know_their_line(tmp_path: Path) -> None:
    write(tmp_path / "maths/train.jsonl", row("1+1?", "2"), "", row())
    chats = read_splits([tmp_path], ["maths"], ("train",))["train"]["maths"]
    assert [chat.task for chat in chats] == ["maths", "maths"]
    assert [chat.origin.rpartition(":")[2] for chat in chats] == ["1", "3"]
    assert chats[0].messages[-1] == {"role": "assistant", "content": "2"}


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path: Path) -> None:
    write(tmp_path / "maths/train.jsonl", row("one\u2028two\x85three"))
    assert len(read_splits([tmp_path], ["maths"], ("train",))["train"]["maths"]) == 1


def test_every_problem_of_every_file_is_reported_at_once(tmp_path: Path) -> None:
    write(tmp_path / "maths/train.jsonl", row(), "{broken", {"task": "maths"}, [1], {"messages": [{"role": "user"}, 3]})
    write(tmp_path / "maths/validation.jsonl")
    write(tmp_path / "code/train.jsonl", {"messages": list(reversed(row()["messages"]))}, row(answer=" "))
    with pytest.raises(TrainingDataError) as caught:
        read_splits([tmp_path], ["maths", "code"])
    problems = [problem.removeprefix(f"{tmp_path}/") for problem in caught.value.problems]
    beginnings = [
        "maths/train.jsonl:2: not JSON",
        "maths/train.jsonl:3: field 'messages' is missing",
        "maths/train.jsonl:4: not a JSON object",
        "maths/train.jsonl:5: messages[0]: field 'content' is missing",
        "code/train.jsonl:1: the last message must be the assistant's",
        "code/train.jsonl:2: the answer is empty",
        "maths/validation.jsonl: the file is empty, so adapter 'maths' has no samples",
        "code/validation.jsonl: adapter 'code' has no readable samples",
    ]
    assert len(problems) == len(beginnings)
    for problem, beginning in zip(problems, beginnings, strict=True):
        assert problem.startswith(beginning)
    assert all(problem in caught.value.message for problem in caught.value.problems)


def test_a_missing_field_on_line_4711_is_found_there(tmp_path: Path) -> None:
    lines = [row(f"question {number}") for number in range(1, 5000)]
    del lines[4710]["messages"][1]["content"]
    write(tmp_path / "maths/train.jsonl", *lines)
    with pytest.raises(TrainingDataError) as caught:
        read_splits([tmp_path], ["maths"], ("train",))
    assert caught.value.problems == (f"{tmp_path}/maths/train.jsonl:4711: messages[1]: field 'content' is missing",)


def test_tests_are_read_and_refused_where_they_are_no_list_of_strings(tmp_path: Path) -> None:
    file = tmp_path / "code/train.jsonl"
    write(file, row() | {"tests": ["assert f(1) == 2"]}, row() | {"tests": []}, row() | {"tests": None}, row())
    chats = read_splits([tmp_path], ["code"], ("train",))["train"]["code"]
    assert [chat.tests for chat in chats] == [("assert f(1) == 2",), (), (), ()]
    write(file, row(), *[row() | {"tests": tests} for tests in ("assert f(1) == 2", [1], {"a": "b"})])
    with pytest.raises(TrainingDataError) as caught:
        read_splits([tmp_path], ["code"], ("train",))
    assert caught.value.problems == tuple(f"{file}:{line}: 'tests' must be a list of strings" for line in (2, 3, 4))


def test_folders_add_tasks_and_a_task_in_two_of_them_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "ours/maths/train.jsonl", row())
    write(tmp_path / "yours/code/train.jsonl", row(), row())
    folders = [tmp_path / "ours", tmp_path / "yours"]
    chats = read_splits(folders, ["maths", "code"], ("train",))["train"]
    assert {task: len(rows) for task, rows in chats.items()} == {"maths": 1, "code": 2}
    assert has_task(folders, "code")
    assert not has_task(folders, "base")
    write(tmp_path / "yours/maths/train.jsonl", row())
    with pytest.raises(TrainingDataError, match=r"ours/maths and .*yours/maths: both hold chats of 'maths'"):
        read_splits(folders, ["maths", "code"], ("train",))


def test_a_flood_of_problems_is_counted_but_not_listed_whole() -> None:
    error = TrainingDataError([f"file:{number}: bad" for number in range(80)])
    assert "and 30 more" in error.message
    assert len(error.problems) == 80


def test_sampling_is_balanced_seeded_and_repeats_only_when_a_task_runs_out() -> None:
    chats = {"big": make_chats("big", 100), "small": make_chats("small", 3)}
    sample = balanced_sample(chats, 20, seed=1)
    assert Counter(chat.task for chat in sample) == {"big": 10, "small": 10}
    uses = Counter(chat.origin for chat in sample if chat.task == "small")
    assert sorted(uses.values()) == [3, 3, 4]
    assert max(Counter(chat.origin for chat in sample if chat.task == "big").values()) == 1
    assert sample == balanced_sample(chats, 20, seed=1)
    assert sample != balanced_sample(chats, 20, seed=2)


def test_every_prefix_of_a_sample_is_nearly_balanced() -> None:
    chats = {name: make_chats(name, 50) for name in "abc"}
    sample = balanced_sample(chats, 61, seed=0)
    for length in range(1, 62):
        counts = Counter(chat.task for chat in sample[:length])
        assert max(counts.values()) - min(counts[name] for name in "abc") <= 1


def test_digest_depends_on_content_and_order_only() -> None:
    first, second = make_chats("maths", 2)
    moved = Chat(first.task, first.messages, "elsewhere:7")
    assert data_digest([first, second]) == data_digest([moved, second])
    assert data_digest([first, second]) != data_digest([second, first])
    assert data_digest([first]) != data_digest([Chat("code", first.messages, first.origin)])


BROKEN = {
    "half a pair": (
        b'{"messages": [{"role": "user", "content": "a\\ud800b"}, {"role": "assistant", "content": "c"}]}',
        "half",
    ),
    "role that serving never has": (
        b'{"messages": [{"role": "human", "content": "a"}, {"role": "assistant", "content": "c"}]}',
        "messages[0]: role 'human' is none of system, developer, user, assistant",
    ),
    "other encoding": ('{"messages": "grün"}'.encode("latin-1"), "not UTF-8 (invalid"),
    "too deep": (b"[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_text_that_is_none_is_found_by_line(tmp_path: Path, case: str) -> None:
    line, message = BROKEN[case]
    good = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}).encode()
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\n".join([codecs.BOM_UTF8 + good, b"", line, good + b"\r"]))
    problems: list[str] = []
    assert [chat.origin for chat in read_chats(path, "maths", problems)] == [f"{path}:1", f"{path}:4"]
    assert len(problems) == 1
    assert problems[0].startswith(f"{path}:3: ")
    assert message in problems[0]


def test_a_developers_message_is_the_systems_as_when_serving(tmp_path: Path) -> None:
    messages = [{"role": role, "content": "a"} for role in ("developer", "user", "assistant")]
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"messages": messages}), encoding="utf-8")
    (read,) = read_chats(path, "maths", [])
    assert [message["role"] for message in read.messages] == ["system", "user", "assistant"]
