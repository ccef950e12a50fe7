"""Adapters from the Hugging Face Hub: a branch becomes a commit once, sizes are checked before anything is fetched,
two files come down at that commit, and their bytes are verified. Only the modules `hub*` here talk to the network.

Tokens are passed to huggingface_hub and to nobody else; none is logged or stored.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Self

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

from server.adapters.download_meter import Progress as Progress
from server.adapters.download_meter import ignore_progress as ignore_progress
from server.adapters.hub_errors import download_error
from server.adapters.hub_fetch import FetchSettings, fetch_files, sha256_of
from server.adapters.hub_listing import require_allowed
from server.adapters.hub_retry import RetryPolicy
from server.adapters.lockfile import LockEntry
from server.adapters.peft_config import CONFIG_NAME
from server.adapters.sources import COMMIT_PATTERN, ResolvedSource, checked_subfolder
from server.adapters.validation import WEIGHTS_NAME
from server.config import AdapterSpec, Secrets, ServerSettings

CLIENT_ERRORS: tuple[type[Exception], ...] = (
    HfHubHTTPError.__bases__[0],  # HTTPError of the HTTP library the client is built on: timeouts, connection errors
    OSError,  # most of the client's own, and the cache's
    ValueError,  # bad ids, and answers that are not JSON
    TypeError,  # answers that are not the JSON expected
    KeyError,
    RuntimeError,
)
"""What a call into huggingface_hub may raise; everything else is a bug of ours."""

FILE_NAMES = (CONFIG_NAME, WEIGHTS_NAME)
"""All that is ever downloaded of a repository."""

DEFAULT_REVISION = "main"
DEFAULT_RETRIES = RetryPolicy()

_ETAG_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
"""ETags become file names in the cache."""


class HubSource:
    """Fetches Hub sources. Stateless and thread-safe."""

    def __init__(
        self,
        *,
        endpoint: str | None = None,
        cache_folder: Path | None = None,
        max_bytes: int = 2 * 1024**3,
        timeout_s: float = 30.0,
        download_timeout_s: float = 1800.0,
        allowed: Sequence[str] = (),
        token_for: Callable[[str], str | None] = lambda _: None,
        retries: RetryPolicy = DEFAULT_RETRIES,
    ) -> None:
        """`endpoint` and `cache_folder` default to huggingface_hub's (HF_ENDPOINT, HF_HUB_CACHE).

        `timeout_s` bounds one answer or pause of the Hub, `download_timeout_s` a whole fetch. `token_for` gives the
        token of a repository; None leaves it to huggingface_hub (HF_TOKEN).
        """
        self._token_for = token_for
        self._settings = FetchSettings(
            endpoint, cache_folder, max_bytes, timeout_s, download_timeout_s, tuple(allowed), retries
        )

    @classmethod
    def from_settings(cls, settings: ServerSettings, secrets: Secrets) -> Self:
        """As the server's settings and the environment's tokens have it."""
        return cls(
            max_bytes=settings.max_adapter_bytes,
            timeout_s=settings.hub_timeout_s,
            download_timeout_s=settings.hub_download_timeout_s,
            allowed=settings.hub_allowed,
            token_for=secrets.hub_token,
            retries=RetryPolicy(settings.hub_retries),
        )

    def fetch(
        self, spec: AdapterSpec, *, locked: LockEntry | None = None, progress: Progress = ignore_progress
    ) -> ResolvedSource:
        """The two files of a Hub source on this machine.

        A locked commit wins over a branch that has moved, needs no network when its files are cached, and its bytes
        must be the locked ones. Raises AdapterDownloadError; AdapterRefusedError when the source is not allowed or the
        repository's file list already shows that it cannot be served; InvalidRequestError for a bad subfolder.
        """
        subfolder = checked_subfolder(spec.subfolder)
        require_allowed(spec, spec.source, self._settings.allowed)
        wanted = {name: f"{subfolder}/{name}" if subfolder else name for name in FILE_NAMES}
        revision = locked.commit if locked is not None else spec.revision or DEFAULT_REVISION
        if re.fullmatch(COMMIT_PATTERN, revision):
            cached = self._from_cache(spec, wanted, revision)
            if cached is not None and (locked is None or cached.files == locked.files):
                progress(1, 1)
                return cached
        try:
            paths, hashes = fetch_files(
                spec, wanted, revision, self._settings, self._token_for(spec.source), locked, progress
            )
            return _resolved(paths, hashes, wanted)
        except CLIENT_ERRORS as error:
            raise download_error(error, spec, None if locked is None else locked.commit) from error

    def _from_cache(self, spec: AdapterSpec, wanted: Mapping[str, str], commit: str) -> ResolvedSource | None:
        """Both files of a commit if huggingface_hub's cache has them."""
        found = {
            name: try_to_load_from_cache(spec.source, path, cache_dir=self._settings.cache_folder, revision=commit)
            for name, path in wanted.items()
        }
        paths = {name: Path(path) for name, path in found.items() if isinstance(path, str)}
        if len(paths) < len(wanted):
            return None
        return _resolved(paths, {name: sha256_of(path) for name, path in paths.items()}, wanted)


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
