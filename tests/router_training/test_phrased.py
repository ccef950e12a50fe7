"""Chats asked in other phrasings as a set of its own: what it holds, what it is measured by, and what is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from router_training.__main__ import main
from router_training.data import Chat
from router_training.evaluation import compare_policies
from router_training.phrased import ask_anew, phrasings_digest
from router_training.phrasings import Phrasing, read_phrasings
from server.errors import ConfigError

LETTERS = {"read": ["(?P<text>[a-c]+)"], "write": ["Spell {text}", "{text}, spelt?"]}
QUICK = ["--samples", "16", "--max-length", "64", "--warm-start-samples", "8", "--steps", "0", "--batch-size", "4"]


def phrasing(*templates: str, read: str = "Say (?P<text>.*)") -> Phrasing:
    return Phrasing((re.compile(read),), templates)


def chat(task: str, question: str) -> Chat:
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": "yes"})
    return Chat(task, messages, "here:1")


def write_phrasings(project: Path, **tasks: Any) -> Path:
    path = project / "phrasings.yaml"
    path.write_text(yaml.safe_dump(tasks), encoding="utf-8")
    return path


def run(project: Path, command: str, *flags: str) -> int:
    inputs = ["--config", str(project / "adapters.yaml"), "--data", str(project / "data")]
    return main([command, *inputs, *flags])


@pytest.fixture
def trained(project: Path) -> Path:
    """The tiny project with off-domain chats and a router."""
    shutil.copytree(project / "data/letters", project / "data/base")
    assert run(project, "train", "--out", str(project / "router"), *QUICK, "--validation-rows", "1") == 0
    return project


def evaluate(project: Path, *flags: str) -> dict[str, Any]:
    out = project / "record.json"
    assert run(project, "evaluate", "--router", str(project / "router"), "--out", str(out), *flags) == 0
    record: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return record


def test_what_can_be_read_is_asked_anew_and_the_rest_left_out() -> None:
    chats = {"base": [chat("base", "Say 1")], "a": [chat("a", "Say 2"), chat("a", "Sing 3")], "b": [chat("b", "Say 4")]}
    found = ask_anew(chats, {"a": phrasing("{text}, please")})
    assert found == {"a": [chat("a", "2, please")]}


def test_a_template_that_asks_as_before_counts_as_asked() -> None:
    chats = {"a": [chat("a", "Say 2")]}
    assert ask_anew(chats, {"a": phrasing("Say {text}")}) == chats


def test_a_chat_is_asked_alike_whatever_other_chats_there_are() -> None:
    phrasings = {task: phrasing("{text}?", "{text}!", "{text}.") for task in "ab"}
    rows = {task: [chat(task, f"Say {index}") for index in range(30)] for task in "ab"}
    whole = ask_anew(rows, phrasings)
    first = ask_anew({"b": rows["b"][:5]}, {"b": phrasings["b"]})
    assert first["b"] == whole["b"][:5]
    assert len({each.messages[0]["content"][-1] for each in whole["a"]}) == 3


def test_phrasings_without_chats_or_without_a_chat_that_they_read_are_refused() -> None:
    chats = {"base": [chat("base", "Say 1")], "a": [chat("a", "Sing 2")]}
    with pytest.raises(ConfigError, match="there are phrasings of b, c, but no validation chats"):
        ask_anew(chats, {"c": phrasing("{text}"), "b": phrasing("{text}"), "a": phrasing("{text}")})
    with pytest.raises(ConfigError, match="cannot read a single validation question"):
        ask_anew(chats, {"base": phrasing("{text}"), "a": phrasing("{text}")})


def test_the_digest_follows_what_a_file_says_and_not_its_comments(tmp_path: Path) -> None:
    def digest(text: str) -> str:
        path = tmp_path / "phrasings.yaml"
        path.write_text(text, encoding="utf-8")
        return phrasings_digest(read_phrasings(path))

    plain = digest("a: {read: ['(?P<x>.*)'], write: ['{x}?']}")
    assert digest("# Whose.\na:\n  read: ['(?P<x>.*)']\n  write: ['{x}?']\n") == plain
    others = ["a: {read: ['(?P<x>.+)'], write: ['{x}?']}", "a: {read: ['(?P<x>.*)'], write: ['{x}!']}"]
    others.append("b: {read: ['(?P<x>.*)'], write: ['{x}?']}")
    assert len({plain, *map(digest, others)}) == 4


def test_evaluate_compares_every_policy_on_the_chats_asked_anew(trained: Path) -> None:
    path = write_phrasings(trained, letters=LETTERS, digits={"read": ["(?P<text>.*)"], "write": ["How much is {text}"]})
    flags = ["--baselines", "--calibration-chats", "1"]
    plain = evaluate(trained, *flags)
    record = evaluate(trained, *flags, "--phrasings", str(path))
    phrased = record.pop("phrased")
    # The other sets are what they were.
    assert record == plain
    # Of the letters, ddd is none that the file reads.
    assert phrased["chats"] == {"letters": 3, "digits": 4}
    assert phrased["left_out"] == {"letters": 1, "digits": 0}
    assert phrased["phrasings_sha256"] == phrasings_digest(read_phrasings(path))
    assert phrased["policies"].keys() == record["policies"].keys() > {"base", "own_adapter", "uniform", "routed", "lda"}
    assert phrased["ratio_to_own_adapter"].keys() == {"letters", "digits"}
    assert {key: phrased[key] for key in compare_policies(phrased["policies"])} == compare_policies(phrased["policies"])


def test_the_set_is_what_phrase_writes_and_is_measured_alike(trained: Path) -> None:
    """Beside the same chats, copied by `lora-mixer-train phrase` and evaluated as they are."""
    whole = {"read": ["(?P<text>.*)"], "write": ["Spell {text}", "{text}, spelt?", "And {text}"]}
    path = write_phrasings(trained, letters=whole, digits=whole)
    phrased = evaluate(trained, "--phrasings", str(path))["phrased"]
    flags = ["--data", str(trained / "data"), "--out", str(trained / "copies")]
    assert main(["phrase", "--phrasings", str(path), *flags, "--split", "validation", "--fraction", "1"]) == 0
    shutil.rmtree(trained / "copies/base")
    shutil.rmtree(trained / "data")
    shutil.move(trained / "copies", trained / "data")
    copied = evaluate(trained)
    assert copied["data_sha256"] == phrased["data_sha256"]
    assert copied["chats"] == phrased["chats"]
    assert copied["policies"] == phrased["policies"]


def test_questions_that_the_model_cannot_read_are_left_out(trained: Path) -> None:
    """The tiny model has 512 positions, and a token is a byte."""
    path = write_phrasings(trained, letters=LETTERS, digits={"read": ["(?P<text>.*)"], "write": ["{text}" * 200]})
    phrased = evaluate(trained, "--phrasings", str(path))["phrased"]
    assert phrased["chats"] == {"letters": 3}
    assert phrased["left_out"] == {"letters": 1, "digits": 4}


def test_evaluate_and_report_print_the_set(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_phrasings(trained, letters=LETTERS)
    capsys.readouterr()
    evaluate(trained, "--phrasings", str(path))
    printed = capsys.readouterr().out
    assert "Asked in other phrasings, 3 of 4 chats:\n\n| task " in printed
    assert main(["report", str(trained / "record.json")]) == 0
    assert capsys.readouterr().out == printed


def test_files_that_are_of_no_use_are_refused_before_the_model_is_loaded(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(trained / "base")
    flags = ["--router", str(trained / "router"), "--phrasings"]
    assert run(trained, "evaluate", *flags, str(trained / "nowhere.yaml")) == 1
    assert "nowhere.yaml: cannot be read" in capsys.readouterr().err
    assert run(trained, "evaluate", *flags, str(write_phrasings(trained, leters=LETTERS))) == 1
    assert "there are phrasings of leters, but no validation chats" in capsys.readouterr().err
