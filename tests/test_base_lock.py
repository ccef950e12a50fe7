"""A base model from the Hub stays at the commit that the first start resolved it to."""

import functools
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.adapters.lockfile import BaseLock, Lockfile
from server.base_lock import at_locked_commit, lock_commit
from server.config import BaseModelConfig
from server.model.loader_hub import download_model
from server.model.sources import locate
from tests.adapters.fake_hub import FakeHub

NAME = "org/tiny"
COMMIT = "a" * 40


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as fake:
        yield fake


def base(source: str = NAME, revision: str | None = None) -> BaseModelConfig:
    return BaseModelConfig(name=NAME, source=source, revision=revision)


@pytest.mark.parametrize(("source", "revision"), [(NAME, None), (NAME, "main"), (f"{NAME}@main", None)])
def test_what_was_resolved_once_is_loaded_at_that_commit(tmp_path: Path, source: str, revision: str | None) -> None:
    asked = base(source, revision)
    lock = Lockfile(tmp_path / "adapters.lock")
    before = at_locked_commit(asked, lock, tmp_path)
    assert locate(before, tmp_path) == locate(asked, tmp_path)
    lock_commit(asked, lock, tmp_path, COMMIT)
    again = at_locked_commit(asked, Lockfile(tmp_path / "adapters.lock"), tmp_path)
    assert (again.source, again.revision) == (NAME, COMMIT)
    other = at_locked_commit(base(NAME, "dev"), lock, tmp_path)
    assert other.revision == "dev", "another revision is resolved anew"


def test_a_branch_that_moves_moves_no_server(hub: FakeHub, tmp_path: Path) -> None:
    download = functools.partial(download_model, endpoint=hub.endpoint, hub_cache=tmp_path / "hub")
    first = hub.push(NAME, {"config.json": b"{}"})
    lock = Lockfile(tmp_path / "adapters.lock")

    def start() -> str:
        source = locate(at_locked_commit(base(), lock, tmp_path), tmp_path)
        _, commit = download(source)  # type: ignore[arg-type]
        lock_commit(base(), lock, tmp_path, commit)
        return commit

    assert start() == first
    second = hub.push(NAME, {"config.json": b'{"a": 1}'})
    assert second != first
    assert start() == first


def test_local_models_are_not_locked(tmp_path: Path) -> None:
    asked = base(str(tmp_path))
    lock = Lockfile(tmp_path / "adapters.lock")
    assert at_locked_commit(asked, lock, tmp_path) == asked
    lock_commit(asked, lock, tmp_path, None)
    assert not (tmp_path / "adapters.lock").exists()


def test_a_lock_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("read-only")

    monkeypatch.setattr("server.adapters.lockfile.write_atomically", refuse)
    with caplog.at_level(logging.WARNING):
        lock_commit(base(), Lockfile(tmp_path / "adapters.lock"), tmp_path, COMMIT)
    assert "read-only" in caplog.text


def test_a_lock_has_one_base_model(tmp_path: Path) -> None:
    lock = Lockfile(tmp_path / "adapters.lock")
    lock.put_base(BaseLock(NAME, None, COMMIT))
    lock.put_base(BaseLock("org/next", None, COMMIT))
    assert lock.base_commit(NAME, None) is None
