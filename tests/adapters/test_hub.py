"""HubSource against a Hub on loopback, through huggingface_hub's own client and real HTTP."""

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.adapters.hub import HubSource, sha256_of
from server.adapters.lockfile import LockEntry
from server.config import AdapterSpec
from server.errors import AdapterDownloadError, AdapterRefusedError, InvalidRequestError
from tests.adapters.fake_hub import FakeHub, Fault

FILES = {
    "adapter_config.json": b'{"r": 4}',
    "adapter_model.safetensors": bytes(range(256)) * 1000,
    "README.md": b"never fetched",
    "optimizer.bin": b"never fetched",
}
SPEC = AdapterSpec(name="a", source="org/name")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with FakeHub() as hub:
        yield hub


@pytest.fixture
def source(hub: FakeHub, tmp_path: Path) -> HubSource:
    return HubSource(endpoint=hub.endpoint, cache_folder=tmp_path / "cache")


def lock(files: dict[str, bytes], commit: str) -> LockEntry:
    hashes = {name: hashlib.sha256(files[name]).hexdigest() for name in list(files)[:2]}
    return LockEntry(commit, hashes, "d" * 64)


def test_a_branch_is_resolved_once_and_two_files_come_down_at_its_commit(hub: FakeHub, source: HubSource) -> None:
    commit = hub.push("org/name", FILES)
    resolved = source.fetch(SPEC)
    assert resolved.revision == commit
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        path = resolved.folder / name
        assert path.read_bytes() == FILES[name]
        assert resolved.files[name] == sha256_of(path)
        assert path.resolve().is_relative_to(resolved.link_root)
    assert not any("README" in request.path or "optimizer" in request.path for request in hub.requests)
    assert all(commit in request.path for request in hub.requests if "/resolve/" in request.path)


def test_a_push_between_listing_and_download_does_not_mix_commits(hub: FakeHub, source: HubSource) -> None:
    first = hub.push("org/name", FILES)

    def push_on_progress(_done: int, _total: int) -> None:
        if len(hub.repositories["org/name"].commits) == 1:
            hub.push("org/name", {**FILES, "adapter_config.json": b'{"r": 8}'})

    resolved = source.fetch(SPEC, progress=push_on_progress)
    assert resolved.revision == first
    assert (resolved.folder / "adapter_config.json").read_bytes() == b'{"r": 4}'


def test_branch_tag_commit_and_subfolder_are_honoured(hub: FakeHub, source: HubSource) -> None:
    old = hub.push("org/name", {f"lora/v1/{name}": content for name, content in FILES.items()}, branch="dev/x")
    hub.push("org/name", {"README.md": b""})
    for revision in ("dev/x", old):
        spec = AdapterSpec(name="a", source="org/name", revision=revision, subfolder="lora/v1")
        resolved = source.fetch(spec)
        assert resolved.revision == old
        assert resolved.folder.parts[-2:] == ("lora", "v1")
        assert (resolved.folder / "adapter_config.json").resolve().is_relative_to(resolved.link_root)


def test_progress_rises_to_the_sum_of_both_sizes(hub: FakeHub, source: HubSource) -> None:
    hub.push("org/name", FILES)
    seen: list[tuple[int, int]] = []
    source.fetch(SPEC, progress=lambda done, total: seen.append((done, total)))
    total = len(FILES["adapter_config.json"]) + len(FILES["adapter_model.safetensors"])
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_locked_commit_wins_over_a_branch_that_moved(hub: FakeHub, source: HubSource) -> None:
    old = hub.push("org/name", FILES)
    hub.push("org/name", {**FILES, "adapter_config.json": b'{"r": 8}'})
    resolved = source.fetch(SPEC, locked=lock(FILES, old))
    assert resolved.revision == old
    assert (resolved.folder / "adapter_config.json").read_bytes() == b'{"r": 4}'


def test_a_locked_commit_that_is_gone_is_named_with_the_lock(hub: FakeHub, source: HubSource) -> None:
    hub.push("org/name", FILES)
    with pytest.raises(AdapterDownloadError, match=rf"no revision '{'e' * 40}'; adapters\.lock demands it"):
        source.fetch(SPEC, locked=lock(FILES, "e" * 40))


def test_a_locked_and_cached_source_needs_no_network(hub: FakeHub, source: HubSource) -> None:
    commit = hub.push("org/name", FILES)
    first = source.fetch(SPEC)
    hub.requests.clear()
    assert source.fetch(SPEC, locked=lock(FILES, commit)) == first
    assert hub.requests == []


def test_a_pinned_and_cached_commit_needs_no_network(hub: FakeHub, source: HubSource) -> None:
    commit = hub.push("org/name", FILES)
    source.fetch(SPEC)
    hub.requests.clear()
    source.fetch(AdapterSpec(name="a", source="org/name", revision=commit))
    assert hub.requests == []


def test_bytes_other_than_the_locked_ones_are_refused(hub: FakeHub, source: HubSource) -> None:
    commit = hub.push("org/name", FILES)
    forged = lock({**FILES, "adapter_model.safetensors": b"other"}, commit)
    with pytest.raises(AdapterDownloadError, match=r"adapter_model\.safetensors.*expected sha256"):
        source.fetch(SPEC, locked=forged)


def test_a_damaged_cached_file_is_fetched_anew(hub: FakeHub, source: HubSource) -> None:
    commit = hub.push("org/name", FILES)
    weights = source.fetch(SPEC).folder / "adapter_model.safetensors"
    weights.resolve().write_bytes(b"damaged")
    resolved = source.fetch(SPEC, locked=lock(FILES, commit))
    assert (resolved.folder / weights.name).read_bytes() == FILES[weights.name]


OFFLINE_SCRIPT = """
import sys, json
from pathlib import Path
from server.adapters.hub import HubSource
from server.adapters.lockfile import LockEntry
from server.config import AdapterSpec
from server.errors import AdapterDownloadError

endpoint, cache, lock = sys.argv[1:]
source = HubSource(endpoint=endpoint, cache_folder=Path(cache))
spec = AdapterSpec(name="a", source="org/name")
print(source.fetch(spec, locked=LockEntry(*json.loads(lock))).revision)
try:
    source.fetch(spec)
except AdapterDownloadError as error:
    print(error)
"""


def test_offline_mode_serves_locked_sources_from_the_cache(hub: FakeHub, tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads HF_HUB_OFFLINE once, when it is imported."""
    commit = hub.push("org/name", FILES)
    HubSource(endpoint=hub.endpoint, cache_folder=tmp_path).fetch(SPEC)
    hub.requests.clear()
    entry = lock(FILES, commit)
    done = subprocess.run(
        [
            *(sys.executable, "-c", OFFLINE_SCRIPT, hub.endpoint, str(tmp_path)),
            json.dumps([entry.commit, dict(entry.files), entry.digest]),
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    revision, message = done.stdout.splitlines()
    assert revision == commit
    assert "HF_HUB_OFFLINE is set" in message
    assert hub.requests == []


def test_sizes_are_checked_before_anything_is_fetched(hub: FakeHub, tmp_path: Path) -> None:
    hub.push("org/name", {**FILES, "adapter_config.json": b" " * 2_000_000})
    source = HubSource(endpoint=hub.endpoint, cache_folder=tmp_path, max_bytes=1000)
    with pytest.raises(AdapterRefusedError) as caught:
        source.fetch(SPEC)
    assert [reason.code for reason in caught.value.reasons] == ["file_too_large", "file_too_large"]
    assert hub.count("GET", "/resolve/") == hub.count("GET", "/cdn/") == 0


def test_repositories_without_the_two_files_are_refused_by_name(hub: FakeHub, source: HubSource) -> None:
    hub.push("org/name", {"README.md": b"", "adapter_model.bin": b"\x80\x04"})
    with pytest.raises(AdapterRefusedError) as caught:
        source.fetch(SPEC)
    assert [reason.code for reason in caught.value.reasons] == ["missing_file", "pickle_file"]


def test_more_bytes_than_stated_are_not_written_to_the_end(hub: FakeHub, source: HubSource) -> None:
    hub.push("org/name", FILES)
    hub.fail(Fault("/cdn/", times=9, body=bytes(20_000_000)))
    with pytest.raises(AdapterDownloadError, match=r"more than|wrong length"):
        source.fetch(SPEC)


def test_fewer_bytes_than_stated_are_an_error(hub: FakeHub, source: HubSource) -> None:
    hub.push("org/name", FILES)
    hub.fail(Fault("/cdn/", times=9, body=b"short"))
    with pytest.raises(AdapterDownloadError, match="wrong length"):
        source.fetch(SPEC)


def test_bytes_that_do_not_have_the_stated_sha256_are_an_error(hub: FakeHub, source: HubSource) -> None:
    hub.push("org/name", FILES)
    hub.fail(Fault("/cdn/", times=9, body=bytes(len(FILES["adapter_model.safetensors"]))))
    with pytest.raises(AdapterDownloadError, match="expected sha256"):
        source.fetch(SPEC)


def test_a_download_that_breaks_off_is_resumed(hub: FakeHub, source: HubSource) -> None:
    hub.push("org/name", FILES)
    hub.fail(Fault("/cdn/", cut_at=100_000))
    resolved = source.fetch(SPEC)
    assert (resolved.folder / "adapter_model.safetensors").read_bytes() == FILES["adapter_model.safetensors"]
    assert hub.count("GET", "/cdn/") == 2


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "private|refused access"), (403, "refused access"), (429, "limits our rate"), (500, "HTTP 500"),
     (503, "HTTP 503"), (418, "HTTP 418")],
)  # fmt: skip
def test_http_errors_become_words_that_help(status: int, message: str, hub: FakeHub, source: HubSource) -> None:
    hub.push("org/name", FILES)
    hub.fail(Fault("/api/models", status=status))
    with pytest.raises(AdapterDownloadError, match=message):
        source.fetch(SPEC)


def test_unknown_repository_revision_and_gate_are_told_apart(hub: FakeHub, source: HubSource) -> None:
    hub.push("org/name", FILES)
    hub.push("org/gated", FILES)
    hub.repositories["org/gated"].is_gated = True
    for spec, message in [
        (AdapterSpec(name="a", source="org/absent"), "has no 'org/absent', or it is private"),
        (AdapterSpec(name="a", source="org/name", revision="absent"), "no revision 'absent'"),
        (AdapterSpec(name="a", source="org/name", revision="f" * 40), "no revision"),
        (AdapterSpec(name="a", source="org/gated"), "gated"),
        (AdapterSpec(name="a", source="org/na..me"), "not a Hub id"),
    ]:
        with pytest.raises(AdapterDownloadError, match=message):
            source.fetch(spec)


def test_answers_that_are_not_the_hubs_are_an_error(hub: FakeHub, source: HubSource) -> None:
    hub.fail(Fault("/api/models", status=200))
    with pytest.raises(AdapterDownloadError, match="not the Hub's"):
        source.fetch(SPEC)


def test_a_hub_that_is_slow_or_gone_is_an_error(hub: FakeHub, tmp_path: Path) -> None:
    hub.push("org/name", FILES)
    hub.fail(Fault("/api/models", delay_s=0.5))
    source = HubSource(endpoint=hub.endpoint, cache_folder=tmp_path, timeout_s=0.05)
    with pytest.raises(AdapterDownloadError, match="did not answer in time"):
        source.fetch(SPEC)
    gone = HubSource(endpoint="http://127.0.0.1:9", cache_folder=tmp_path)
    with pytest.raises(AdapterDownloadError, match="could not be reached"):
        gone.fetch(SPEC)


def test_private_repositories_need_the_token_and_it_is_never_logged(
    hub: FakeHub, source: HubSource, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.push("org/name", FILES)
    hub.repositories["org/name"].token = "hf_secret"
    with pytest.raises(AdapterDownloadError, match="HF_TOKEN"):
        source.fetch(SPEC)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with caplog.at_level(logging.DEBUG):
        source.fetch(SPEC)
    tokens = {request.path.split("/")[1]: request.token for request in hub.requests}  # the last of each kind
    assert tokens == {"api": "hf_secret", "org": "hf_secret", "cdn": None}
    assert "hf_secret" not in caplog.text


def test_progress_may_abandon_a_download(hub: FakeHub, source: HubSource) -> None:
    hub.push("org/name", FILES)

    class AbandonedError(Exception):
        pass

    def abandon(done: int, _total: int) -> None:
        if done > 0:
            raise AbandonedError

    with pytest.raises(AbandonedError):
        source.fetch(SPEC, progress=abandon)
    source.fetch(SPEC)


@pytest.mark.parametrize("subfolder", ["../other", "/etc", "a/../../b", "a\\..\\b"])
def test_subfolders_that_lead_out_are_refused(subfolder: str, source: HubSource) -> None:
    with pytest.raises(InvalidRequestError, match="relative path"):
        source.fetch(AdapterSpec(name="a", source="org/name", subfolder=subfolder))
