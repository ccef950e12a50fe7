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

    Raises what `check_folder` raises, and InvalidRequestError for a spec that contradicts itself or names no path.
    """
    _refuse_homes_of_others(spec.source, "source")
    spec = spec.with_revision_apart(config.root, config.adapter_roots)
    folder = local_folder(spec, config.root)
    if folder is None:
        return spec
    check_folder(config, folder, named=spec.source, param="source")
    return spec.model_copy(update={"source": str(folder), "subfolder": None})


def router_folder(config: ServerConfig, path: str) -> Path:
    """The artefact folder that `path` names, relative to adapters.yaml. Raises what `check_folder` raises."""
    _refuse_homes_of_others(path, "path")
    try:
        folder = (config.root / Path(path).expanduser()).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        # A name too long, a loop of links, a null character.
        raise InvalidRequestError(f"path {path[:200]!r} is not a usable path", param="path") from error
    check_folder(config, folder, named=path, param="path")
    return folder


def check_folder(config: ServerConfig, folder: Path, *, named: str, param: str) -> None:
    """Raise PermissionDeniedError outside the adapter roots, without a word about what is there, and
    InvalidRequestError if there is no such folder inside. `folder` is resolved, `named` is what the client wrote.
    """
    if not any(folder.is_relative_to(root) for root in config.adapter_roots):
        raise _outside(param, named)
    try:
        is_folder = folder.is_dir()
    except OSError:
        is_folder = False
    if not is_folder:
        raise InvalidRequestError(f"{param} {named[:200]!r} is not a folder", param=param)


def _refuse_homes_of_others(path: str, param: str) -> None:
    """Whether there is one would tell a client who has an account here. A folder of such a name is `./~name`."""
    if path.startswith("~") and path[1:2] not in ("", "/"):
        raise _outside(param, path)


def _outside(param: str, named: str) -> PermissionDeniedError:
    return PermissionDeniedError(
        f"{param} {named[:200]!r} lies outside the adapter roots (--adapter-root); only folders below them may be "
        "loaded over HTTP",
        param=param,
    )
