"""One download of one Hub source: listing, headers, then bytes, each checked before the next, within one deadline."""

import hashlib
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.file_download import HfFileMetadata, repo_folder_name
from huggingface_hub.utils._headers import build_hf_headers

from server.adapters.download_meter import DownloadMeter, Progress
from server.adapters.hub_listing import RemoteFile, check_size, checked_files, commit_of, require_allowed
from server.adapters.hub_retry import RetryPolicy
from server.adapters.hub_transfer import WrongContentError, download
from server.adapters.lockfile import LockEntry
from server.config import AdapterSpec
from server.errors import AdapterDownloadError, AdapterRefusedError

T = TypeVar("T")

_ETAG_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
"""ETags become file names in the cache."""


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


def fetch_files(
    spec: AdapterSpec,
    wanted: Mapping[str, str],
    revision: str,
    settings: FetchSettings,
    token: str | None,
    locked: LockEntry | None,
    progress: Progress,
) -> tuple[dict[str, Path], dict[str, str]]:
    """Path in the cache and sha256 of each wanted file, by name.

    Raises what huggingface_hub raises, AdapterDownloadError and AdapterRefusedError, and what `progress` raises.
    """
    return _Fetch(spec, wanted, settings, token, locked, progress).run(revision)


class _Fetch:
    """One download of one source: its token, its deadline, its progress."""

    def __init__(
        self,
        spec: AdapterSpec,
        wanted: Mapping[str, str],
        settings: FetchSettings,
        token: str | None,
        locked: LockEntry | None,
        progress: Progress,
    ) -> None:
        self._settings = settings
        self._spec = spec
        self._wanted = wanted
        self._locked = locked
        self._token = token
        self._deadline_s = time.monotonic() + settings.download_timeout_s
        self._meter = DownloadMeter(progress)

    def run(self, revision: str) -> tuple[dict[str, Path], dict[str, str]]:
        """Raises CLIENT_ERRORS, AdapterDownloadError and AdapterRefusedError."""
        settings, spec = self._settings, self._spec
        api = HfApi(endpoint=settings.endpoint, token=self._token)
        info = self._retried(
            "the list of files",
            lambda: api.model_info(
                spec.source, revision=revision, files_metadata=True, securityStatus=True, timeout=settings.timeout_s
            ),
        )
        require_allowed(spec, str(info.id), settings.allowed)  # the Hub redirects names of repositories that have moved
        commit = commit_of(info, spec, revision)
        remote = checked_files(info, spec, self._wanted, max_bytes=settings.max_bytes)
        # The headers of both files before a byte of either: sizes that the list left out are checked here.
        heads = {name: self._metadata(file, commit) for name, file in remote.items()}
        sizes = {name: self._size(file, heads[name]) for name, file in remote.items()}
        if reasons := [reason for name, file in remote.items() for reason in check_size(file, sizes[name])]:
            raise AdapterRefusedError(spec.name, reasons)
        self._meter.start(sum(sizes.values()))
        paths, hashes = {}, {}
        for name, file in remote.items():
            paths[name], hashes[name] = self._file(name, file, heads[name], sizes[name], commit)
            self._meter.end_file(sizes[name])
        return paths, hashes

    def _metadata(self, file: RemoteFile, commit: str) -> HfFileMetadata:
        url = self._url(file, commit)
        head = self._retried(
            file.path,
            lambda: get_hf_file_metadata(
                url, token=self._token, timeout=self._settings.timeout_s, endpoint=self._settings.endpoint
            ),
        )
        if head.commit_hash not in (None, commit) or not re.fullmatch(_ETAG_PATTERN, head.etag or ""):
            raise self._error(f"the Hub's headers for {file.path} at {commit} are not usable; check HF_ENDPOINT")
        return head

    def _size(self, file: RemoteFile, head: HfFileMetadata) -> int:
        stated = {size for size in (file.size_bytes, head.size) if size is not None}
        if len(stated) != 1:
            problem = "no size" if not stated else "two different sizes"
            raise self._error(f"the Hub states {problem} for {file.path}; check HF_ENDPOINT and proxies")
        return stated.pop()

    def _file(
        self, name: str, file: RemoteFile, head: HfFileMetadata, size_bytes: int, commit: str
    ) -> tuple[Path, str]:
        """Fetch one file at a commit and verify it: its path in the cache and its sha256."""
        etag = str(head.etag)
        stated = file.sha256 or (etag if re.fullmatch(r"[0-9a-f]{64}", etag) else None)
        expected = stated if self._locked is None else self._locked.files.get(name)
        if stated not in (None, expected):
            raise self._wrong_content(file, commit, "does not have the expected sha256")
        for is_last_try in (False, True):
            try:
                self._fill_blob(file, etag, size_bytes, expected, commit)
            except WrongContentError as error:
                if is_last_try:
                    raise self._wrong_content(file, commit, str(error)) from error
                continue
            path = self._placed(file, commit)
            found = sha256_of(path)
            if path.stat().st_size == size_bytes and expected in (None, found):
                return path, found
            path.unlink()  # a copy of the blob, on file systems without links
        raise self._wrong_content(file, commit, "cannot be placed in the cache")

    def _fill_blob(self, file: RemoteFile, etag: str, size_bytes: int, expected: str | None, commit: str) -> None:
        """Have the file's sound content in the cache's blob folder, where huggingface_hub looks before it downloads."""
        settings = self._settings
        cache = Path(constants.HF_HUB_CACHE) if settings.cache_folder is None else settings.cache_folder
        blob = cache / repo_folder_name(repo_id=self._spec.source, repo_type="model") / "blobs" / etag
        if blob.is_file():
            if blob.stat().st_size == size_bytes and (expected is None or sha256_of(blob) == expected):
                return
            blob.unlink()
        headers = build_hf_headers(token=self._token)
        self._retried(
            file.path,
            lambda: download(
                self._url(file, commit),
                blob,
                headers=headers,
                size_bytes=size_bytes,
                sha256=expected,
                timeout_s=settings.timeout_s,
                on_bytes=self._on_bytes,
            ),
        )

    def _placed(self, file: RemoteFile, commit: str) -> Path:
        """huggingface_hub links the blob into the commit's snapshot."""
        return Path(
            self._retried(
                file.path,
                lambda: hf_hub_download(
                    self._spec.source,
                    file.path,
                    revision=commit,
                    cache_dir=self._settings.cache_folder,
                    endpoint=self._settings.endpoint,
                    token=self._token,
                    etag_timeout=self._settings.timeout_s,
                ),
            )
        )

    def _url(self, file: RemoteFile, commit: str) -> str:
        return hf_hub_url(self._spec.source, file.path, revision=commit, endpoint=self._settings.endpoint)

    def _retried(self, what: str, attempt: Callable[[], T]) -> T:
        return self._settings.retries.call(attempt, what=f"{what} of {self._spec.source}", check=self._check)

    def _on_bytes(self, done: int) -> None:
        self._check()
        self._meter.file_has(done)

    def _check(self) -> None:
        """Raises AdapterDownloadError when the time is up, and what abandons the download."""
        self._meter.report()
        if time.monotonic() > self._deadline_s:
            raise self._error(
                f"the download of {self._spec.source!r} took longer than {self._settings.download_timeout_s:g} s; "
                "try again (what has come is kept), or raise server.hub_download_timeout_s"
            )

    def _wrong_content(self, file: RemoteFile, commit: str, problem: str) -> AdapterDownloadError:
        return self._error(
            f"{file.path} of {self._spec.source!r} at {commit} {problem}; if adapters.lock is older than the "
            "repository's history, delete its entry, otherwise try again"
        )

    def _error(self, message: str) -> AdapterDownloadError:
        return AdapterDownloadError(f"adapter {self._spec.name!r}: {message}", param="source")


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
