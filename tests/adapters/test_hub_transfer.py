"""What servers do to ranges, bodies and encodings: a sound file comes of it, or an error that says what it was."""

import dataclasses
import errno
import fcntl
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from server.adapters.hub import HubSource
from server.adapters.hub_retry import RetryPolicy
from server.adapters.hub_transfer import PARTIAL_SUFFIX, discard_partials
from server.config import AdapterSpec
from server.errors import AdapterDownloadError
from tests.adapters.fake_hub import FakeHub, Fault

WEIGHTS = bytes(range(256)) * 1000
FILES = {"adapter_config.json": b'{"r": 4}', "adapter_model.safetensors": WEIGHTS}
SPEC = AdapterSpec(name="a", source="org/name")


@pytest.fixture
def source(hub: FakeHub, tmp_path: Path) -> HubSource:
    hub.push("org/name", FILES)
    return HubSource(endpoint=hub.endpoint, cache_folder=tmp_path / "cache", retries=RetryPolicy(4, first_wait_s=0.01))


@pytest.fixture
def partial(hub: FakeHub, source: HubSource, tmp_path: Path) -> Iterator[Path]:
    """A download that broke off, and that the registration gave up."""
    hub.fail(Fault("/cdn/", cut_at=50_000, times=99))
    with pytest.raises(AdapterDownloadError, match="broke off again and again"):
        source.fetch(SPEC)
    hub.faults.clear()
    hub.requests.clear()
    (path,) = tmp_path.rglob("*.partial")
    assert path.stat().st_size > 0
    yield path
    assert not path.exists()


def fetched_weights(source: HubSource) -> bytes:
    return (source.fetch(SPEC).folder / "adapter_model.safetensors").read_bytes()


def ranges(hub: FakeHub) -> list[str | None]:
    return [request.range for request in hub.requests if request.method == "GET" and "/cdn/" in request.path]


@pytest.mark.usefixtures("partial")
def test_a_server_that_refuses_ranges_gets_asked_for_the_whole(hub: FakeHub, source: HubSource) -> None:
    hub.fail(Fault("/cdn/", refuses_range=True, times=99))
    assert fetched_weights(source) == WEIGHTS
    assert [known is None for known in ranges(hub)] == [False, True]


@pytest.mark.usefixtures("partial")
def test_resumes_that_bring_nothing_give_way_to_a_new_beginning(hub: FakeHub, source: HubSource) -> None:
    hub.fail(Fault("/cdn/", cut_at=0, times=2))
    assert fetched_weights(source) == WEIGHTS
    assert [known is None for known in ranges(hub)] == [False, False, True]


@pytest.mark.usefixtures("partial")
def test_a_server_that_compresses_ranges_gets_asked_for_the_whole(hub: FakeHub, source: HubSource) -> None:
    hub.fail(Fault("/cdn/", compresses=True, times=99))
    assert fetched_weights(source) == WEIGHTS
    assert [known is None for known in ranges(hub)] == [False, True]


def test_a_server_that_compresses_unasked_is_understood(hub: FakeHub, source: HubSource) -> None:
    hub.fail(Fault("/resolve/", compresses=True, times=99))
    hub.fail(Fault("/cdn/", compresses=True, times=99))
    assert fetched_weights(source) == WEIGHTS


@pytest.mark.parametrize(
    ("content", "problem"), [(WEIGHTS * 100, "longer than the Hub states"), (WEIGHTS[:-1], "shorter than the Hub")]
)
def test_a_compressed_body_of_another_length_is_an_error(
    content: bytes, problem: str, hub: FakeHub, source: HubSource, tmp_path: Path
) -> None:
    hub.fail(Fault("/cdn/", compresses=True, body=content, times=99))
    with pytest.raises(AdapterDownloadError, match=problem):
        source.fetch(SPEC)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 2 * len(WEIGHTS)


def test_a_body_that_breaks_off_without_ranges_is_named_as_that(hub: FakeHub, source: HubSource) -> None:
    for fault in (Fault("/cdn/", cut_at=1000, ignores_range=True), Fault("/cdn/", cut_at=1000, compresses=True)):
        hub.fail(dataclasses.replace(fault, times=99))
        with pytest.raises(AdapterDownloadError, match=r"broke off again and again; try again"):
            source.fetch(SPEC)
        hub.faults.clear()


# Files outside LFS, whose ETag is git's hash


def etag(hub: FakeHub, value: str, listed: Mapping[str, object] | None = None) -> None:
    """What the Hub says of the config: its ETag, and another hash in its list, if that is given."""
    commit = hub.repositories["org/name"].branches["main"]
    hub.fail(
        Fault(
            "adapter_config.json",
            method="HEAD",
            status=200,
            body=FILES["adapter_config.json"],
            headers={"ETag": value, "X-Repo-Commit": commit},
            times=99,
        )
    )
    if listed is not None:
        hub.repositories["org/name"].listed["adapter_config.json"] = listed


def test_a_file_outside_lfs_must_have_gits_hash(hub: FakeHub, source: HubSource) -> None:
    hub.fail(Fault("adapter_config.json", method="GET", body=b'{"r": 8}'))
    assert (source.fetch(SPEC).folder / "adapter_config.json").read_bytes() == b'{"r": 4}'


@pytest.mark.parametrize("lists_sizes", [True, False])
def test_other_content_of_equal_length_is_refused(lists_sizes: bool, hub: FakeHub, source: HubSource) -> None:
    hub.repositories["org/name"].lists_sizes = lists_sizes
    hub.fail(Fault("adapter_config.json", method="GET", body=b'{"r": 8}', times=99))
    with pytest.raises(AdapterDownloadError, match=r"adapter_config\.json .* does not have the sha1"):
        source.fetch(SPEC)


def test_other_content_in_the_cache_is_fetched_anew(hub: FakeHub, source: HubSource) -> None:
    config = source.fetch(SPEC).folder / "adapter_config.json"
    config.resolve().write_bytes(b'{"r": 8}')
    hub.requests.clear()
    assert (source.fetch(SPEC).folder / "adapter_config.json").read_bytes() == b'{"r": 4}'
    assert hub.count("GET", "adapter_config.json") == 1
    assert hub.count("GET", "/cdn/") == 0


@pytest.mark.parametrize(
    ("value", "listed"),
    [
        (f'W/"{"a" * 40}"', None),
        (f'"{"a" * 39}"', None),
        (f'"{"a" * 40}"', {}),
        (f'"{hashlib.sha1(FILES["adapter_config.json"]).hexdigest()}"', {"blobId": None}),
    ],
    ids=["weak", "short", "not the listed one", "of the content alone"],
)
def test_etags_that_are_no_git_hash_are_not_taken_for_one(
    value: str, listed: Mapping[str, object] | None, hub: FakeHub, source: HubSource
) -> None:
    etag(hub, value, listed)
    resolved = source.fetch(SPEC)
    assert (resolved.folder / "adapter_config.json").resolve().name == re.sub(r'W/|"', "", value)


def test_a_download_that_filled_the_disk_does_not_keep_it_full(source: HubSource, tmp_path: Path) -> None:
    def report(done: int, total: int) -> None:
        if total and done > total // 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(AdapterDownloadError, match="disk that holds the Hub cache is full"):
        source.fetch(SPEC, progress=report)
    assert not list(tmp_path.rglob("*.partial"))


def test_partial_files_are_discarded_but_for_those_in_use(tmp_path: Path) -> None:
    left, used = (tmp_path / f"{name}{PARTIAL_SUFFIX}" for name in ("left", "used"))
    for path in (left, used, tmp_path / "whole"):
        path.write_text("x")
    with used.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        discard_partials(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", used.name}
    discard_partials(tmp_path / "absent")
