"""One download of one Hub source: listing, headers, then bytes, each checked before the next, within one deadline."""

import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import hf_hub_url
from huggingface_hub.hf_api import ModelInfo

from server.adapters.download_meter import DownloadMeter, Progress
from server.adapters.examples import EXAMPLES_NAME
from server.adapters.hub_answers import FileHead, ask_for_head, ask_for_list
from server.adapters.hub_cache import mark_in_use, note_absence, place, repository_folder
from server.adapters.hub_content import StatedContent, WrongContentError
from server.adapters.hub_errors import download_error
from server.adapters.hub_listing import (
    RemoteFile,
    check_size,
    checked_files,
    commit_of,
    examples_file,
    require_allowed,
)
from server.adapters.hub_requests import HTTP_ERROR, HubCall, HubRequests
from server.adapters.hub_retry import RetryPolicy
from server.adapters.hub_transfer import FileDownload
from server.adapters.lockfile import LockEntry
from server.config import AdapterSpec
from server.errors import AdapterDownloadError, AdapterRefusedError

logger = logging.getLogger(__name__)

T = TypeVar("T")

CLIENT_ERRORS: tuple[type[Exception], ...] = (
    HTTP_ERROR,
    OSError,  # most of the client's own, and the cache's
    ValueError,  # bad ids, and answers that are not JSON
    TypeError,  # answers that are not the JSON expected
    KeyError,
    RuntimeError,
)
"""What a call to the Hub may raise; everything else is a bug of ours."""

DOWNLOAD_ERRORS: tuple[type[Exception], ...] = (*CLIENT_ERRORS, AdapterDownloadError)
"""Also what the checks of a download raise."""

OPTIONAL_TIMEOUT_S = 60.0
"""What the examples may take, and no more than a quarter of what all may: an adapter must not fail for their sake."""


@dataclass(frozen=True)
class FetchSettings:
    """What is the same for every download; see `HubSource`."""

    endpoint: str | None
    cache_folder: Path | None
    max_bytes: int
    timeout_s: float
    download_timeout_s: float
    allowed: tuple[str, ...]
    retries: RetryPolicy


@dataclass(frozen=True)
class Fetched:
    """What a download has brought."""

    paths: Mapping[str, Path]
    """In the cache, by name."""
    hashes: Mapping[str, str]
    """sha256 by name."""
    examples_problem: str | None
    """Why the examples are not among them, although the repository has some."""


def fetch_files(
    spec: AdapterSpec,
    wanted: Mapping[str, str],
    revision: str,
    settings: FetchSettings,
    token: str | None,
    locked: LockEntry | None,
    progress: Progress,
) -> Fetched:
    """Each wanted file; the examples come first, so that whoever finds the other two finds them as well.

    Raises CLIENT_ERRORS, AdapterDownloadError and AdapterRefusedError, and what `progress` raises.
    """
    with HubRequests(token=token, timeout_s=settings.timeout_s) as requests:
        return _Fetch(spec, wanted, settings, requests, locked, progress).run(revision)


class _Fetch:
    """One download of one source: its connections, its deadline, its progress."""

    def __init__(
        self,
        spec: AdapterSpec,
        wanted: Mapping[str, str],
        settings: FetchSettings,
        requests: HubRequests,
        locked: LockEntry | None,
        progress: Progress,
    ) -> None:
        self._settings = settings
        self._spec = spec
        self._wanted = wanted
        self._locked = locked
        self._requests = requests
        self._limit_s = settings.download_timeout_s
        self._deadline_s = time.monotonic() + self._limit_s
        self._meter = DownloadMeter(progress)
        self._cache_folder = repository_folder(spec.source, settings.cache_folder)
        self._examples_problem: str | None = None

    def run(self, revision: str) -> Fetched:
        """See `fetch_files`."""
        settings, spec = self._settings, self._spec
        info = self._retried(
            "the list of files", lambda call: ask_for_list(call, spec.source, revision, settings.endpoint)
        )
        require_allowed(spec, str(info.id), settings.allowed)  # the Hub redirects names of repositories that have moved
        commit = commit_of(info, spec, revision)
        required = {name: path for name, path in self._wanted.items() if name != EXAMPLES_NAME}
        remote = checked_files(info, spec, required, max_bytes=settings.max_bytes)
        # The headers of all files before a byte of any: sizes that the list left out are checked here.
        heads = {name: self._head(file, commit) for name, file in remote.items()}
        sizes = {name: self._size(file, heads[name]) for name, file in remote.items()}
        if reasons := [reason for name, file in remote.items() for reason in check_size(file, sizes[name])]:
            raise AdapterRefusedError(spec.name, reasons)
        examples = self._examples_head(info, commit)
        self._meter.start(sum(sizes.values()) + (examples[2] if examples else 0))
        paths, hashes = {}, {}
        if examples and (
            found := self._forgiven(examples[0].path, lambda: self._file(EXAMPLES_NAME, *examples, commit))
        ):
            paths[EXAMPLES_NAME], hashes[EXAMPLES_NAME] = found
        self._meter.end_file(examples[2] if examples else 0)
        for name, file in remote.items():
            paths[name], hashes[name] = self._file(name, file, heads[name], sizes[name], commit)
            self._meter.end_file(sizes[name])
        mark_in_use(self._cache_folder, commit)
        return Fetched(paths, hashes, self._examples_problem)

    def _examples_head(self, info: ModelInfo, commit: str) -> tuple[RemoteFile, FileHead, int] | None:
        """The examples with headers and size, if they are wanted, are there and may be fetched."""
        if (path := self._wanted.get(EXAMPLES_NAME)) is None:
            return None
        file, self._examples_problem = examples_file(info, path)
        if file is None:
            if self._examples_problem is None and self._locked is None:
                note_absence(self._cache_folder, commit, path)
            elif self._examples_problem is None:
                self._examples_problem = f"{path} is in adapters.lock, but the Hub lists none at {commit}"
            return None

        def look() -> tuple[FileHead, int]:
            head = self._head(file, commit)
            return head, self._size(file, head)

        if (found := self._forgiven(path, look)) is None:
            return None
        if reasons := check_size(file, found[1]):
            self._examples_problem = f"{path}: {reasons[0].message}"
            return None
        return file, *found

    def _forgiven(self, path: str, attempt: Callable[[], T]) -> T | None:
        """What `attempt` gives within a time of its own; None when the optional file at `path` cannot be had."""
        before = self._limit_s, self._deadline_s
        self._limit_s = min(OPTIONAL_TIMEOUT_S, self._limit_s / 4)
        self._deadline_s = min(self._deadline_s, time.monotonic() + self._limit_s)
        try:
            return attempt()
        except DOWNLOAD_ERRORS as error:
            known = error if isinstance(error, AdapterDownloadError) else download_error(error, self._spec)
            self._examples_problem = f"{path} could not be downloaded: {known.message}"
            logger.warning("%s", self._examples_problem)
            return None
        finally:
            self._limit_s, self._deadline_s = before

    def _head(self, file: RemoteFile, commit: str) -> FileHead:
        url = self._url(file, commit)
        head = self._retried(file.path, lambda call: ask_for_head(call, url))
        if head is None or head.commit not in (None, commit):
            raise self._error(f"the Hub's headers for {file.path} at {commit} are not usable; check HF_ENDPOINT")
        return head

    def _size(self, file: RemoteFile, head: FileHead) -> int:
        stated = {size for size in (file.size_bytes, head.size_bytes) if size is not None}
        if len(stated) != 1:
            problem = "no size" if not stated else "two different sizes"
            raise self._error(f"the Hub states {problem} for {file.path}; check HF_ENDPOINT and proxies")
        return stated.pop()

    def _file(self, name: str, file: RemoteFile, head: FileHead, size_bytes: int, commit: str) -> tuple[Path, str]:
        """Fetch one file at a commit and verify it: its path in the cache and its sha256."""
        stated = file.sha256 or (head.etag if re.fullmatch(r"[0-9a-f]{64}", head.etag) else None)
        expected = stated if self._locked is None else self._locked.files.get(name)
        if stated not in (None, expected):
            raise self._wrong_content(file, commit, "does not have the expected sha256")
        content = StatedContent(size_bytes, expected, head.sha1(file.git_hash) if expected is None else None)
        blob = self._cache_folder / "blobs" / head.etag
        try:
            sha256 = self._blob(file, blob, content, commit)
        except WrongContentError:
            try:
                sha256 = self._blob(file, blob, content, commit)
            except WrongContentError as error:
                raise self._wrong_content(file, commit, str(error)) from error
        return place(blob, self._cache_folder, commit, file.path), sha256

    def _blob(self, file: RemoteFile, blob: Path, content: StatedContent, commit: str) -> str:
        """Have the file's content in the cache, whoever put it there; its sha256. Raises WrongContentError."""
        if blob.is_file():
            try:
                with blob.open("rb") as found:
                    return content.sha256_of(found)
            except WrongContentError:
                blob.unlink()
        return self._retried(file.path, FileDownload(self._url(file, commit), blob, content, self._on_bytes).attempt)

    def _url(self, file: RemoteFile, commit: str) -> str:
        return hf_hub_url(self._spec.source, file.path, revision=commit, endpoint=self._settings.endpoint)

    def _retried(self, what: str, attempt: Callable[[HubCall], T]) -> T:
        return self._settings.retries.call(
            lambda: self._requests.call(attempt, self._check), what=f"{what} of {self._spec.source}", check=self._check
        )

    def _on_bytes(self, done: int) -> None:
        self._check()
        self._meter.file_has(done)

    def _check(self) -> None:
        """Raises AdapterDownloadError when the time is up, and what abandons the download."""
        self._meter.report()
        if time.monotonic() > self._deadline_s:
            raise self._error(
                f"the download of {self._spec.source!r} took longer than {self._limit_s:g} s; "
                "try again (what has come is kept), or raise server.hub_download_timeout_s"
            )

    def _wrong_content(self, file: RemoteFile, commit: str, problem: str) -> AdapterDownloadError:
        return self._error(
            f"{file.path} of {self._spec.source!r} at {commit} {problem}; if adapters.lock is older than the "
            "repository's history, delete its entry, otherwise try again"
        )

    def _error(self, message: str) -> AdapterDownloadError:
        return AdapterDownloadError(f"adapter {self._spec.name!r}: {message}", param="source")
