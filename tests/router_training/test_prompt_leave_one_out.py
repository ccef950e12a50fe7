"""Newcomers to a prompt gate, from adapters.yaml to the table in a document, on a tiny model."""

import json
from pathlib import Path

import pytest

from router_training import prompt_leave_one_out
from router_training.prompt_leave_one_out import TABLE_END, TABLE_START
from tests.router_training.conftest import chat_line


def arguments(project: Path, *more: str) -> list[str]:
    paths = ["--config", str(project / "adapters.yaml"), "--data", str(project / "data")]
    return [*paths, "--out", str(project / "out.json"), "--samples", "60", *more]


@pytest.fixture
def filled(project: Path) -> Path:
    """The project with enough chats."""
    for name in ("letters", "digits"):
        lines = "".join(chat_line(name, index) for index in range(90))
        (project / "data" / name / "train.jsonl").write_text(lines, encoding="utf-8")
    return project


def test_every_adapter_is_a_newcomer_once_and_the_table_lands_in_the_document(filled: Path) -> None:
    document = filled / "doc.md"
    document.write_text(f"before\n{TABLE_START}old\n{TABLE_END}after\n", encoding="utf-8")
    prompt_leave_one_out.main(arguments(filled, "--document", str(document)))
    whole = json.loads((filled / "out.json").read_text(encoding="utf-8"))
    assert whole["settings"]["samples"] == 60
    record = whole["adapters"]
    assert set(record) == {"letters", "digits"}
    for name, other in (("letters", "digits"), ("digits", "letters")):
        case = record[name]
        assert case["without"][name] == {"own": 0, "others": 1, "router": 0}, "the only choice left is sure of all"
        assert case["without"][other]["own"] == 1
        assert set(case["examples"]) == {"4", "16", "64"}
        found = case["examples"]["64"]["tokens"]
        assert found[name]["own"] > case["without"][name]["own"]
        assert found[name]["others"] < 1
        for values in found.values():
            assert sum(values.values()) == pytest.approx(1)
    text = document.read_text(encoding="utf-8")
    assert "old" not in text
    share = 100 * record["letters"]["examples"]["64"]["tokens"]["letters"]["own"]
    assert f"{share:.0f} / " in text
