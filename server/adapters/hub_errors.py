"""huggingface_hub's exceptions -> AdapterDownloadError with words that help.

Goes by class names and status codes: only `hub` imports the client, and its texts may quote signed URLs, so no part of
them is repeated.
"""

import contextlib
import errno
import math
import re
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime

from server.config import AdapterSpec
from server.errors import AdapterDownloadError


def download_error(error: BaseException, spec: AdapterSpec, locked_commit: str | None = None) -> AdapterDownloadError:
    """The error to report for `spec`, asked for at `locked_commit` if there is one; raise it `from` the original."""
    problem, advice = _explain(error, spec, locked_commit)
    return AdapterDownloadError(f"adapter {spec.name!r}: {problem}; {advice}", param="source")


def _explain(error: BaseException, spec: AdapterSpec, locked_commit: str | None) -> tuple[str, str]:
    repository, revision = repr(spec.source), repr(locked_commit or spec.revision or "main")
    by_name = {
        "OfflineModeIsEnabled": (
            f"{repository} is not in adapters.lock and the local cache, and HF_HUB_OFFLINE is set",
            "start once with network access and keep both",
        ),
        "GatedRepoError": (
            f"{repository} is gated",
            "accept its terms on the Hub and set HF_TOKEN to a token with access, or name one in LORA_MIXER_HUB_TOKENS",
        ),
        "RepositoryNotFoundError": (
            f"the Hub has no {repository}, or it is private",
            "check the name, or set HF_TOKEN or LORA_MIXER_HUB_TOKENS",
        ),
        "RevisionNotFoundError": (
            f"{repository} has no revision {revision}",
            "check the branch, tag or 40-digit commit"
            if locked_commit is None
            else "adapters.lock demands it: delete its entry to resolve the source anew",
        ),
        "RemoteEntryNotFoundError": (f"{repository} lost a file at {revision} while it was downloaded", "try again"),
        "DisabledRepoError": (f"the Hub has disabled {repository}", "its owner or the Hub's support knows why"),
        "HFValidationError": (f"{repository} is not a Hub id", "use org/name"),
        "FileMetadataError": (f"the answer about {repository} was not the Hub's", "check HF_ENDPOINT and proxies"),
    }
    if is_storages(error):
        return _explain_storage(status_of(error), repository)
    for link in causes(error):
        # In order of the class hierarchy: a gated repository is also one that is not found.
        for kind in type(link).__mro__:
            if kind.__name__ in by_name:
                return by_name[kind.__name__]
    if (status := status_of(error)) is not None:
        return _explain_status(status, repository, asked_wait_s(error))
    return _explain_local(error, repository)


def _explain_local(error: BaseException, repository: str) -> tuple[str, str]:
    """What went wrong without an answer of the Hub."""
    names = [type(link).__name__ for link in causes(error)]
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk that holds the Hub cache is full", "free space, or move the cache with HF_HOME"
    if isinstance(error, OSError) and error.errno is not None:
        return f"the Hub cache cannot be used ({error.strerror})", "check its folder, or move it with HF_HOME"
    if any("Timeout" in name for name in names):
        return f"the Hub did not answer in time for {repository}", "try again, or raise server.hub_timeout_s"
    if "CutShortError" in names:
        return f"what the Hub sends of {repository} broke off again and again", "try again: what has come is kept"
    if "TooManyRedirectsError" in names:
        return f"the answer about {repository} redirects without end", "check HF_ENDPOINT and proxies"
    if isinstance(error, ValueError | TypeError | KeyError):
        return f"the answer about {repository} was not the Hub's", "check HF_ENDPOINT and proxies"
    return f"the Hub could not be reached for {repository} ({names[-1]})", "check the network, or HF_ENDPOINT"


def _explain_status(status: int, repository: str, wait_s: float | None) -> tuple[str, str]:
    if status in (401, 403):
        return (
            f"the Hub refused access to {repository} (HTTP {status})",
            "check HF_TOKEN or LORA_MIXER_HUB_TOKENS and the token's permissions",
        )
    if status == 429:
        return (
            f"the Hub limits our rate (HTTP 429) for {repository}",
            f"wait {'a few minutes' if wait_s is None else f'{math.ceil(wait_s)} s'}, or set HF_TOKEN or "
            "LORA_MIXER_HUB_TOKENS",
        )
    if status >= 500:
        return f"the Hub failed (HTTP {status}) for {repository}", "try again later"
    return f"the Hub answered HTTP {status} for {repository}", "check the source"


def _explain_storage(status: int | None, repository: str) -> tuple[str, str]:
    """The host that the Hub's links lead to: no token of ours goes there."""
    host = f"the host that the Hub keeps the files of {repository} on"
    if status == 403:
        return f"{host} refused the Hub's link again and again (HTTP 403)", "check the clock and proxies, or try later"
    if status in (404, 410):
        return f"{host} does not have one of them (HTTP {status})", "try again later; if it stays so, tell its owner"
    return f"{host} failed (HTTP {status})", "try again later"


def is_storages(error: BaseException) -> bool:
    """Whether it is an answer of a host that the Hub has sent us to for content."""
    return any(type(link).__name__ == "StorageError" for link in causes(error))


def status_of(error: BaseException) -> int | None:
    """HTTP status of the answer behind an error, if there was an answer."""
    for link in causes(error):
        if isinstance(status := getattr(getattr(link, "response", None), "status_code", None), int):
            return status
    return None


def asked_wait_s(error: BaseException) -> float | None:
    """Seconds that the Hub asks to wait: of its Retry-After header, seconds or a date, or until its RateLimit header's
    window ends.

    The latter is that of the IETF draft on rate limit headers, `"api";r=0;t=55` for no request left and 55 s; the Hub
    sends it with its 429.
    """
    for link in causes(error):
        headers = getattr(getattr(link, "response", None), "headers", None)
        if headers is None:
            continue
        if text := str(headers.get("Retry-After") or "").strip():
            if re.fullmatch(r"[0-9]{1,9}", text):
                return float(text)
            with contextlib.suppress(ValueError, OverflowError):  # the other form: a date
                return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
        policies = str(headers.get("RateLimit") or "").split(",")
        limits = [dict(re.findall(r";\s*([rt])=(\d{1,6})(?![\w.])", policy)) for policy in policies]
        if waits := [float(limit["t"]) for limit in limits if limit.get("r") == "0" and "t" in limit]:
            return max(waits)
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
