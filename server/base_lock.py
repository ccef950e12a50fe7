"""The base model's commit in adapters.lock: a branch is resolved once, and every start after that serves the same."""

import logging
from pathlib import Path

from server.adapters.lockfile import BaseLock, Lockfile
from server.config import BaseModelConfig
from server.model.sources import HubSource, locate

logger = logging.getLogger(__name__)


def at_locked_commit(base_model: BaseModelConfig, lock: Lockfile, root: Path) -> BaseModelConfig:
    """The base model to load: a Hub source at the commit that `lock` has of it, if any. Raises ModelLoadError."""
    source = locate(base_model, root)
    if not isinstance(source, HubSource):
        return base_model
    commit = lock.base_commit(source.repo_id, source.revision)
    return base_model.model_copy(update={"source": source.repo_id, "revision": commit or source.revision})


def lock_commit(base_model: BaseModelConfig, lock: Lockfile, root: Path, commit: str | None) -> None:
    """Remember the commit that a Hub source was loaded at. A lock that cannot be written is a warning: the model
    serves all the same."""
    source = locate(base_model, root)
    if not isinstance(source, HubSource) or commit is None:
        return
    try:
        lock.put_base(BaseLock(source.repo_id, source.revision, commit))
    except OSError as error:
        logger.warning("adapters.lock cannot be written (%s): the next start resolves the base model anew", error)
