"""Examples kept across restarts: exact, private, bounded, swept."""

import json
import stat
from pathlib import Path

import pytest

from server.adapters.example_store import ExampleStore
from server.adapters.examples import MAX_EXAMPLE_BYTES, MAX_EXAMPLES, encode_examples
from server.errors import ConfigError, InvalidRequestError, RegistryFileError
from tests.adapters.calibrating import ByteRenderer

CHAT = {"messages": [{"role": "user", "content": "line\u2028break [[[{"}, {"role": "assistant", "content": "ü\n"}]}
EXAMPLES = encode_examples(["first", CHAT], ByteRenderer())
RAW = [{"messages": [{"role": "user", "content": "first"}]}, CHAT]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "adapters.state.examples"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_another_process_reads_what_was_kept_and_encodes_it_to_the_same(folder: Path) -> None:
    ExampleStore(folder).keep("a", 1, "d" * 64, EXAMPLES)
    again = ExampleStore(folder).recall("a", 1, "d" * 64)
    assert again == RAW
    assert encode_examples(again, ByteRenderer()) == EXAMPLES


def test_only_the_servers_user_may_read_them(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    ExampleStore(folder).keep("a", 1, None, EXAMPLES)
    (path,) = folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_largest_examples_fit_and_larger_ones_are_refused(folder: Path) -> None:
    frame = len(json.dumps({"messages": [{"role": "user", "content": ""}]}))
    largest = ["ü" + f"{index:02}" + "x" * (MAX_EXAMPLE_BYTES - frame - 4) for index in range(MAX_EXAMPLES)]
    store = ExampleStore(folder)
    store.keep("a", 1, "d" * 64, encode_examples(largest, ByteRenderer()))
    assert len(store.recall("a", 1, "d" * 64) or ()) == MAX_EXAMPLES
    with pytest.raises(InvalidRequestError, match=r"examples\[0\] has 65537 bytes, more than the limit of 65536"):
        encode_examples([largest[0] + "x", "fine"], ByteRenderer())
    with pytest.raises(InvalidRequestError, match=r"examples\[1\] holds half a surrogate pair"):
        encode_examples(["fine", "\ud800"], ByteRenderer())


def test_generations_and_names_are_kept_apart(folder: Path) -> None:
    """Names may end as generations do."""
    store = ExampleStore(folder)
    for name, generation in (("a", 1), ("a", 2), ("a", 10), ("a.2", 1), ("A.b-c_d", 3)):
        store.keep(name, generation, None, EXAMPLES)
    store.forget("a", below=2)
    assert names(folder) == ["A.b-c_d.3.jsonl", "a.10.jsonl", "a.2.1.jsonl", "a.2.jsonl"]
    store.forget("a", only=10)
    store = ExampleStore(folder)
    assert store.recall("a", 10, "x") is None
    assert store.recall("a", 2, "x") == store.recall("a.2", 1, "x") == RAW
    store.forget("a")
    assert names(folder) == ["A.b-c_d.3.jsonl", "a.2.1.jsonl"]


def test_a_start_sweeps_what_no_registration_stands_for_and_nothing_of_others(folder: Path) -> None:
    store = ExampleStore(folder)
    for name, generation in (("a", 1), ("a", 2), ("b", 1)):
        store.keep(name, generation, None, EXAMPLES)
    (folder / "a.2.jsonlxyz.tmp").write_text("half")
    (folder / "notes.txt").write_text("the operator's")
    ExampleStore(folder).sweep({("a", 2)})
    assert names(folder) == ["a.2.jsonl", "notes.txt"]


def test_examples_of_other_content_are_dropped(folder: Path) -> None:
    store = ExampleStore(folder)
    store.keep("a", 1, "d" * 64, EXAMPLES)
    assert store.recall("a", 1, "e" * 64) is None
    assert store.recall("a", 1, "d" * 64) is None
    assert names(folder) == []


@pytest.mark.parametrize(
    "content", [b"", b"{}\n", b'{"version": 2, "digest": null}\n"a"\n', b"\xff", b"[", b"x" * 5_000_000]
)
def test_a_damaged_file_is_named(content: bytes, folder: Path) -> None:
    store = ExampleStore(folder)
    store.keep("a", 1, None, EXAMPLES)
    (folder / "a.1.jsonl").write_bytes(content)
    with pytest.raises(InvalidRequestError, match=r"a\.1\.jsonl"):
        store.recall("a", 1, "d")


def test_what_cannot_be_written_changes_nothing(folder: Path) -> None:
    store = ExampleStore(folder)
    store.keep("a", 1, None, EXAMPLES)
    moved = folder.rename(folder.with_name("elsewhere"))
    folder.write_text("in the way")
    with pytest.raises(RegistryFileError, match="nothing was changed") as caught:
        store.keep("b", 1, None, EXAMPLES)
    assert caught.value.code == "registry_not_writable"
    folder.unlink()
    moved.rename(folder)
    assert names(folder) == ["a.1.jsonl"]
    assert store.recall("b", 1, "d") is None


def test_a_folder_that_cannot_be_read_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()

    def deny(_path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", deny)
    with pytest.raises(ConfigError, match="cannot be read"):
        ExampleStore(folder)


def test_without_a_folder_nothing_is_kept() -> None:
    store = ExampleStore(None)
    store.keep("a", 1, None, EXAMPLES)
    assert store.recall("a", 1, "d") is None
    store.forget("a")
    store.sweep(())
