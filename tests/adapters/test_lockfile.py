"""adapters.lock: exact, atomic, tolerant of absence, strict on damage."""

import fcntl
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from server.adapters.lockfile import BaseLock, LockEntry, Lockfile, LockKey
from server.config import AdapterSpec
from server.errors import ConfigError

KEY = LockKey("org/name", "main", None)
FILES = {"adapter_config.json": "b" * 64, "adapter_model.safetensors": "e" * 64}
ENTRY = LockEntry("a" * 40, FILES, "c" * 64)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapters.lock"


def test_what_is_put_is_read_back_by_another_process(path: Path) -> None:
    Lockfile(path).put(KEY, ENTRY)
    again = Lockfile(path)
    assert again.get(KEY) == ENTRY
    assert again.get(LockKey("org/name", None, None)) is None
    again.remove(KEY)
    assert Lockfile(path).get(KEY) is None


def test_examples_are_locked_where_there_are_some(path: Path) -> None:
    entry = LockEntry(ENTRY.commit, {**FILES, "examples.jsonl": "f" * 64}, ENTRY.digest)
    Lockfile(path).put(KEY, entry)
    assert Lockfile(path).get(KEY) == entry
    path.write_text(path.read_text().replace("examples.jsonl", "examples.py"))
    with pytest.raises(ConfigError, match="entry 0 is malformed"):
        Lockfile(path)


def test_the_base_models_commit_stands_beside_the_adapters(path: Path) -> None:
    base = BaseLock("org/base", None, "d" * 40)
    Lockfile(path).put(KEY, ENTRY)
    Lockfile(path).put_base(base)
    again = Lockfile(path)
    again.put(LockKey("org/other", None, None), ENTRY)
    again = Lockfile(path)
    assert again.base_commit("org/base", None) == base.commit
    assert again.base_commit("org/base", "main") is None
    assert again.base_commit("org/another", None) is None
    assert again.get(KEY) == ENTRY
    path.write_text(path.read_text().replace("d" * 40, "main"))
    with pytest.raises(ConfigError, match="base_model is malformed"):
        Lockfile(path)


def test_the_key_is_what_was_asked_for() -> None:
    spec = AdapterSpec(name="a", source="org/name", revision="main")
    assert LockKey.of(spec) == KEY


def test_a_missing_file_is_an_empty_lock_and_reading_creates_none(path: Path) -> None:
    assert Lockfile(path).get(KEY) is None
    assert not path.exists()


def test_no_path_keeps_the_lock_in_memory() -> None:
    lock = Lockfile(None)
    lock.put(KEY, ENTRY)
    assert lock.get(KEY) == ENTRY


def test_equal_locks_are_equal_bytes_whatever_the_order(tmp_path: Path) -> None:
    other = LockKey("org/aaa", None, "sub")
    first, second = Lockfile(tmp_path / "1"), Lockfile(tmp_path / "2")
    for lock, keys in ((first, (KEY, other)), (second, (other, KEY))):
        for key in keys:
            lock.put(key, ENTRY)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_rests_of_writes_that_a_kill_cut_short_go_and_those_of_running_writes_stay(path: Path) -> None:
    dead, running = (path.with_name(f"{path.name}{name}.tmp") for name in ("dead", "running"))
    dead.write_text("{")
    with running.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        Lockfile(path)
        assert not dead.exists()
        assert running.exists()
    Lockfile(path)
    assert not running.exists()


def test_a_failed_write_leaves_the_old_file_and_no_rest(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = Lockfile(path)
    lock.put(KEY, ENTRY)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space"):
        lock.put(LockKey("org/other", None, None), ENTRY)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["adapters.lock"]


@pytest.mark.parametrize("num_servers", [1, 20])
def test_puts_from_many_threads_all_arrive(path: Path, num_servers: int) -> None:
    locks = [Lockfile(path) for _ in range(num_servers)]
    keys = [LockKey(f"org/{index}", None, None) for index in range(20)]
    threads = [threading.Thread(target=locks[i % num_servers].put, args=(key, ENTRY)) for i, key in enumerate(keys)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = Lockfile(path)
    assert all(again.get(key) == ENTRY for key in keys)


SOUND: dict[str, Any] = {
    "source": "org/name",
    "revision": None,
    "subfolder": None,
    "commit": "a" * 40,
    "files": FILES,
    "digest": "c" * 64,
}


DAMAGE: list[dict[str, Any]] = [
    {"commit": "main"},
    {"digest": "x" * 64},
    {"files": ["a"]},
    {"files": {"a": "b"}},
    {"files": {}},
    {"files": {"adapter_config.json": "b" * 64}},
    {"revision": 1},
    {"source": None},
    {"extra": 1},
]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"version": 1, "version": 1, "adapters": []}',
        json.dumps({"version": 2, "adapters": []}),
        json.dumps({"version": 1}),
        json.dumps({"version": 1, "adapters": {}}),
        json.dumps({"version": 1, "adapters": [], "more": 1}),
        json.dumps({"version": 1, "adapters": [SOUND, SOUND]}),
        *(json.dumps({"version": 1, "adapters": [{**SOUND, **change}]}) for change in DAMAGE),
    ],
)
def test_damage_is_an_error_that_names_the_file_and_never_overwritten(path: Path, content: str) -> None:
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"adapters\.lock is damaged"):
        Lockfile(path)
    assert path.read_text() == content


# Others who change the file

OTHER = LockKey("org/other", None, None)


def test_two_servers_keep_each_others_entries(path: Path) -> None:
    base = BaseLock("org/base", None, "d" * 40)
    first, second = Lockfile(path), Lockfile(path)
    first.put(KEY, ENTRY)
    first.put_base(base)
    second.put(OTHER, ENTRY)
    again = Lockfile(path)
    assert again.get(KEY) == again.get(OTHER) == ENTRY
    assert again.base_commit(base.source, None) == base.commit
    first.remove(KEY)
    again = Lockfile(path)
    assert (again.get(KEY), again.get(OTHER)) == (None, ENTRY)


def test_a_source_that_another_server_has_locked_meanwhile_is_the_same_here(path: Path) -> None:
    first, second = Lockfile(path), Lockfile(path)
    first.put(KEY, ENTRY)
    assert not second.put(KEY, LockEntry("b" * 40, FILES, "c" * 64))
    assert second.get(KEY) == ENTRY


def test_an_entry_that_an_operator_deletes_stays_deleted(path: Path) -> None:
    lock = Lockfile(path)
    lock.put(KEY, ENTRY)
    path.unlink()
    lock.put(OTHER, ENTRY)
    assert lock.get(KEY) == ENTRY, "until it ends, the server serves what it has"
    again = Lockfile(path)
    assert (again.get(KEY), again.get(OTHER)) == (None, ENTRY)


def test_what_could_not_be_written_is_made_up_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = Lockfile(path)
    with monkeypatch.context() as patch:
        patch.setattr("server.adapters.lockfile.write_atomically", lambda *_: path.read_bytes())
        for change in (lambda: lock.put(KEY, ENTRY), lambda: lock.put_base(BaseLock("org/base", None, "d" * 40))):
            with pytest.raises(OSError, match="No such file"):
                change()
    lock.put(OTHER, ENTRY)
    again = Lockfile(path)
    assert again.get(KEY) == again.get(OTHER) == ENTRY
    assert again.base_commit("org/base", None) == "d" * 40


def test_a_file_that_was_damaged_meanwhile_is_not_overwritten(path: Path) -> None:
    lock = Lockfile(path)
    path.write_text("{")
    with pytest.raises(OSError, match="damaged"):
        lock.put(KEY, ENTRY)
    assert lock.get(KEY) == ENTRY
    assert path.read_text() == "{"
