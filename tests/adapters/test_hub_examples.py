"""`examples.jsonl` of Hub repositories: fetched and locked like the other files, and never a reason to fail."""

import dataclasses
import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from server.adapters.examples import MAX_FILE_BYTES
from server.adapters.hub import HubSource
from server.adapters.hub_retry import RetryPolicy
from server.adapters.lockfile import LockEntry
from server.config import AdapterSpec
from server.errors import AdapterRefusedError
from tests.adapters.fake_hub import FakeHub, Fault

REQUIRED = {"adapter_config.json": b'{"r": 4}', "adapter_model.safetensors": bytes(range(256)) * 1000}
EXAMPLES = b'"what is two and two?"\n' * 1000
FILES = {**REQUIRED, "examples.jsonl": EXAMPLES, "README.md": b"never fetched"}
SPEC = AdapterSpec(name="a", source="org/name")


@pytest.fixture
def source(hub: FakeHub, tmp_path: Path) -> HubSource:
    return make_source(hub, tmp_path)


def make_source(hub: FakeHub, tmp_path: Path, **options: Any) -> HubSource:
    defaults: dict[str, Any] = {"cache_folder": tmp_path / "cache", "retries": RetryPolicy(1, first_wait_s=0.01)}
    return HubSource(endpoint=hub.endpoint, **{**defaults, **options})


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def lock(commit: str, **files: bytes) -> LockEntry:
    """`files` by name up to the first dot."""
    wanted = {**REQUIRED, **({"examples.jsonl": files["examples"]} if files else {})}
    return LockEntry(commit, {name: sha256(content) for name, content in wanted.items()}, "d" * 64)


def fetched(hub: FakeHub) -> list[str]:
    """Names of the files whose bytes were asked for, in order."""
    return [
        request.path.rpartition("/")[2]
        for request in hub.requests
        if request.method == "GET" and ("/resolve/" in request.path or "/cdn/" in request.path)
    ]


def test_examples_come_first_at_the_same_commit_and_link_into_the_cache(hub: FakeHub, source: HubSource) -> None:
    commit = hub.push("org/name", FILES)

    reports: list[tuple[int, int]] = []

    def push_on_progress(done: int, total: int) -> None:
        reports.append((done, total))
        if len(hub.repositories["org/name"].commits) == 1:
            hub.push("org/name", {**FILES, "examples.jsonl": b"newer"})

    resolved = source.fetch(SPEC, progress=push_on_progress)
    assert fetched(hub)[0] == "examples.jsonl"
    assert "README.md" not in fetched(hub)
    path = resolved.folder / "examples.jsonl"
    assert path.read_bytes() == EXAMPLES
    assert path.resolve().is_relative_to(resolved.link_root)
    assert resolved.files["examples.jsonl"] == sha256(EXAMPLES)
    assert (resolved.revision, resolved.examples_problem) == (commit, None)
    total = sum(len(FILES[name]) for name in (*REQUIRED, "examples.jsonl"))
    assert reports[-1] == (total, total)


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (Fault("examples.jsonl", status=404, headers={"X-Error-Code": "EntryNotFound"}, times=99), "lost a file"),
        (Fault("examples.jsonl", method="GET", status=404, times=99), "HTTP 404"),
        (Fault("examples.jsonl", status=500, times=99), "HTTP 500"),
        (Fault("examples.jsonl", method="GET", status=403, times=99), "HTTP 403"),
        (Fault("examples.jsonl", method="GET", cut_at=10, times=99), "broke off again and again"),
        (Fault("examples.jsonl", method="GET", body=EXAMPLES[:-1], times=99), "shorter than the Hub states"),
        (Fault("examples.jsonl", method="GET", body=EXAMPLES + b"x", times=99), "longer than the Hub states"),
        (Fault("examples.jsonl", location="self", times=99), "redirects without end"),
        (Fault("examples.jsonl", method="GET", drip_s=0.2, times=99), "took longer than 0.5 s"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_examples_that_do_not_come_cost_the_adapter_nothing_but_them(
    fault: Fault, problem: str, hub: FakeHub, tmp_path: Path
) -> None:
    commit = hub.push("org/name", FILES)
    hub.fail(dataclasses.replace(fault))
    reports: list[tuple[int, int]] = []
    source = make_source(hub, tmp_path, download_timeout_s=2 if fault.drip_s else 60)
    resolved = source.fetch(SPEC, progress=lambda *report: reports.append(report))
    assert {name: (resolved.folder / name).read_bytes() for name in REQUIRED} == REQUIRED
    assert resolved.revision == commit
    assert set(resolved.files) == set(REQUIRED)
    assert "examples.jsonl could not be downloaded" in str(resolved.examples_problem)
    assert problem in str(resolved.examples_problem)
    assert reports[-1][0] == reports[-1][1]


@pytest.mark.parametrize("lists_sizes", [True, False])
def test_examples_that_are_too_large_are_not_fetched(lists_sizes: bool, hub: FakeHub, source: HubSource) -> None:
    hub.push("org/name", {**FILES, "examples.jsonl": b"x" * (MAX_FILE_BYTES + 1)})
    hub.repositories["org/name"].lists_sizes = lists_sizes
    resolved = source.fetch(SPEC)
    assert "examples.jsonl: the file has 4194305 bytes, more than the limit" in str(resolved.examples_problem)
    assert set(resolved.files) == set(REQUIRED)
    assert "examples.jsonl" not in fetched(hub)


def test_examples_that_the_scanners_doubt_are_not_fetched(hub: FakeHub, source: HubSource) -> None:
    hub.push("org/name", FILES)
    issue = {"path": "examples.jsonl", "level": "suspicious"}
    hub.repositories["org/name"].security = {"filesWithIssues": [issue]}
    resolved = source.fetch(SPEC)
    assert "scanners call it suspicious" in str(resolved.examples_problem)
    assert "examples.jsonl" not in fetched(hub)
    issue["level"] = "unsafe"
    with pytest.raises(AdapterRefusedError, match="unsafe"):
        source.fetch(SPEC)


def test_a_download_killed_at_the_examples_is_not_taken_for_complete(hub: FakeHub, source: HubSource) -> None:
    commit = hub.push("org/name", FILES)
    spec = AdapterSpec(name="a", source="org/name", revision=commit)

    class KilledError(Exception):
        pass

    def kill(done: int, _total: int) -> None:
        if done >= 1000:
            raise KilledError

    hub.fail(Fault("examples.jsonl", method="GET", drip_s=0.01))
    with pytest.raises(KilledError):
        source.fetch(spec, progress=kill)
    hub.requests.clear()
    resolved = source.fetch(spec)
    assert (resolved.folder / "examples.jsonl").read_bytes() == EXAMPLES
    ranges = [request.range for request in hub.requests if request.method == "GET" and "examples" in request.path]
    assert len(ranges) == 1
    assert str(ranges[0]).startswith("bytes=")


def test_locked_examples_need_no_network_and_must_be_the_locked_ones(hub: FakeHub, source: HubSource) -> None:
    commit = hub.push("org/name", FILES)
    first = source.fetch(SPEC)
    hub.requests.clear()
    assert source.fetch(SPEC, locked=lock(commit, examples=EXAMPLES)) == first
    assert hub.requests == []
    (first.folder / "examples.jsonl").resolve().write_bytes(b"tampered with")
    assert source.fetch(SPEC, locked=lock(commit, examples=EXAMPLES)) == first
    assert (first.folder / "examples.jsonl").read_bytes() == EXAMPLES
    del hub.repositories["org/name"].commits[commit]["examples.jsonl"]  # which no sound Hub does
    shutil.rmtree(first.link_root)
    assert "is in adapters.lock" in str(source.fetch(SPEC, locked=lock(commit, examples=EXAMPLES)).examples_problem)
    hub.repositories["org/name"].commits[commit]["examples.jsonl"] = EXAMPLES
    forged = source.fetch(SPEC, locked=lock(commit, examples=b"other"))
    assert set(forged.files) == set(REQUIRED)
    assert forged.examples_problem is not None


def test_a_lock_without_examples_says_that_there_are_none(hub: FakeHub, source: HubSource) -> None:
    """As one written by an earlier version does."""
    commit = hub.push("org/name", FILES)
    source.fetch(SPEC)
    hub.requests.clear()
    resolved = source.fetch(SPEC, locked=lock(commit))
    assert hub.requests == []
    assert set(resolved.files) == set(REQUIRED)
    assert resolved.examples_problem is None
    shutil.rmtree(resolved.link_root)
    source.fetch(SPEC, locked=lock(commit))
    assert "examples.jsonl" not in fetched(hub)


def test_a_cached_commit_that_nobody_asked_for_examples_is_asked_for_them(hub: FakeHub, source: HubSource) -> None:
    """A cache that another program, or an earlier version, has filled; without the Hub it still serves."""
    commit = hub.push("org/name", FILES)
    spec = AdapterSpec(name="a", source="org/name", revision=commit)
    path = source.fetch(SPEC).folder / "examples.jsonl"
    path.resolve().unlink()
    path.unlink()
    assert "examples.jsonl" in source.fetch(spec).files
    path.resolve().unlink()
    path.unlink()
    hub.fail(Fault("/api/models", status=503, times=99))
    start_s = time.monotonic()
    resolved = source.fetch(spec)
    assert set(resolved.files) == set(REQUIRED)
    assert "not in the cache, and the Hub could not be asked" in str(resolved.examples_problem)
    assert set(source.fetch(SPEC, locked=lock(commit, examples=EXAMPLES)).files) == set(REQUIRED)
    assert time.monotonic() - start_s < 10


def test_a_subfolder_has_examples_of_its_own(hub: FakeHub, source: HubSource) -> None:
    inner = {f"deep/er/{name}": content for name, content in FILES.items()}
    hub.push("org/name", {**inner, "examples.jsonl": json.dumps("not these").encode()})
    resolved = source.fetch(AdapterSpec(name="a", source="org/name", subfolder="deep/er"))
    assert resolved.files["examples.jsonl"] == sha256(EXAMPLES)
    assert (resolved.folder / "examples.jsonl").resolve().is_relative_to(resolved.link_root)
