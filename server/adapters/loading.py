"""From an AdapterSpec to a validated Adapter: local folder or Hub, lock, checks. Knows no registry and no slots."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from server.adapters.download_meter import Progress, ignore_progress
from server.adapters.examples import EXAMPLES_NAME, ExamplesFile
from server.adapters.hub import HubSource
from server.adapters.lockfile import LockEntry, Lockfile, LockKey
from server.adapters.sources import ResolvedSource, local_folder
from server.adapters.weights import Adapter, AdapterLimits, load_adapter
from server.config import AdapterSpec
from server.errors import AdapterDownloadError, AdapterRefusedError, InvalidRequestError, RefusalReason
from server.routing.bank import ProjectionInfo

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterLoader:
    """Everything needed to load adapters for one base model."""

    projections: Mapping[str, ProjectionInfo]
    base_model_name: str
    limits: AdapterLimits
    hub: HubSource
    lockfile: Lockfile
    root: Path
    """Folder that relative sources are relative to."""

    def may_download(self, spec: AdapterSpec) -> bool:
        """Whether `load` may need the network. What is wrong with a source is for `load` to say."""
        try:
            return local_folder(spec, self.root) is None
        except InvalidRequestError:
            return False

    def is_at_hand(self, spec: AdapterSpec) -> bool:
        """Whether `load` finds the files on this machine, unless damaged: in a folder, or locked and cached."""
        return not self.may_download(spec) or self.hub.has(spec, self.lockfile.get(LockKey.of(spec)))

    def fetch(self, spec: AdapterSpec, *, progress: Progress) -> None:
        """Have a Hub source's files in the cache. Raises as `load`, but reads nothing of them."""
        self.hub.fetch(spec, locked=self.lockfile.get(LockKey.of(spec)), progress=progress)

    def load(
        self,
        spec: AdapterSpec,
        *,
        progress: Progress = ignore_progress,
        validating: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> Adapter:
        """Fetch and check one adapter; a Hub source is locked once it is known to be sound.

        `validating` is around the checks. Raises AdapterDownloadError, AdapterRefusedError, InvalidRequestError, and
        whatever the two callbacks raise.
        """
        start_s = time.monotonic()
        folder = local_folder(spec, self.root)
        locked = None
        if folder is not None:
            resolved = ResolvedSource(folder, link_root=folder)
        else:
            locked = self.lockfile.get(LockKey.of(spec))
            resolved = self._fetch(spec, locked, progress)
        with validating():
            adapter = load_adapter(
                resolved.folder,
                spec.name,
                projections=self.projections,
                base_model_name=self.base_model_name,
                limits=self.limits,
                source=spec.source,
                revision=resolved.revision,
                link_root=resolved.link_root,
            )
        if locked is not None and locked.digest != adapter.digest:
            message = "adapters.lock states another digest for these files; delete its entry to accept the new one"
            raise AdapterRefusedError(spec.name, [RefusalReason("lock_mismatch", message, "adapters.lock")])
        if resolved.revision is not None and not self._lock(spec, resolved, adapter, locked):
            # Another name has locked the same source meanwhile, and its branch has moved in between.
            return self.load(spec, progress=progress, validating=validating)
        logger.info(
            "adapter %s loaded in %.2f s, digest %s", spec.name, time.monotonic() - start_s, adapter.digest[:12]
        )
        return dataclasses.replace(adapter, examples=_examples_of(resolved))

    def _fetch(self, spec: AdapterSpec, locked: LockEntry | None, progress: Progress) -> ResolvedSource:
        """As `HubSource.fetch`. What never was a Hub source may have been meant as a folder, whose absence is told."""
        try:
            return self.hub.fetch(spec, locked=locked, progress=progress)
        except AdapterDownloadError as error:
            if locked is not None:
                raise
            folder = (self.root / spec.source).absolute()
            message = f"{error.message}. If a folder is meant: there is none at {folder}"
            raise AdapterDownloadError(message, param=error.param, code=error.code) from error

    def forget(self, spec: AdapterSpec) -> None:
        """Drop the lock of a source, so that registering it anew resolves its branch anew, and what there is of one
        whose download has not ended.
        """
        locked = self.lockfile.get(LockKey.of(spec))
        if locked is None and self.may_download(spec):
            self.hub.discard(spec.source)
        try:
            self.lockfile.remove(LockKey.of(spec))
        except OSError as error:
            logger.warning("adapters.lock still lists %s: %s", spec.source, error)
        if locked is not None and not self.lockfile.has_commit(spec.source, locked.commit):
            self.hub.release(spec.source, locked.commit)

    def _lock(self, spec: AdapterSpec, resolved: ResolvedSource, adapter: Adapter, locked: LockEntry | None) -> bool:
        """What is locked stays so, also while locked examples cannot be had. False: it is locked at another commit."""
        assert resolved.revision is not None
        files = {**({} if locked is None else locked.files), **resolved.files}
        try:
            return self.lockfile.put(LockKey.of(spec), LockEntry(resolved.revision, files, adapter.digest))
        except OSError as error:
            # A read-only deployment still serves; it only has to resolve the branch again next time.
            logger.warning("adapters.lock could not record %s at %s: %s", spec.source, resolved.revision, error)
            return True


def _examples_of(resolved: ResolvedSource) -> ExamplesFile:
    """A local folder may come to have some later; of a Hub source only the file that was verified counts."""
    if resolved.revision is None:
        return ExamplesFile(resolved.folder)
    has_examples = EXAMPLES_NAME in resolved.files
    return ExamplesFile(resolved.folder if has_examples else None, resolved.link_root, resolved.examples_problem)
