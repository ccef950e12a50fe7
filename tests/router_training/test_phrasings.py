"""Questions asked in other ways: what a file of phrasings says, and what changes in a chat."""

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from router_training.data import Chat
from router_training.phrasings import Phrasing, phrase_some, read_phrasings
from server.errors import ConfigError
from tests.router_training.test_mixing import chat

ROOT = Path(__file__).resolve().parents[2]
DEMO = ("phrasings.yaml", "test_phrasings.yaml", "dev_phrasings.yaml", "test_phrasings_2.yaml")
READ, WRITE = (
    r"Sum: (?P<left>\d+) and (?P<right>\d+)",
    ("{left} + {right} =", "Add {right} to {left}.", "{left}+{right}"),
)
SUMS = {"sums": Phrasing((re.compile(READ),), WRITE)}


def phrasings_file(folder: Path, content: Any) -> Path:
    path = folder / "phrasings.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def asked(folder: Path, read: Sequence[str], template: str, question: str) -> str | None:
    """The question in the template, both as a file says."""
    path = phrasings_file(folder, {"task": {"read": list(read), "write": [template]}})
    return read_phrasings(path)["task"].apply(question, random.Random(0))


def sum_chats(count: int) -> list[Chat]:
    return [chat("sums", f"Sum: {n} and {n + 1}", str(2 * n + 1), f"sums:{n}") for n in range(count)]


def question(of: Chat) -> str:
    return of.messages[-2]["content"]


def test_the_first_pattern_that_matches_counts(tmp_path: Path) -> None:
    read = ["Say: (?P<text>.*)", "(?P<text>.*)"]
    assert asked(tmp_path, read, "<{text}>", "Say: hello") == "<hello>"
    assert asked(tmp_path, read, "<{text}>", "hello") == "<hello>"
    assert asked(tmp_path, read[::-1], "<{text}>", "Say: hello") == "<Say: hello>"


def test_a_pattern_matches_the_whole_question_over_all_lines(tmp_path: Path) -> None:
    read = [r"Say: (?P<text>.*)\nNow\."]
    assert asked(tmp_path, read, "<{text}>", "Say: one\ntwo\nNow.") == "<one\ntwo>"
    assert asked(tmp_path, read, "<{text}>", "Say: one\nNow. Or later.") is None
    assert asked(tmp_path, read, "<{text}>", "Please. Say: one\nNow.") is None


def test_a_part_that_the_question_does_without_is_empty(tmp_path: Path) -> None:
    read = [r"(?:Dear (?P<name>\w+), )?(?P<text>.*)"]
    assert asked(tmp_path, read, "[{name}] {text}", "Dear Ada, hello") == "[Ada] hello"
    assert asked(tmp_path, read, "[{name}] {text}", "hello") == "[] hello"


def test_braces_around_anything_but_a_part_are_text(tmp_path: Path) -> None:
    template = '{{text}} {} {0} { text } {"text": "{text}"}'
    assert asked(tmp_path, ["(?P<text>.*)"], template, "hi") == '{hi} {} {0} { text } {"text": "hi"}'


@given(
    st.text() | st.sampled_from(["{other}", "{text}", "{", r"\g<other>"]),
    st.text(st.characters(exclude_characters="|")) | st.sampled_from(["{text}", "{other}", r"\1"]),
)
def test_parts_come_through_as_they_are_whatever_is_in_them(text: str, other: str) -> None:
    """Braces in a part are not substituted again, and backslashes mean nothing."""
    pattern = re.compile(r"(?P<other>[^|]*)\|(?P<text>.*)", re.DOTALL)
    found = Phrasing((pattern,), ("{text} / {other} / {text}",)).apply(f"{other}|{text}", random.Random(0))
    assert found == f"{text} / {other} / {text}"


@given(st.integers(0, 30), st.floats(0, 1), st.integers())
def test_only_questions_change_and_only_as_the_templates_say(count: int, fraction: float, seed: int) -> None:
    chats = sum_chats(count)
    phrased, changed = phrase_some(chats, SUMS, fraction, seed)
    assert changed == sum(before != after for before, after in zip(chats, phrased, strict=True))
    for number, (before, after) in enumerate(zip(chats, phrased, strict=True)):
        assert (after.task, after.origin, after.messages[-1]) == (before.task, before.origin, before.messages[-1])
        parts = {"left": str(number), "right": str(number + 1)}
        assert question(after) in {question(before), *(template.format(**parts) for template in WRITE)}


def test_a_fraction_of_none_changes_nothing_and_of_one_everything() -> None:
    chats = sum_chats(200)
    assert phrase_some(chats, SUMS, 0.0, seed=0) == (chats, 0)
    phrased, changed = phrase_some(chats, SUMS, 1.0, seed=0)
    assert changed == 200
    assert not set(map(question, phrased)) & set(map(question, chats))
    # Four standard deviations of 200 draws.
    assert abs(phrase_some(chats, SUMS, 0.6, seed=0)[1] - 120) < 28


def test_every_template_is_used() -> None:
    phrased, _ = phrase_some(sum_chats(60), SUMS, 1.0, seed=0)
    assert {re.sub(r"\d+", "0", question(after)) for after in phrased} == {"0 + 0 =", "Add 0 to 0.", "0+0"}


@given(st.integers(), st.integers(0, 12))
def test_phrasing_follows_from_the_seed_and_not_from_chats_that_come_later(seed: int, count: int) -> None:
    whole, _ = phrase_some(sum_chats(12), SUMS, 0.5, seed)
    assert whole == phrase_some(sum_chats(12), SUMS, 0.5, seed)[0]
    assert whole[:count] == phrase_some(sum_chats(count), SUMS, 0.5, seed)[0]


def test_another_seed_chooses_other_chats_and_other_templates() -> None:
    chats = sum_chats(50)
    assert phrase_some(chats, SUMS, 0.5, seed=0) != phrase_some(chats, SUMS, 0.5, seed=1)
    assert phrase_some(chats, SUMS, 1.0, seed=0) != phrase_some(chats, SUMS, 1.0, seed=1)


def test_of_a_conversation_only_the_last_question_changes() -> None:
    history = ({"role": "system", "content": "Sum: 1 and 2"}, *sum_chats(1)[0].messages)
    before = Chat("sums", (*history, *sum_chats(8)[7].messages), "sums:1", ("assert True",))
    (after,), changed = phrase_some([before], SUMS, 1.0, seed=0)
    assert changed == 1
    assert after.messages[:-2] == before.messages[:-2]
    assert after.messages[-2]["role"] == "user"
    assert question(after) in {template.format(left=7, right=8) for template in WRITE}
    assert (after.messages[-1], after.tests) == (before.messages[-1], before.tests)


def test_what_cannot_be_read_and_tasks_without_phrasings_stay_and_do_not_count() -> None:
    chats = [*sum_chats(2), chat("sums", "What is 2 plus 2?", "4"), chat("other", "Sum: 1 and 2", "3")]
    phrased, changed = phrase_some(chats, SUMS, 1.0, seed=0)
    assert changed == 2
    assert phrased[2:] == chats[2:]


LISTS = "expected the lists `read` and `write`, each of at least one text"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("a: [", "cannot be read as YAML"),
        ("", "expected a mapping of tasks"),
        ("[read, write]", "expected a mapping of tasks"),
        ({"sums": None}, f"sums: {LISTS}"),
        ({"sums": {"read": ["(?P<text>.*)"]}}, f"sums: {LISTS}"),
        ({"sums": {"read": ["(?P<text>.*)"], "write": []}}, f"sums: {LISTS}"),
        ({"sums": {"read": ["(?P<text>.*)"], "write": [""]}}, f"sums: {LISTS}"),
        ({"sums": {"read": ["(?P<text>.*)"], "write": [3]}}, f"sums: {LISTS}"),
        ({"sums": {"read": "(?P<text>.*)", "write": ["{text}"]}}, f"sums: {LISTS}"),
        ({"sums": {"read": ["(?P<text>.*)"], "write": ["{text}"], "wrote": []}}, f"sums: {LISTS}"),
        ({"sums": {"read": ["(?P<text>.*"], "write": ["{text}"]}}, "'(?P<text>.*' is no regular expression (missing )"),
        ({"sums": {"read": ["(?P<a>.*)"], "write": ["{a} {b}"]}}, "'{a} {b}' needs ['b'], which '(?P<a>.*)' does not"),
        ({"sums": {"read": ["(?P<a>.*)"], "write": ["Well?"]}}, "'Well?' has no part of the question in it"),
    ],
)
def test_files_that_are_no_phrasings_are_refused(tmp_path: Path, content: Any, problem: str) -> None:
    path = phrasings_file(tmp_path, content)
    with pytest.raises(ConfigError, match=re.escape(problem)) as caught:
        read_phrasings(path)
    assert str(path) in caught.value.message


def test_everything_wrong_with_a_file_is_told_once(tmp_path: Path) -> None:
    entries = {
        "a": {"read": ["(", "(?P<x>.*)", "(?P<y>.*)"], "write": ["plain", "{x}"]},
        "b": {"read": ["(?P<x>.*)"]},
    }
    with pytest.raises(ConfigError) as caught:
        read_phrasings(phrasings_file(tmp_path, entries))
    problems = caught.value.message.split("; ")
    assert len(problems) == len(set(problems)) == 4
    assert [any(part in problem for problem in problems) for part in ("'('", "'plain'", "needs ['x']", "b: ")] == [
        True
    ] * 4


@pytest.mark.parametrize("name", DEMO)
def test_the_demos_phrasings_load_and_cover_its_adapters(name: str) -> None:
    phrasings = read_phrasings(ROOT / "examples/demo" / name)
    adapters = yaml.safe_load((ROOT / "adapters.yaml").read_text(encoding="utf-8"))["adapters"]
    assert set(phrasings) == {adapter["name"] for adapter in adapters}
    for found in phrasings.values():
        assert len(set(found.write)) == len(found.write) >= 8


def test_nothing_is_trained_on_the_phrasings_that_measure() -> None:
    train, *tests = (read_phrasings(ROOT / "examples/demo" / name) for name in DEMO)
    assert not [task for test in tests for task in train if set(train[task].write) & set(test[task].write)]


def test_the_documents_example_is_one(tmp_path: Path) -> None:
    text = (ROOT / "docs/prompt-gate.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    phrasing = read_phrasings(phrasings_file(tmp_path, example))["wikisql"]
    found = {phrasing.apply("Columns: a, b\nWhat is a?\nSQL:", random.Random(seed)) for seed in range(20)}
    assert found == {"What is a?\nColumns: a, b\nSQL query:", "SQL for: What is a? Columns a, b"}


@pytest.mark.parametrize(
    ("task", "text", "parts"),
    [
        ("sst2", "Review: a fine film\nSentiment?", ["a fine film"]),
        ("cola", "Who did he see?\nWould a linguist call this acceptable?", ["Who did he see?"]),
        ("wikisql", "Columns: Year, Team\nWho won in 1999?\nSQL:", ["Year, Team", "Who won in 1999?"]),
        ("snips", "play jazz\nReturn the intent with its slots.", ["play jazz"]),
        ("arc", "Science quiz: What melts?\nA. ice\nB. fire", ["What melts?", "A. ice\nB. fire"]),
        ("gsm8k", "Math question: 3 apples and 4?\nShow your reasoning.", ["3 apples and 4?"]),
        (
            "mbpp",
            "Python task: Add.\nYour code should pass this test:\nassert add(1, 2) == 3\nReturn only the code.",
            ["Add.", "assert add(1, 2) == 3"],
        ),
        ("pubmedqa", "Abstract: We tried.\nQuestion: Does it help?", ["We tried.", "Does it help?"]),
    ],
)
@pytest.mark.parametrize("name", DEMO)
def test_the_demos_questions_keep_their_parts(name: str, task: str, text: str, parts: list[str]) -> None:
    phrasing = read_phrasings(ROOT / "examples/demo" / name)[task]
    found = {phrasing.apply(text, random.Random(seed)) for seed in range(40)}
    assert len(found) > 5
    for one in found:
        assert one is not None
        assert all(part in one for part in parts)
        assert text not in one, "the words around the parts are gone"
