"""What the Hub says about a repository before anything is fetched: commit, files, sizes, hashes, scanner's verdict."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Self

from server.adapters.examples import MAX_FILE_BYTES
from server.adapters.peft_config import CONFIG_NAME, MAX_CONFIG_BYTES
from server.adapters.sources import COMMIT_PATTERN
from server.adapters.validation import PICKLE_NAMES, WEIGHTS_NAME
from server.config import AdapterSpec
from server.errors import AdapterDownloadError, AdapterRefusedError, RefusalReason
from server.naming import printable

logger = logging.getLogger(__name__)

HARMLESS_LEVELS = frozenset({"safe", "queued", "unscanned", "error", ""})
"""Verdicts on a file that accuse it of nothing."""

MAX_LISTED_FILES = 5
"""Accused files named in one reason."""


@dataclass(frozen=True)
class RemoteFile:
    """One file as the Hub lists it."""

    path: str
    """Inside the repository, with its subfolder."""
    max_bytes: int
    size_bytes: int | None
    """None when the list does not say; the file's own headers do."""
    sha256: str | None
    """Of LFS files; git's own hash of small ones is no sha256 of the content."""
    git_hash: str | None
    """Git's own hash, of what the repository itself holds: of LFS files that is a pointer. None where the list does not
    say."""

    @classmethod
    def listed(cls, sibling: Any, max_bytes: int) -> Self:
        """As an entry of the repository's list has it."""
        sha256 = sibling.lfs.sha256 if sibling.lfs else None
        return cls(sibling.rfilename, max_bytes, sibling.size, sha256, sibling.blob_id)


def require_allowed(spec: AdapterSpec, repository: str, allowed: Sequence[str]) -> None:
    """Refuse a repository that an allow-list of organisations and repositories does not name; none allows all.

    Case is ignored, as the Hub does. Raises AdapterRefusedError.
    """
    name = repository.lower()
    if allowed and not any(entry.lower().rstrip("/") in (name, name.partition("/")[0]) for entry in allowed):
        message = f"{repository[:200]!r} is not among the sources that server.hub_allowed names"
        raise AdapterRefusedError(spec.name, [RefusalReason("source_not_allowed", message, "source")])


def commit_of(info: Any, spec: AdapterSpec, asked: str) -> str:
    """The commit that the Hub resolved a revision to. Raises AdapterDownloadError when its answer cannot be true."""
    commit = str(info.sha)
    if not re.fullmatch(COMMIT_PATTERN, commit):
        raise AdapterDownloadError(
            f"adapter {spec.name!r}: the Hub states no commit for {spec.source!r}; check HF_ENDPOINT", param="source"
        )
    if re.fullmatch(COMMIT_PATTERN, asked) and commit != asked:
        raise AdapterDownloadError(
            f"adapter {spec.name!r}: the Hub answers commit {commit} of {spec.source!r} where {asked} was asked for; "
            "check HF_ENDPOINT",
            param="source",
        )
    return commit


def checked_files(info: Any, spec: AdapterSpec, wanted: Mapping[str, str], *, max_bytes: int) -> dict[str, RemoteFile]:
    """The files to fetch by name, judged by the repository's list: presence, kind, size.

    Raises AdapterRefusedError with every reason.
    """
    listed = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    files, reasons = {}, []
    for name, path in wanted.items():
        if (sibling := listed.get(path)) is None:
            reasons.append(_absent(path, listed))
            continue
        file = RemoteFile.listed(sibling, MAX_CONFIG_BYTES if name == CONFIG_NAME else max_bytes)
        if file.size_bytes is not None:
            reasons += check_size(file, file.size_bytes)
        files[name] = file
    reasons += _scanner_reasons(info.security_repo_status, spec, tuple(wanted.values()))
    if reasons:
        raise AdapterRefusedError(spec.name, reasons)
    return files


def examples_file(info: Any, path: str) -> tuple[RemoteFile | None, str | None]:
    """The repository's examples as its list has them, if any; or why they are not fetched."""
    sibling = next((sibling for sibling in info.siblings or () if sibling.rfilename == path), None)
    if sibling is None:
        return None, None
    file = RemoteFile.listed(sibling, MAX_FILE_BYTES)
    if file.size_bytes is not None and (reasons := check_size(file, file.size_bytes)):
        return None, f"{path}: {reasons[0].message}"
    if level := next((level for accused, level in _accusations(info.security_repo_status) if accused == path), None):
        return None, printable(f"{path}: the Hub's scanners call it {level[:20]}; it was not downloaded")
    return file, None


def check_size(file: RemoteFile, size_bytes: int) -> list[RefusalReason]:
    """Reason to refuse a file of this size unread."""
    if size_bytes <= file.max_bytes:
        return []
    message = f"the file has {size_bytes} bytes, more than the limit of {file.max_bytes}; nothing was downloaded"
    return [RefusalReason("file_too_large", message, file.path)]


def _scanner_reasons(status: Any, spec: AdapterSpec, wanted: Sequence[str]) -> list[RefusalReason]:
    """Reasons from the Hub's malware scanners, when it gives their verdict.

    The two files that an adapter needs must not be accused of anything, nor are examples fetched that are. Nothing else
    ever is, but who keeps a file that the scanners call unsafe beside an adapter is not to be trusted with it either.
    """
    accused: list[str] = []
    suspicious: list[str] = []
    for path, level in _accusations(status):
        shown = printable(f"{path[:200]} ({level[:20]})")
        (accused if path in wanted or level.lower() == "unsafe" else suspicious).append(shown)
    if suspicious:
        logger.warning("the Hub's scanners doubt other files of %s: %s", spec.source, ", ".join(suspicious[:5]))
    if not accused:
        return []
    more = f" and {len(accused) - MAX_LISTED_FILES} more" if len(accused) > MAX_LISTED_FILES else ""
    message = f"the Hub's scanners warn of {', '.join(accused[:MAX_LISTED_FILES])}{more}; nothing was downloaded"
    return [RefusalReason("scanner_verdict", message, "security status of the repository")]


def _accusations(status: Any) -> Iterator[tuple[str, str]]:
    """(path, level) of each file that the Hub's scanners accuse of something."""
    issues = status.get("filesWithIssues") if isinstance(status, Mapping) else None
    for issue in issues if isinstance(issues, list) else ():
        if isinstance(issue, Mapping):
            level = str(issue.get("level") or "")
            if level.lower() not in HARMLESS_LEVELS:
                yield str(issue.get("path") or ""), level


def _absent(path: str, listed: Mapping[str, Any]) -> RefusalReason:
    pickles = [str(PurePosixPath(path).with_name(pickle)) for pickle in PICKLE_NAMES]
    found = [pickle for pickle in pickles if pickle in listed]
    if path.endswith(WEIGHTS_NAME) and found:
        message = f"the weights are pickled ({found[0]}), which can run code; save them as safetensors"
        return RefusalReason("pickle_file", message, found[0])
    return RefusalReason("missing_file", f"the repository has no {path}{_elsewhere(path, listed)}", path)


def _elsewhere(path: str, listed: Mapping[str, Any]) -> str:
    """Where the repository has files of this name instead."""
    name = PurePosixPath(path).name
    folders = sorted(str(PurePosixPath(other).parent) for other in listed if PurePosixPath(other).name == name)
    if not folders:
        return ""
    if "." in folders:
        return "; there is one at its root: leave subfolder out"
    shown = ", ".join(printable(folder[:100]) for folder in folders[:MAX_LISTED_FILES])
    return f"; there is one in {shown}{' and others' * (len(folders) > MAX_LISTED_FILES)}: name it as subfolder"
