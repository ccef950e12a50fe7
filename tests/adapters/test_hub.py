"""HubSource against a Hub on loopback, through huggingface_hub's own client and real HTTP."""

import email.utils
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import scan_cache_dir

from server.adapters.hub import HubSource
from server.adapters.hub_cache import sha256_of
from server.adapters.hub_errors import asked_wait_s, download_error
from server.adapters.hub_retry import RetryPolicy
from server.adapters.lockfile import LockEntry
from server.config import AdapterSpec, load_secrets
from server.errors import AdapterDownloadError, AdapterRefusedError, ConfigError, InvalidRequestError
from tests.adapters.fake_hub import FakeHub, Fault, Repository

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
    return make_source(hub, tmp_path)


def make_source(hub: FakeHub, tmp_path: Path, **options: Any) -> HubSource:
    """With waits between tries that a test can afford."""
    defaults: dict[str, Any] = {"cache_folder": tmp_path / "cache", "retries": RetryPolicy(2, first_wait_s=0.01)}
    return HubSource(endpoint=hub.endpoint, **{**defaults, **options})


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
    assert len({done for done, _ in seen}) > 3, "bytes are reported while they arrive"


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
    hub.push("org/name", {f"{folder}/{name}": content for folder in ("a/b", "c") for name, content in FILES.items()})
    with pytest.raises(AdapterRefusedError, match=r"there is one in a/b, c: name it as subfolder"):
        source.fetch(AdapterSpec(name="a", source="org/name", revision="main"))
    hub.push("org/name", FILES)
    with pytest.raises(AdapterRefusedError, match="there is one at its root: leave subfolder out"):
        source.fetch(AdapterSpec(name="a", source="org/name", subfolder="b"))


def test_nothing_of_a_repositorys_card_gets_in_the_way(hub: FakeHub, source: HubSource) -> None:
    """The client's own reading of the list trips over keys that it does not know, or knows too well."""
    hub.push("org/name", FILES)
    hub.repositories["org/name"].described = {
        "cardData": {"self": "x", "tags": 7},
        "transformersInfo": {"auto_model": "x", "brand_new": 1},
        "gguf": [],
    }
    assert source.fetch(SPEC).files


def test_a_prune_of_the_cache_spares_what_is_in_use(hub: FakeHub, source: HubSource, tmp_path: Path) -> None:
    first = hub.push("org/name", FILES)
    source.fetch(SPEC)
    second = hub.push("org/name", {**FILES, "README.md": b"newer"})
    source.fetch(SPEC)
    (repository,) = scan_cache_dir(tmp_path / "cache").repos
    assert {revision.commit_hash: bool(revision.refs) for revision in repository.revisions}[first]
    assert all(revision.refs for revision in repository.revisions)
    shutil.rmtree(tmp_path / "cache/models--org--name/refs")  # as an older server left it
    for commit in (first, second):
        source.fetch(AdapterSpec(name="a", source="org/name", revision=commit))
    (repository,) = scan_cache_dir(tmp_path / "cache").repos
    assert all(revision.refs for revision in repository.revisions)
    source.release("org/name", first)
    (repository,) = scan_cache_dir(tmp_path / "cache").repos
    assert [revision.commit_hash for revision in repository.revisions if not revision.refs] == [first]


def test_more_bytes_than_stated_are_not_written_to_the_end(hub: FakeHub, source: HubSource) -> None:
    hub.push("org/name", FILES)
    hub.fail(Fault("/cdn/", times=9, body=bytes(20_000_000)))
    with pytest.raises(AdapterDownloadError, match="longer than the Hub states"):
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


def test_a_download_that_breaks_off_goes_on_where_it_was(hub: FakeHub, source: HubSource) -> None:
    hub.push("org/name", FILES)
    hub.fail(Fault("/cdn/", cut_at=100_000))
    resolved = source.fetch(SPEC)
    assert (resolved.folder / "adapter_model.safetensors").read_bytes() == FILES["adapter_model.safetensors"]
    ranges = [request.range for request in hub.requests if request.method == "GET" and "/cdn/" in request.path]
    assert ranges[0] is None
    assert re.fullmatch(r"bytes=[1-9]\d*-", str(ranges[1]))
    assert len(ranges) == 2


def test_a_partial_file_outlives_the_process_and_is_completed(hub: FakeHub, source: HubSource, tmp_path: Path) -> None:
    hub.push("org/name", FILES)
    hub.fail(Fault("/cdn/", cut_at=50_000, times=9))
    with pytest.raises(AdapterDownloadError, match=r"could not be reached|broke off"):
        source.fetch(SPEC)
    hub.faults.clear()
    hub.requests.clear()
    resolved = make_source(hub, tmp_path).fetch(SPEC)
    assert (resolved.folder / "adapter_model.safetensors").read_bytes() == FILES["adapter_model.safetensors"]
    ranges = [request.range for request in hub.requests if request.method == "GET" and "/cdn/" in request.path]
    assert len(ranges) == 1
    assert ranges[0] is not None


def test_a_partial_file_that_is_wrong_is_thrown_away(hub: FakeHub, source: HubSource) -> None:
    hub.push("org/name", FILES)
    hub.fail(Fault("/cdn/", body=b"x" * len(FILES["adapter_model.safetensors"]), cut_at=100_000))
    resolved = source.fetch(SPEC)
    assert (resolved.folder / "adapter_model.safetensors").read_bytes() == FILES["adapter_model.safetensors"]


def test_a_server_that_ignores_ranges_does_not_corrupt_the_file(hub: FakeHub, source: HubSource) -> None:
    hub.push("org/name", FILES)
    hub.fail(Fault("/cdn/", cut_at=100_000))
    hub.fail(Fault("/cdn/", ignores_range=True))
    resolved = source.fetch(SPEC)
    assert (resolved.folder / "adapter_model.safetensors").read_bytes() == FILES["adapter_model.safetensors"]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
@pytest.mark.parametrize("path", ["/api/models", "/resolve/", "/cdn/"])
def test_failures_that_may_pass_are_tried_again(path: str, status: int, hub: FakeHub, source: HubSource) -> None:
    commit = hub.push("org/name", FILES)
    hub.fail(Fault(path, status=status, times=2))
    assert source.fetch(SPEC).revision == commit


@pytest.mark.parametrize("status", [400, 401, 403, 404, 418])
def test_failures_that_stay_are_not_tried_again(status: int, hub: FakeHub, source: HubSource) -> None:
    hub.push("org/name", FILES)
    hub.fail(Fault("/api/models", status=status, times=9))
    with pytest.raises(AdapterDownloadError):
        source.fetch(SPEC)
    assert hub.count("GET", "/api/models") == 1


@pytest.mark.parametrize(("name", "value"), [("Retry-After", "{}"), ("RateLimit", '"api";r=0;t={}')])
def test_a_wait_that_the_hub_asks_for_is_kept_unless_it_is_too_long(
    hub: FakeHub, source: HubSource, name: str, value: str
) -> None:
    hub.push("org/name", FILES)
    hub.fail(Fault("/api/models", status=429, headers={name: value.format(1)}))
    start_s = time.monotonic()
    source.fetch(SPEC)
    assert time.monotonic() - start_s >= 1
    hub.fail(Fault("/api/models", status=429, headers={name: value.format(3600)}))
    with pytest.raises(AdapterDownloadError, match="limits our rate"):
        source.fetch(AdapterSpec(name="a", source="org/name", revision="main"))
    assert time.monotonic() - start_s < 30


@pytest.mark.parametrize(("ahead_s", "seconds"), [(120, 120.0), (-120, 0.0)])
def test_a_wait_may_be_a_date(ahead_s: int, seconds: float) -> None:
    class Answered(Exception):  # noqa: N818 - stands for the client's
        date = email.utils.formatdate(time.time() + ahead_s, usegmt=True)
        response = types.SimpleNamespace(status_code=429, headers={"Retry-After": date})

    assert asked_wait_s(Answered()) == pytest.approx(seconds, abs=5)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ('"api";r=0;t=12', 12.0),
        ('"resolvers"; t=7; r=0', 7.0),
        ('"api";r=3;t=12', None),
        ('"api";r=0;t=55, "pages";r=90;t=200', 55.0),
        ('"api";r=0', None),
        ("nonsense", None),
    ],
)
def test_the_hubs_rate_limit_header_says_how_long_to_wait(header: str, seconds: float | None) -> None:
    class Answered(Exception):  # noqa: N818 - stands for the client's
        response = types.SimpleNamespace(status_code=429, headers={"RateLimit": header})

    assert asked_wait_s(Answered()) == seconds
    message = download_error(Answered(), SPEC).message
    assert f"wait {'a few minutes' if seconds is None else f'{seconds:g} s'}" in message


@pytest.mark.parametrize("path", ["/api/models", "/resolve/", "/cdn/"])
def test_redirects_without_end_are_an_error(path: str, hub: FakeHub, source: HubSource) -> None:
    hub.push("org/name", FILES)
    hub.fail(Fault(path, location="self", times=10_000))
    with pytest.raises(AdapterDownloadError, match="redirects without end"):
        source.fetch(SPEC)


def test_a_hub_that_drips_is_given_up_and_may_be_abandoned(hub: FakeHub, tmp_path: Path) -> None:
    hub.push("org/name", FILES)
    hub.fail(Fault("/cdn/", drip_s=0.05, times=99))
    start_s = time.monotonic()
    with pytest.raises(AdapterDownloadError, match="took longer than 1 s"):
        make_source(hub, tmp_path, download_timeout_s=1).fetch(SPEC)
    assert time.monotonic() - start_s < 10

    class AbandonedError(Exception):
        pass

    def abandon(_done: int, _total: int) -> None:
        if time.monotonic() - start_s > 1:
            raise AbandonedError

    start_s = time.monotonic()
    with pytest.raises(AbandonedError):
        make_source(hub, tmp_path).fetch(SPEC, progress=abandon)
    assert time.monotonic() - start_s < 10


# What real Hubs and mirrors do besides


def test_sizes_that_the_listing_leaves_out_come_from_the_headers(
    hub: FakeHub, source: HubSource, tmp_path: Path
) -> None:
    hub.push("org/name", FILES)
    hub.repositories["org/name"].lists_sizes = False
    with pytest.raises(AdapterRefusedError, match="nothing was downloaded"):
        make_source(hub, tmp_path, max_bytes=1000).fetch(SPEC)
    assert hub.count("GET", "/resolve/") == hub.count("GET", "/cdn/") == 0
    assert (source.fetch(SPEC).folder / "adapter_model.safetensors").stat().st_size == 256_000


def test_a_repository_that_was_renamed_is_found_by_its_old_name(hub: FakeHub, source: HubSource) -> None:
    commit = hub.push("org/newer", FILES)
    hub.repositories["org/name"] = Repository(moved_to="org/newer")
    assert source.fetch(SPEC).revision == commit


def test_only_allowed_organisations_and_repositories_are_asked(hub: FakeHub, tmp_path: Path) -> None:
    for name in ("org/name", "org/other", "Team/one", "evil/moved-in"):
        hub.push(name, FILES)
    hub.repositories["team/renamed"] = Repository(moved_to="evil/moved-in")
    source = make_source(hub, tmp_path, allowed=("org/name", "team"))
    source.fetch(SPEC)
    source.fetch(AdapterSpec(name="a", source="Team/one"))
    hub.requests.clear()
    for refused in ("org/other", "evil/moved-in", "org/name2", "teams/one"):
        with pytest.raises(AdapterRefusedError, match=r"source_not_allowed.*server\.hub_allowed"):
            source.fetch(AdapterSpec(name="a", source=refused))
    assert hub.requests == []
    with pytest.raises(AdapterRefusedError, match="'evil/moved-in' is not among"):
        source.fetch(AdapterSpec(name="a", source="team/renamed"))


@pytest.mark.parametrize(
    ("issues", "is_refused"),
    [
        ([], False),
        ([{"path": "adapter_model.safetensors", "level": "safe"}], False),
        ([{"path": "adapter_model.safetensors", "level": "suspicious"}], True),
        ([{"path": "adapter_config.json", "level": "unsafe"}], True),
        ([{"path": "training_args.bin", "level": "suspicious"}], False),
        ([{"path": "evil\x1b[2J.bin", "level": "unsafe"}], True),
        ([None, 3, {"path": None}], False),
    ],
)
def test_the_verdict_of_the_hubs_scanners_is_respected(
    issues: list[Any], is_refused: bool, hub: FakeHub, source: HubSource
) -> None:
    hub.push("org/name", FILES)
    hub.repositories["org/name"].security = {"scansDone": True, "filesWithIssues": issues}
    if not is_refused:
        source.fetch(SPEC)
        return
    with pytest.raises(AdapterRefusedError, match="scanners warn of") as caught:
        source.fetch(SPEC)
    assert [reason.code for reason in caught.value.reasons] == ["scanner_verdict"]
    assert str(caught.value).isprintable()
    assert hub.count("HEAD", "/resolve/") == 0


def test_tokens_per_source_go_to_their_source_only_and_nowhere_else(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LORA_MIXER_HUB_TOKENS", "org/name=hf_exact, org=hf_wide")
    monkeypatch.setenv("HF_TOKEN", "hf_general")
    tokens = {"org/name": "hf_exact", "org/other": "hf_wide", "else/where": "hf_general"}
    for name, token in tokens.items():
        hub.push(name, FILES)
        hub.repositories[name].token = token
    source = make_source(hub, tmp_path, token_for=load_secrets().hub_token)
    with caplog.at_level(logging.DEBUG):
        for name in tokens:
            source.fetch(AdapterSpec(name="a", source=name))
    assert all(request.token is None for request in hub.requests if "/cdn/" in request.path)
    assert "hf_" not in caplog.text
    assert "hf_" not in repr(load_secrets())
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not any(token.encode() in written for token in tokens.values())


@pytest.mark.parametrize("value", ["hf_alone", "org/name/x=hf_a", "org=", "=hf_a", "o g=hf_a", "org=hf_\u00e9"])
def test_malformed_token_lists_are_refused_without_repeating_them(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_MIXER_HUB_TOKENS", f"good=hf_good,{value}")
    with pytest.raises(ConfigError, match="part 2 is not of the form") as caught:
        load_secrets()
    assert "hf_" not in str(caught.value)


@pytest.mark.parametrize("etag", ['"../../../escape"', '"a/b"', '"."', '""', '"' + "x" * 200 + '"'])
def test_headers_that_would_name_files_elsewhere_are_refused(
    etag: str, hub: FakeHub, source: HubSource, tmp_path: Path
) -> None:
    commit = hub.push("org/name", FILES)
    headers = {"ETag": etag, "X-Repo-Commit": commit, "X-Linked-Size": "8", "X-Linked-ETag": etag}
    hub.fail(Fault("/resolve/", status=200, method="HEAD", times=9, headers=headers))
    with pytest.raises(AdapterDownloadError, match=r"not usable|not the Hub's"):
        source.fetch(SPEC)
    assert not list(tmp_path.rglob("*escape*"))


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "private|refused access"), (403, "refused access"), (429, "limits our rate"), (500, "HTTP 500"),
     (503, "HTTP 503"), (418, "HTTP 418")],
)  # fmt: skip
def test_http_errors_become_words_that_help(status: int, message: str, hub: FakeHub, source: HubSource) -> None:
    hub.push("org/name", FILES)
    hub.fail(Fault("/api/models", status=status, times=9))
    with pytest.raises(AdapterDownloadError, match=message):
        source.fetch(SPEC)


@pytest.mark.parametrize(
    ("status", "message"), [(403, "refused the Hub's link"), (404, "does not have one of them"), (501, "failed")]
)
def test_errors_of_the_host_that_keeps_the_files_are_not_told_as_the_hubs(
    status: int, message: str, hub: FakeHub, source: HubSource
) -> None:
    hub.push("org/name", FILES)
    hub.fail(Fault("/cdn/", status=status, times=9))
    with pytest.raises(AdapterDownloadError, match=rf"that the Hub keeps .* {message}.*\(HTTP {status}\)") as caught:
        source.fetch(SPEC)
    assert "TOKEN" not in caught.value.message


def test_a_link_that_has_expired_is_asked_for_again(hub: FakeHub, source: HubSource) -> None:
    commit = hub.push("org/name", FILES)
    hub.fail(Fault("/cdn/", status=403, times=2))
    assert source.fetch(SPEC).revision == commit
    assert hub.count("GET", "/resolve/") == hub.count("GET", "/cdn/") + 1 == 4, "the config's as well"


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
    hub.fail(Fault("/api/models", delay_s=0.5, times=9))
    source = make_source(hub, tmp_path, timeout_s=0.05)
    with pytest.raises(AdapterDownloadError, match="did not answer in time"):
        source.fetch(SPEC)
    gone = HubSource(endpoint="http://127.0.0.1:9", cache_folder=tmp_path, retries=RetryPolicy(1, 0.01))
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
