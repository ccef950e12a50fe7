"""Where an adapter's files come from: a local folder or the Hub. Pure path and name logic, no I/O but `is_dir`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from server.config import AdapterSpec
from server.errors import InvalidRequestError
from server.naming import HUB_ID_PATTERN

COMMIT_PATTERN = r"[0-9a-f]{40}"


@dataclass(frozen=True)
class ResolvedSource:
    """Files of one adapter on this machine."""

    folder: Path
    link_root: Path
    """Folder that links of `folder` may lead into: the folder itself, or the Hub cache of its repository."""
    revision: str | None = None
    """Commit of a Hub source; None for a local folder."""
    files: Mapping[str, str] = field(default_factory=dict)
    """File name -> sha256 in hex; Hub sources only."""
    examples_problem: str | None = None
    """Why the examples of a Hub source could not be had."""


def local_folder(spec: AdapterSpec, root: Path) -> Path | None:
    """Absolute folder of a local source with its links resolved, or None when the source is a Hub id.

    A source that is a folder below `root` (or absolute) is local; what merely looks like a Hub id is one; everything
    else is taken for a folder that is missing. `spec.with_revision_apart` comes first. Raises InvalidRequestError when
    the spec contradicts itself, or names a URL.
    """
    if not spec.source or "\0" in spec.source:
        raise InvalidRequestError(f"adapter {spec.name!r}: the source is not a path or Hub id", param="source")
    subfolder = checked_subfolder(spec.subfolder)
    try:
        return _local_folder(spec, subfolder, root)
    except (OSError, RuntimeError) as error:  # A name too long, a loop of links, the home of nobody.
        problem = error.strerror if isinstance(error, OSError) else error
        message = f"adapter {spec.name!r}: the source {spec.source[:200]!r} is not a usable path: {problem}"
        raise InvalidRequestError(message, param="source") from error


def _local_folder(spec: AdapterSpec, subfolder: str | None, root: Path) -> Path | None:
    """As `local_folder`; also raises OSError and RuntimeError."""
    path = Path(spec.source).expanduser()
    if not (root / path).is_dir() and re.fullmatch(HUB_ID_PATTERN, spec.source) is not None:
        return None
    if "://" in spec.source:
        message = (
            f"adapter {spec.name!r}: the source {spec.source[:200]!r} is a URL, and none is ever opened; name a "
            "repository of the Hub as org/name, or org/name@revision"
        )
        raise InvalidRequestError(message, param="source")
    if spec.revision is not None:
        message = f"adapter {spec.name!r}: revision is for Hub sources; {spec.source!r} is a local folder"
        raise InvalidRequestError(message, param="revision")
    folder = (root / path).resolve()
    inner = (folder / subfolder).resolve() if subfolder else folder
    if not inner.is_relative_to(folder):
        raise InvalidRequestError(
            f"adapter {spec.name!r}: subfolder {spec.subfolder!r} leads out of the source", param="subfolder"
        )
    return inner


def place(spec: AdapterSpec, root: Path) -> tuple[str, str | None]:
    """What two specs of the same files share, however they spell it. Raises InvalidRequestError as `local_folder`."""
    folder = local_folder(spec, root)
    return (spec.source, checked_subfolder(spec.subfolder)) if folder is None else (str(folder), None)


def checked_subfolder(subfolder: str | None) -> str | None:
    """A relative path without `..`, or None. Raises InvalidRequestError."""
    if not subfolder:
        return None
    path = PurePosixPath(subfolder)
    if path.is_absolute() or ".." in path.parts or "\\" in subfolder or "\0" in subfolder:
        message = f"subfolder {subfolder!r} must be a relative path inside the source"
        raise InvalidRequestError(message, param="subfolder")
    return None if str(path) == "." else str(path)
