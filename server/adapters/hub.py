"""Adapters from the Hugging Face Hub: a branch becomes a commit once, sizes are checked before anything is fetched,
two files come down at that commit, and their bytes are verified. The only module here that talks to the network.

Access tokens are huggingface_hub's business (HF_TOKEN); this module neither reads nor logs them.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

from server.adapters.download_meter import DownloadMeter
from server.adapters.download_meter import Progress as Progress
from server.adapters.download_meter import ignore_progress as ignore_progress
from server.adapters.hub_errors import download_error
from server.adapters.lockfile import LockEntry
from server.adapters.peft_config import CONFIG_NAME, MAX_CONFIG_BYTES
from server.adapters.sources import COMMIT_PATTERN, ResolvedSource, checked_subfolder
from server.adapters.validation import PICKLE_NAMES, WEIGHTS_NAME
from server.config import AdapterSpec
from server.errors import AdapterDownloadError, AdapterRefusedError, RefusalReason

CLIENT_ERRORS: tuple[type[Exception], ...] = (
    HfHubHTTPError.__bases__[0],  # HTTPError of the HTTP library the client is built on: timeouts, connection errors
    OSError,  # most of the client's own, and the cache's
    ValueError,  # bad ids, and answers that are not JSON
    TypeError,  # answers that are not the JSON expected
    KeyError,
    RuntimeError,  # native code for Xet storage
)
"""What a call into huggingface_hub may raise; everything else is a bug of ours."""


FILE_NAMES = (CONFIG_NAME, WEIGHTS_NAME)
"""All that is ever downloaded of a repository."""


@dataclass(frozen=True)
class _RemoteFile:
    """One file as the Hub states it."""

    path: str
    """Inside the repository, with its subfolder."""
    size_bytes: int
    sha256: str | None
    """Of LFS files; git's own hash of small ones is no sha256 of the content."""


class HubSource:
    """Fetches Hub sources. Stateless and thread-safe."""

    def __init__(
        self,
        *,
        endpoint: str | None = None,
        cache_folder: Path | None = None,
        max_bytes: int = 2 * 1024**3,
        timeout_s: float = 30.0,
    ) -> None:
        """`endpoint` and `cache_folder` default to huggingface_hub's (HF_ENDPOINT, HF_HUB_CACHE)."""
        self._endpoint = endpoint
        self._cache_folder = cache_folder
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    def fetch(
        self, spec: AdapterSpec, *, locked: LockEntry | None = None, progress: Progress = ignore_progress
    ) -> ResolvedSource:
        """The two files of a Hub source on this machine.

        A locked commit wins over a branch that has moved, needs no network when its files are cached, and its bytes
        must be the locked ones. Raises AdapterDownloadError; AdapterRefusedError when the repository's file list
        already shows that it cannot be served; InvalidRequestError for a bad subfolder.
        """
        subfolder = checked_subfolder(spec.subfolder)
        wanted = {name: f"{subfolder}/{name}" if subfolder else name for name in FILE_NAMES}
        revision = locked.commit if locked is not None else spec.revision
        if revision is not None and re.fullmatch(COMMIT_PATTERN, revision):
            cached = self._from_cache(spec, wanted, revision)
            if cached is not None and (locked is None or cached.files == locked.files):
                progress(1, 1)
                return cached
        try:
            return self._download(spec, wanted, revision, locked, progress)
        except CLIENT_ERRORS as error:
            raise download_error(error, spec, None if locked is None else locked.commit) from error

    def _from_cache(self, spec: AdapterSpec, wanted: Mapping[str, str], commit: str) -> ResolvedSource | None:
        """Both files of a commit if huggingface_hub's cache has them."""
        found = {
            name: try_to_load_from_cache(spec.source, path, cache_dir=self._cache_folder, revision=commit)
            for name, path in wanted.items()
        }
        paths = {name: Path(path) for name, path in found.items() if isinstance(path, str)}
        if len(paths) < len(wanted):
            return None
        return _resolved(paths, {name: sha256_of(path) for name, path in paths.items()}, wanted)

    def _download(
        self,
        spec: AdapterSpec,
        wanted: Mapping[str, str],
        revision: str | None,
        locked: LockEntry | None,
        progress: Progress,
    ) -> ResolvedSource:
        api = HfApi(endpoint=self._endpoint)
        info = api.model_info(spec.source, revision=revision, files_metadata=True, timeout=self._timeout_s)
        commit = str(info.sha)
        if not re.fullmatch(COMMIT_PATTERN, commit):
            raise AdapterDownloadError(f"adapter {spec.name!r}: the Hub states no commit for {spec.source!r}")
        remote = self._checked_listing(spec, wanted, info.siblings or [])
        total = sum(file.size_bytes for file in remote.values())
        meter = DownloadMeter(progress, total)
        paths, hashes = {}, {}
        for name, file in remote.items():
            expected = locked.files.get(name) if locked is not None else file.sha256
            paths[name], hashes[name] = self._download_file(spec, file, commit, meter, expected)
        return _resolved(paths, hashes, wanted)

    def _checked_listing(
        self, spec: AdapterSpec, wanted: Mapping[str, str], siblings: list[Any]
    ) -> dict[str, _RemoteFile]:
        """What is to be fetched, judged by the repository's own list: presence, kind and size."""
        listed = {sibling.rfilename: sibling for sibling in siblings}
        files, reasons = {}, []
        for name, path in wanted.items():
            sibling = listed.get(path)
            if sibling is None:
                reasons.append(
                    _absent(path, [str(PurePosixPath(path).with_name(pickle)) for pickle in PICKLE_NAMES], listed)
                )
                continue
            if sibling.size is None:
                raise AdapterDownloadError(f"adapter {spec.name!r}: the Hub states no size for {path}")
            limit = MAX_CONFIG_BYTES if name == CONFIG_NAME else self._max_bytes
            if sibling.size > limit:
                message = f"the file has {sibling.size} bytes, more than the limit of {limit}; nothing was downloaded"
                reasons.append(RefusalReason("file_too_large", message, path))
            files[name] = _RemoteFile(path, sibling.size, sibling.lfs.sha256 if sibling.lfs else None)
        if reasons:
            raise AdapterRefusedError(spec.name, reasons)
        return files

    def _download_file(
        self, spec: AdapterSpec, file: _RemoteFile, commit: str, meter: DownloadMeter, expected_sha256: str | None
    ) -> tuple[Path, str]:
        """Fetch one file at a commit and verify it: its path and sha256. A damaged cached copy is fetched once more."""
        for is_retry in (False, True):
            meter.start_file()
            path = Path(
                hf_hub_download(
                    spec.source,
                    file.path,
                    revision=commit,
                    cache_dir=self._cache_folder,
                    endpoint=self._endpoint,
                    tqdm_class=meter.bar_class(),
                    force_download=is_retry,
                )
            )
            size_bytes, sha256 = path.stat().st_size, sha256_of(path)
            if size_bytes == file.size_bytes and expected_sha256 in (None, sha256):
                meter.end_file(file.size_bytes)
                return path, sha256
        problem = "has the wrong length" if size_bytes != file.size_bytes else "does not have the expected sha256"
        raise AdapterDownloadError(
            f"adapter {spec.name!r}: {file.path} of {spec.source!r} at {commit} {problem}; if adapters.lock is older "
            "than the repository's history, delete its entry, otherwise try again"
        )


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _resolved(paths: Mapping[str, Path], hashes: Mapping[str, str], wanted: Mapping[str, str]) -> ResolvedSource:
    """The cache lays files out as <cache>/models--org--name/snapshots/<commit>/<path>, linking into its blobs."""
    config = paths[CONFIG_NAME]
    depth = len(PurePosixPath(wanted[CONFIG_NAME]).parts)
    return ResolvedSource(
        folder=config.parent,
        link_root=config.parents[depth + 2],
        revision=config.parents[depth - 1].name,
        files=hashes,
    )


def _absent(path: str, pickles: list[str], listed: Mapping[str, Any]) -> RefusalReason:
    found = [pickle for pickle in pickles if pickle in listed]
    if path.endswith(WEIGHTS_NAME) and found:
        message = f"the weights are pickled ({found[0]}), which can run code; save them as safetensors"
        return RefusalReason("pickle_file", message, found[0])
    return RefusalReason("missing_file", f"the repository has no {path}", path)
