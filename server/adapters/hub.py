"""Adapters from the Hugging Face Hub: a branch becomes a commit once, sizes are checked before anything is fetched,
two files come down at that commit, and examples if it has some, and their bytes are verified. Only the modules `hub*`
here talk to the network.

Tokens go into headers that huggingface_hub makes, to the Hub's own address; none is logged or stored.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from server.adapters.download_meter import Progress as Progress
from server.adapters.download_meter import ignore_progress as ignore_progress
from server.adapters.examples import EXAMPLES_NAME
from server.adapters.hub_cache import (
    cached_source,
    has_files,
    mark_in_use,
    repository_folder,
    resolved_source,
    unmark,
)
from server.adapters.hub_errors import download_error
from server.adapters.hub_fetch import DOWNLOAD_ERRORS, OPTIONAL_TIMEOUT_S, FetchSettings, fetch_files
from server.adapters.hub_listing import require_allowed
from server.adapters.hub_retry import RetryPolicy
from server.adapters.hub_transfer import discard_partials
from server.adapters.lockfile import LockEntry
from server.adapters.peft_config import CONFIG_NAME
from server.adapters.sources import COMMIT_PATTERN, ResolvedSource, checked_subfolder
from server.adapters.validation import WEIGHTS_NAME
from server.config import AdapterSpec, Secrets, ServerSettings
from server.errors import AdapterDownloadError

REQUIRED_NAMES = (CONFIG_NAME, WEIGHTS_NAME)
FILE_NAMES = (EXAMPLES_NAME, *REQUIRED_NAMES)
"""All that is ever downloaded of a repository. The examples come whether or not the registration asks for routing: the
lock is the source's, and the next registration of it, or `calibrate` without a network, may ask."""

DEFAULT_REVISION = "main"
DEFAULT_RETRIES = RetryPolicy()


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

    def has(self, spec: AdapterSpec, locked: LockEntry | None) -> bool:
        """Whether the cache has every file of a locked source, whatever is in them. Asks nobody."""
        if locked is None:
            return False
        folder = checked_subfolder(spec.subfolder)
        paths = [f"{folder}/{name}" if folder else name for name in locked.files]
        return has_files(spec.source, paths, locked.commit, self._settings.cache_folder)

    def release(self, repository: str, commit: str) -> None:
        """No adapter is of this commit any more: its files may go once the cache is pruned."""
        unmark(repository_folder(repository, self._settings.cache_folder), commit)

    def discard(self, repository: str) -> None:
        """Nobody wants what downloads that broke off have left of it."""
        discard_partials(repository_folder(repository, self._settings.cache_folder) / "blobs")

    def fetch(
        self, spec: AdapterSpec, *, locked: LockEntry | None = None, progress: Progress = ignore_progress
    ) -> ResolvedSource:
        """The files of a Hub source on this machine: the two required ones, and its examples or why they did not come.

        A locked commit wins over a branch that has moved, needs no network when its files are cached, and its bytes
        must be the locked ones; a lock without examples says that there are none. Raises AdapterDownloadError;
        AdapterRefusedError when the source is not allowed or the repository's file list already shows that it cannot be
        served; InvalidRequestError for a bad subfolder.
        """
        subfolder = checked_subfolder(spec.subfolder)
        require_allowed(spec, spec.source, self._settings.allowed)
        names = FILE_NAMES if locked is None else [name for name in FILE_NAMES if name in locked.files]
        wanted = {name: f"{subfolder}/{name}" if subfolder else name for name in names}
        revision = locked.commit if locked is not None else spec.revision or DEFAULT_REVISION
        settings, cached = self._settings, None
        if re.fullmatch(COMMIT_PATTERN, revision):
            cached = cached_source(spec.source, wanted, revision, locked, settings.cache_folder)
            if cached is not None:
                mark_in_use(repository_folder(spec.source, settings.cache_folder), revision)
            if cached is not None and cached.examples_problem is None:
                progress(1, 1)
                return cached
            if cached is not None:  # all that is missing may be missing
                timeout_s = min(settings.download_timeout_s, OPTIONAL_TIMEOUT_S)
                settings = dataclasses.replace(settings, download_timeout_s=timeout_s)
        try:
            fetched = fetch_files(spec, wanted, revision, settings, self._token_for(spec.source), locked, progress)
            return resolved_source(fetched.paths, fetched.hashes, wanted, fetched.examples_problem)
        except DOWNLOAD_ERRORS as error:
            if cached is not None:
                return cached
            if isinstance(error, AdapterDownloadError):
                raise
            raise download_error(error, spec, None if locked is None else locked.commit) from error
