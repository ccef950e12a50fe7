"""The journal: what it keeps, when it refuses, and how it meets the configuration."""

import errno
import json
import logging
import os
from pathlib import Path

import pytest

from server.adapters.journal import MIN_CHANGES, Journal, JournalEntry
from server.config import AdapterSpec
from server.errors import ConfigError, RegistryFileError


def spec(name: str, source: str = "org/name") -> AdapterSpec:
    return AdapterSpec(name=name, source=source)


def reopened(journal: Journal, path: Path) -> Journal:
    journal.close()
    return Journal(path)


def test_entries_and_generations_outlive_the_process(tmp_path: Path) -> None:
    path = tmp_path / "adapters.state"
    journal = Journal(path)
    first = JournalEntry(spec("a"), 3, "d" * 64)
    journal.put(JournalEntry(spec("a"), 3))
    journal.put(first)
    journal.put(JournalEntry(spec("b"), 1))
    journal.remove("b")
    journal = reopened(journal, path)
    assert journal.restored([]) == ([], [first])
    assert (journal.generation("a"), journal.generation("b"), journal.generation("c")) == (3, 1, 0)
    journal.close()


def test_asking_for_routing_and_not_objecting_to_it_stay_apart(tmp_path: Path) -> None:
    """An adapter without examples gets a gate row from its weights only if `routed: true` was said."""
    path = tmp_path / "adapters.state"
    journal = Journal(path)
    for name, said in (("silent", {}), ("asked", {"routed": True}), ("declined", {"routed": False})):
        journal.put(JournalEntry(AdapterSpec(name=name, source="org/name", **said), 1))
    journal = reopened(journal, path)
    specs = {entry.spec.name: entry.spec for entry in journal.restored([])[1]}
    assert {name: spec.routed for name, spec in specs.items()} == {"silent": True, "asked": True, "declined": False}
    assert [name for name, spec in specs.items() if "routed" in spec.model_fields_set] == ["asked", "declined"]
    journal.close()


def test_a_retired_adapter_of_the_configuration_stays_so_until_its_lines_change(tmp_path: Path) -> None:
    path = tmp_path / "adapters.state"
    journal = Journal(path)
    configured = [spec("a"), spec("b")]
    journal.remove("a", configured=configured[0])
    journal = reopened(journal, path)
    assert journal.restored(configured) == ([configured[1]], [])
    changed = [spec("a", "org/newer"), configured[1]]
    assert journal.restored(changed) == (changed, [])
    journal = reopened(journal, path)
    assert journal.restored(configured) == (configured, []), "what was served since is not retired again"
    for listed in (configured, changed):
        journal.remove("a", configured=listed[0])
        journal = reopened(journal, path)
        assert journal.restored(listed) == ([configured[1]], [])
    journal.close()


def test_a_registration_over_a_retired_name_wins_until_the_configuration_changes(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "adapters.state")
    configured, hot = spec("a"), JournalEntry(spec("a", "org/hot"), 2, "d" * 64)
    journal.put(hot, configured=configured)
    assert journal.restored([configured]) == ([], [hot])
    changed = spec("a", "org/newer")
    assert journal.restored([changed]) == ([changed], [])
    assert journal.restored([]) == ([], []), "what has been dropped does not come back"
    journal = reopened(journal, tmp_path / "adapters.state")
    assert journal.restored([]) == ([], [])
    journal.close()


def test_a_change_that_cannot_be_written_is_not_made(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    journal = Journal(folder / "adapters.state")
    journal.put(JournalEntry(spec("a"), 1))
    moved = folder.rename(tmp_path / "elsewhere")
    with pytest.raises(RegistryFileError, match="nothing was changed") as caught:
        journal.put(JournalEntry(spec("b"), 1))
    assert caught.value.code == "registry_not_writable"
    assert [entry.spec.name for entry in journal.restored([])[1]] == ["a"]
    moved.rename(folder)
    journal.close()


@pytest.mark.parametrize("call", ["fsync", "pwrite"])
def test_a_change_that_the_disk_refused_does_not_come_back(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "adapters.state"
    journal = Journal(path)
    journal.put(JournalEntry(spec("a"), 1))
    whole = path.read_bytes()
    write = os.pwrite

    def fail(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def cut_short(descriptor: int, line: bytes, position: int) -> int:
        return write(descriptor, line[:-9], position)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail if call == "fsync" else cut_short)
        with pytest.raises(RegistryFileError, match="No space left"):
            journal.put(JournalEntry(spec("b"), 1))
        with pytest.raises(RegistryFileError, match="nothing was changed"):
            journal.remove("a")
    assert path.read_bytes() == whole
    journal.put(JournalEntry(spec("c"), 1))
    journal = reopened(journal, path)
    assert [entry.spec.name for entry in journal.restored([])[1]] == ["a", "c"]
    journal.close()


def test_a_change_is_on_disk_before_it_is_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "adapters.state"
    journal = Journal(path)
    journal.put(JournalEntry(spec("a"), 1))
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.pread(descriptor, 2**20, 0)))
    journal.put(JournalEntry(spec("b"), 1))
    assert synced == [path.read_bytes()]
    journal.close()


def test_what_a_refused_change_has_left_does_not_outlive_the_next(tmp_path: Path) -> None:
    path = tmp_path / "adapters.state"
    journal = Journal(path)
    journal.put(JournalEntry(spec("a"), 1))
    with path.open("ab") as file:
        file.write(b"x\n" * 1000)
    journal.put(JournalEntry(spec("b"), 1))
    journal = reopened(journal, path)
    assert [entry.spec.name for entry in journal.restored([])[1]] == ["a", "b"]
    journal.close()


def test_generations_never_fall_and_the_oldest_are_forgotten_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.adapters.journal.MAX_GENERATIONS", 2)
    journal = Journal(tmp_path / "adapters.state")
    for name, generation in (("a", 5), ("b", 1), ("a", 3), ("c", 1)):
        journal.put(JournalEntry(spec(name), generation))
    for _ in range(2):
        assert [journal.generation(name) for name in "abc"] == [5, 0, 1]
        journal = reopened(journal, tmp_path / "adapters.state")
    journal.close()


def test_a_change_adds_one_line_and_a_thousand_of_them_are_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "adapters.state"
    journal = Journal(path)
    for index in range(100):
        journal.put(JournalEntry(spec(f"kept-{index}"), 1))
    before = path.stat()
    journal.put(JournalEntry(spec("one"), 1))
    after = path.stat()
    assert after.st_ino == before.st_ino
    assert after.st_size - before.st_size < 300
    for index in range(MIN_CHANGES):
        journal.put(JournalEntry(spec("one"), index))
    assert path.stat().st_ino != before.st_ino
    assert len(path.read_bytes().splitlines()) < MIN_CHANGES
    journal = reopened(journal, path)
    assert [entry.spec.name for entry in journal.restored([])[1]] == [*(f"kept-{i}" for i in range(100)), "one"]
    journal.close()


def test_a_change_that_a_crash_cut_off_was_never_made(tmp_path: Path) -> None:
    path = tmp_path / "adapters.state"
    journal = Journal(path)
    journal.put(JournalEntry(spec("a"), 1))
    journal.put(JournalEntry(spec("b"), 1))
    journal.close()
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        journal = Journal(path)
        assert [entry.spec.name for entry in journal.restored([])[1]] == ["a"]
        journal.put(JournalEntry(spec("c"), 1))
        journal = reopened(journal, path)
        assert [entry.spec.name for entry in journal.restored([])[1]] == ["a", "c"]
        journal.close()


def test_damage_between_changes_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "adapters.state"
    journal = Journal(path)
    for name in "abc":
        journal.put(JournalEntry(spec(name), 1))
    journal.close()
    text = path.read_text()
    path.write_text(text.replace('"put"', '"pot"', 1))
    with pytest.raises(ConfigError, match="is damaged"):
        Journal(path)


def test_a_journal_of_version_1_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "adapters.state"
    record = {"spec": {"name": "a", "source": "org/name"}, "generation": 4, "digest": "d" * 64}
    content = {
        "version": 1,
        "adapters": [record],
        "retired": [{"name": "b", "source": "org/b"}],
        "generations": {"a": 4},
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    journal = Journal(path)
    journal.put(JournalEntry(spec("c"), 1))
    journal = reopened(journal, path)
    assert [(entry.spec.name, entry.generation) for entry in journal.restored([])[1]] == [("a", 4), ("c", 1)]
    assert journal.restored([spec("b", "org/b")])[0] == []
    journal.close()


@pytest.mark.parametrize("change", ["delete", "shorten"])
def test_a_file_that_somebody_changed_is_written_anew(change: str, tmp_path: Path) -> None:
    path = tmp_path / "adapters.state"
    journal = Journal(path)
    journal.put(JournalEntry(spec("a"), 1))
    path.unlink() if change == "delete" else path.write_bytes(path.read_bytes()[:9])
    journal.put(JournalEntry(spec("b"), 1))
    journal = reopened(journal, path)
    assert [entry.spec.name for entry in journal.restored([])[1]] == ["a", "b"]
    journal.close()


def test_a_second_server_leaves_the_journal_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "adapters.state"
    first = Journal(path)
    first.put(JournalEntry(spec("a"), 1))
    with caplog.at_level(logging.WARNING):
        second = Journal(path)
    assert "another server uses it" in caplog.text
    assert second.restored([]) == ([], [])
    second.put(JournalEntry(spec("b"), 1))
    second.close()
    first = reopened(first, path)
    assert [entry.spec.name for entry in first.restored([])[1]] == ["a"]
    first.close()


def test_a_folder_that_cannot_be_written_only_costs_the_journal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path / "absent" / "adapters.state")
    assert "will not survive a restart" in caplog.text
    journal.put(JournalEntry(spec("a"), 1))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"version": 2}',
        '{"version": 1}',
        '{"version": 1, "adapters": [1], "retired": [], "generations": {}}',
        '{"version": 1, "adapters": [], "retired": [{"name": "a"}], "generations": {}}',
        '{"version": 1, "adapters": [], "retired": [], "generations": {"a": "x"}}',
        json.dumps({"version": 1, "retired": [], "generations": {},
                    "adapters": [{"spec": {"name": "../a", "source": "b"}, "generation": 1, "digest": None}]}),
    ],
)  # fmt: skip
def test_a_damaged_journal_is_an_error_and_stays_as_it_is(text: str, tmp_path: Path) -> None:
    path = tmp_path / "adapters.state"
    path.write_text(text)
    with pytest.raises(ConfigError, match="is damaged"):
        Journal(path)
    assert path.read_text() == text


def test_what_a_crash_left_half_written_is_swept_away(tmp_path: Path) -> None:
    path = tmp_path / "adapters.state"
    (tmp_path / "adapters.statexyz.tmp").write_text("half")
    Journal(path).close()
    assert not list(tmp_path.glob("*.tmp"))
