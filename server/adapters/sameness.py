"""Whether a registration asks for the adapter that its name already has, and whether a caller means that adapter."""

from collections.abc import Collection
from pathlib import Path

from server.adapters.records import AdapterInfo
from server.adapters.sources import place
from server.config import AdapterSpec
from server.errors import PreconditionFailedError

ANY_ETAG = "*"
"""Matches every generation, but none where there is no adapter."""


def asks_for_the_same(spec: AdapterSpec, known: AdapterSpec, root: Path, *, commit: str | None) -> bool:
    """Same place, revision (or the commit it resolved to) and settings; no description, or cap, agrees with any."""
    is_same_revision = spec.revision == known.revision or (commit is not None and spec.revision == commit)
    is_same_use = (spec.routed, spec.pinned) == (known.routed, known.pinned)
    is_same_setting = is_same_use and spec.description in ("", known.description)
    is_same_setting &= spec.max_gate_share in (None, known.max_gate_share)
    return place(spec, root) == place(known, root) and is_same_revision and is_same_setting


def check_expected(name: str, expected: Collection[str] | None, current: AdapterInfo | None) -> None:
    """Raises PreconditionFailedError when `current` has none of the expected etags; None expects nothing."""
    if expected is None or (current is not None and (ANY_ETAG in expected or current.etag in expected)):
        return
    if current is None:
        problem = f"no adapter is registered as {name[:200]!r}, so there is none to replace; leave out If-Match"
    else:
        problem = (
            f"adapter {name!r} is at {current.etag}, not at what If-Match names; look at it again before changing it"
        )
    raise PreconditionFailedError(problem, param="If-Match")
