"""Which folders HTTP clients may name: those below the adapter roots, after every symlink is resolved."""

import logging
from pathlib import Path

from server.adapters.sources import local_folder
from server.config import AdapterSpec, ServerConfig
from server.errors import InvalidRequestError, PermissionDeniedError

logger = logging.getLogger(__name__)


def warn_of_missing_roots(config: ServerConfig) -> None:
    """Below a root that is not there nothing can be registered: a slip of the pen, or a disk that is not mounted."""
    for root in config.adapter_roots:
        if not root.is_dir():
            logger.warning("the adapter root %s is not a folder; no adapter below it can be registered", root)


def checked_source(config: ServerConfig, spec: AdapterSpec) -> AdapterSpec:
    """The spec as the registry may have it: a Hub source with its revision apart, a local one with its folder resolved.

    Raises what `check_folder` raises, and InvalidRequestError for a spec that contradicts itself.
    """
    spec = spec.with_revision_apart(config.root, config.adapter_roots)
    try:
        folder = local_folder(spec, config.root)
    except (OSError, RuntimeError) as error:
        raise _unusable("source", spec.source) from error
    if folder is None:
        return spec
    check_folder(config, folder, named=spec.source, param="source")
    return spec.model_copy(update={"source": str(folder), "subfolder": None})


def router_folder(config: ServerConfig, path: str) -> Path:
    """The artefact folder that `path` names, relative to adapters.yaml. Raises what `check_folder` raises."""
    try:
        folder = (config.root / Path(path).expanduser()).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise _unusable("path", path) from error
    check_folder(config, folder, named=path, param="path")
    return folder


def check_folder(config: ServerConfig, folder: Path, *, named: str, param: str) -> None:
    """Raise PermissionDeniedError outside the adapter roots, without a word about what is there, and
    InvalidRequestError if there is no such folder inside. `folder` is resolved, `named` is what the client wrote.
    """
    if not any(folder.is_relative_to(root) for root in config.adapter_roots):
        raise PermissionDeniedError(
            f"{param} {named[:200]!r} lies outside the adapter roots (--adapter-root); only folders below them may be "
            "loaded over HTTP",
            param=param,
        )
    try:
        is_folder = folder.is_dir()
    except OSError:
        is_folder = False
    if not is_folder:
        raise InvalidRequestError(f"{param} {named[:200]!r} is not a folder", param=param)


def _unusable(param: str, path: str) -> InvalidRequestError:
    """For names that are too long, loops of links, null characters, homes of nobody."""
    return InvalidRequestError(f"{param} {path[:200]!r} is not a usable path", param=param)
