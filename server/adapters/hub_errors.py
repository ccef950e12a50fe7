"""huggingface_hub's exceptions -> AdapterDownloadError with words that help. Says nothing that a token could hide in:
texts of the client may quote signed URLs, so only its exception types and status codes are used.
"""

import errno
from collections.abc import Iterator

from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from server.config import AdapterSpec
from server.errors import AdapterDownloadError

TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""`HTTPError` of the HTTP library that the installed client is built on (httpx or its successor): the root of its
timeouts and connection errors, without importing that library."""

CLIENT_ERRORS: tuple[type[Exception], ...] = (
    TRANSPORT_ERROR,
    HFValidationError,
    EntryNotFoundError,
    OSError,
    ValueError,  # an answer that is not JSON, or not the JSON expected
    TypeError,
    KeyError,
)
"""What a call into huggingface_hub may raise; everything else is a bug of ours."""


def download_error(error: BaseException, spec: AdapterSpec) -> AdapterDownloadError:
    """The error to report for `spec`; raise it `from` the original."""
    problem, advice = _explain(error, spec)
    return AdapterDownloadError(f"adapter {spec.name!r}: {problem}; {advice}", param="source")


def _explain(error: BaseException, spec: AdapterSpec) -> tuple[str, str]:
    repository, revision = repr(spec.source), repr(spec.revision or "main")
    for link in _chain(error):
        match link:
            case OfflineModeIsEnabled():
                problem = f"{repository} is not in adapters.lock and the local cache, and HF_HUB_OFFLINE is set"
                return problem, "start once with network access and keep both"
            case GatedRepoError():
                return f"{repository} is gated", "accept its terms on the Hub and set HF_TOKEN to a token with access"
            case RepositoryNotFoundError():
                return f"the Hub has no {repository}, or it is private", "check the name, or set HF_TOKEN"
            case RevisionNotFoundError():
                return f"{repository} has no revision {revision}", "check the branch, tag or 40-digit commit"
            case HfHubHTTPError():
                return _explain_status(link.response.status_code, repository)
            case LocalEntryNotFoundError():
                continue  # the cause tells more
            case EntryNotFoundError():
                return f"{repository} lost a file at {revision} while it was downloaded", "try again"
            case HFValidationError():
                return f"{repository} is not a Hub id", "use org/name"
            case FileMetadataError():
                return f"the answer about {repository} was not the Hub's", "check HF_ENDPOINT and proxies"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk that holds the Hub cache is full", "free space, or move the cache with HF_HOME"
    if isinstance(error, OSError) and error.errno is not None:
        return f"the Hub cache cannot be used ({error.strerror})", "check its folder, or move it with HF_HOME"
    if any("Timeout" in type(link).__name__ for link in _chain(error)):
        return f"the Hub did not answer in time for {repository}", "try again, or raise HF_HUB_DOWNLOAD_TIMEOUT"
    if isinstance(error, OSError) and "Consistency check" in str(error):
        return f"a file of {repository} arrived with the wrong length", "try again"
    if isinstance(error, ValueError | TypeError | KeyError):
        return f"the answer about {repository} was not the Hub's", "check HF_ENDPOINT and proxies"
    return (
        f"the Hub could not be reached for {repository} ({type(error).__name__})",
        "check the network, or HF_ENDPOINT",
    )


def _explain_status(status: int, repository: str) -> tuple[str, str]:
    if status in (401, 403):
        return f"the Hub refused access to {repository} (HTTP {status})", "check HF_TOKEN and its permissions"
    if status == 429:
        return f"the Hub limits our rate (HTTP 429) for {repository}", "wait a few minutes, or set HF_TOKEN"
    if status >= 500:
        return f"the Hub failed (HTTP {status}) for {repository}", "try again later"
    return f"the Hub answered HTTP {status} for {repository}", "check the source"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
