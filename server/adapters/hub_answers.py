"""What is asked of the Hub about a repository and a file, and its answers as far as their form goes.

Knows the client's URLs and headers; whether an answer may be believed, and served, is for others to judge.
"""

import json
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from huggingface_hub import constants
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils._validators import validate_repo_id

from server.adapters.hub_requests import HubCall, encoding_of, hub_origins, origin

MAX_LIST_BYTES = 8 * 1024**2
"""Largest list of files read, decompressed: some 30,000 files. As Python objects it takes up to twenty times that."""

_LISTED = ("id", "sha", "siblings", "securityRepoStatus")
"""What is read of a repository's description."""

_ETAG_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
"""ETags become file names in the cache."""


@dataclass(frozen=True)
class FileHead:
    """The headers of a file."""

    commit: str | None
    """None where a mirror leaves it out."""
    etag: str
    """Sound as a file name."""
    is_weak: bool
    """The ETag is one of equivalent content, not of the same bytes."""
    size_bytes: int | None

    def sha1(self, listed: str | None) -> str | None:
        """The ETag, if it is a hash of the content by its form and nothing else by the repository's list."""
        is_hash = not self.is_weak and re.fullmatch(r"[0-9a-f]{40}", self.etag)
        return self.etag if is_hash and listed in (None, self.etag) else None


def ask_for_list(call: HubCall, repository: str, revision: str, endpoint: str | None) -> ModelInfo:
    """The Hub's description of a repository at a revision, with its files' sizes and hashes and the scanners' verdicts.

    Raises ValueError, TypeError, KeyError or RuntimeError when the answer is not of that form or too large, what
    `HubCall` raises, and HFValidationError for what is no Hub id.
    """
    validate_repo_id(repository)
    url = f"{_base(endpoint)}/api/models/{repository}/revision/{quote(revision, safe='')}"
    content = bytearray()
    with call.open("GET", f"{url}?securityStatus=true&blobs=true", {"Accept-Encoding": "gzip"}) as response:
        for piece in call.pieces(response):
            content += piece
            if len(content) > MAX_LIST_BYTES:
                raise ValueError(f"a list of more than {MAX_LIST_BYTES} bytes")
    try:
        answer = json.loads(content)
        # Nothing else is asked of it: a repository's card may hold any key, and the client trips over some.
        return ModelInfo(**{key: answer[key] for key in _LISTED if key in answer})
    except AttributeError as error:
        raise ValueError("lists where objects should be, or the like") from error


def ask_for_head(call: HubCall, url: str) -> FileHead | None:
    """The headers of a file; None when they lack a usable ETag. Raises what `HubCall` raises.

    What leads to another host leads to storage: the Hub's own headers are in the redirect, and its token stays here.
    """
    hubs = hub_origins(url)

    def stays(source: str, target: str) -> bool:
        return origin(target) in {origin(source), *hubs}

    # Compressed bodies have another length.
    with call.open("HEAD", url, {"Accept-Encoding": "identity"}, follows=stays) as response:
        for _ in response.iter_raw():
            """There is no body; having read its end, the connection can be used again."""
        headers = response.headers
        stated = str(headers.get(constants.HUGGINGFACE_HEADER_X_LINKED_ETAG) or headers.get("ETag") or "")
        etag = stated.removeprefix("W/").strip('"')
        if not re.fullmatch(_ETAG_PATTERN, etag):
            return None
        return FileHead(
            headers.get(constants.HUGGINGFACE_HEADER_X_REPO_COMMIT), etag, stated.startswith("W/"), _size(response)
        )


def _size(response: Any) -> int | None:
    """Of the file, not of a redirect or of what a mirror's compression makes of it."""
    headers = response.headers
    size = headers.get(constants.HUGGINGFACE_HEADER_X_LINKED_SIZE)
    if size is None and response.next_request is None and not encoding_of(response):
        size = headers.get("Content-Length")
    return int(size) if size is not None and re.fullmatch(r"[0-9]{1,18}", size) else None


def _base(endpoint: str | None) -> str:
    return (endpoint or constants.ENDPOINT).rstrip("/")
