"""`lora-mixer-train phrase`: folders copied with questions asked anew, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest

from router_training.__main__ import main
from router_training.data import TrainingDataError, read_splits
from router_training.phrasings import phrase_data
from server.errors import ConfigError
from tests.router_training.test_data import row, write
from tests.router_training.test_phrasings import READ, SUMS, WRITE, phrasings_file, question, sum_chats


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a task that has phrasings, one question of it unreadable, and one that has none."""
    for split, count in (("train", 20), ("validation", 5)):
        rows = [row(question(each), each.messages[-1]["content"]) for each in sum_chats(count)]
        rows[0]["tests"] = ["assert 1", "assert 'ä\u2028'"]
        write(tmp_path / "data/sums" / f"{split}.jsonl", *rows, row("What is 2 plus 2?", "4"))
        write(tmp_path / "data/other" / f"{split}.jsonl", row("Sum: 1 and 2", "{é}"), row())
    return tmp_path / "data"


@pytest.fixture
def command(data: Path) -> list[str]:
    """The command but for its `--out`."""
    path = phrasings_file(data.parent, {"sums": {"read": [READ], "write": list(WRITE)}})
    return ["phrase", "--phrasings", str(path), "--data", str(data)]


def contents(data: Path, split: str) -> dict[str, list[Any]]:
    """Everything of the chats but where they come from."""
    found = read_splits([data], ["sums", "other"])["train" if split == "train" else "validation"]
    return {task: [(each.task, each.messages, each.tests) for each in chats] for task, chats in found.items()}


def test_the_command_copies_tasks_with_training_questions_asked_anew(
    data: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = data.parent / "deep/copy"
    assert main([*command, "--out", str(out), "--fraction", "1"]) == 0
    assert capsys.readouterr().out == (
        "other: 0 of 2 train chats are asked anew\nsums: 20 of 21 train chats are asked anew\n"
    )
    assert contents(out, "validation") == contents(data, "validation")
    before, after = contents(data, "train"), contents(out, "train")
    assert after["other"] == before["other"]
    assert after["sums"][20] == before["sums"][20], "it cannot be read"
    for (task, messages, tests), (old_task, old_messages, old_tests) in zip(after["sums"], before["sums"], strict=True):
        assert (task, messages[1:], tests) == (old_task, old_messages[1:], old_tests)
    assert after["sums"][0][2] == ("assert 1", "assert 'ä\u2028'")
    changed = [new[1] != old[1] for new, old in zip(after["sums"], before["sums"], strict=True)]
    assert changed == [True] * 20 + [False]


def test_the_command_can_change_validation_chats_instead(
    data: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = data.parent / "copy"
    assert main([*command, "--out", str(out), "--split", "validation", "--fraction", "1"]) == 0
    assert "sums: 5 of 6 validation chats are asked anew" in capsys.readouterr().out
    assert contents(out, "train") == contents(data, "train")
    assert contents(out, "validation")["sums"] != contents(data, "validation")["sums"]


def test_one_seed_gives_one_copy_whatever_the_other_tasks_are(data: Path, command: list[str]) -> None:
    outs = [data.parent / name for name in ("first", "again", "other seed", "alone")]
    for out, flags in zip(outs, ([], [], ["--seed", "1"], []), strict=True):
        if out.name == "alone":
            (data / "other").rename(data.parent / "elsewhere")
        assert main([*command, "--out", str(out), *flags]) == 0
    first, again, other, alone = ((out / "sums/train.jsonl").read_bytes() for out in outs)
    assert first == again == alone
    assert first != other


def test_a_copy_can_be_phrased_again(data: Path, command: list[str]) -> None:
    """Its chats are data like any other; templates that no pattern reads stay."""
    first, second = data.parent / "first", data.parent / "second"
    assert main([*command, "--out", str(first), "--fraction", "1"]) == 0
    assert main([*command[:-1], str(first), "--out", str(second), "--fraction", "1"]) == 0
    assert contents(second, "train") == contents(first, "train")


@pytest.mark.parametrize("place", ["data", "data/copy", "data/sums", "elsewhere/../data/copy", "link/copy"])
def test_a_copy_among_the_data_is_refused(
    data: Path, command: list[str], place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would replace them, or be a task of its own for the next command."""
    (data.parent / "link").symlink_to(data)
    before = sorted(data.parent.rglob("*"))
    assert main([*command, "--out", str(data.parent / place)]) == 1
    assert f"is in the data folder {data}; name a folder outside it" in capsys.readouterr().err
    assert sorted(data.parent.rglob("*")) == before


def test_a_copy_beside_the_data_is_fine_whatever_its_name_begins_with(data: Path, command: list[str]) -> None:
    assert main([*command, "--out", f"{data}-phrased"]) == 0


def test_everything_wrong_with_the_folders_is_told_at_once_and_nothing_is_written(data: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        phrase_data([data], {**SUMS, "spelling": SUMS["sums"], "law": SUMS["sums"]}, data / "x", {"train"}, 1.0, 0)
    assert "is in the data folder" in caught.value.message
    assert "phrasings of law, spelling, but no such folder" in caught.value.message
    assert not (data / "x").exists()


def test_unreadable_data_is_refused_before_anything_is_written(data: Path) -> None:
    out = data.parent / "copy"
    with pytest.raises(TrainingDataError, match="missing: not a readable folder"):
        phrase_data([data, data / "missing"], SUMS, out, {"train"}, 1.0, 0)
    (data / "sums/validation.jsonl").write_text("{broken\n", encoding="utf-8")
    with pytest.raises(TrainingDataError, match=r"sums/validation\.jsonl:1: not JSON"):
        phrase_data([data], SUMS, out, {"train"}, 1.0, 0)
    assert not out.exists()


@pytest.mark.parametrize("fraction", ["-0.1", "1.1", "nan"])
def test_a_share_that_is_none_is_refused(
    data: Path, command: list[str], fraction: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--out", str(data.parent / "copy"), f"--fraction={fraction}"]) == 1
    assert "--fraction must be from 0 to 1" in capsys.readouterr().err
    assert not (data.parent / "copy").exists()


@pytest.mark.parametrize("content", [None, b"a: \xff"], ids=["missing", "no text"])
def test_a_file_that_cannot_be_read_is_refused_by_the_command(
    data: Path, command: list[str], content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = data.parent / "phrasings.yaml"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert main([*command, "--out", str(data.parent / "copy")]) == 1
    assert "phrasings.yaml: cannot be read as YAML" in capsys.readouterr().err
