"""One adapter to serve, as configuration and clients describe it. Knows how sources are spelled, loads nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from server.config_file import Frozen
from server.errors import InvalidRequestError
from server.naming import ADAPTER_NAME_PATTERN, revision_apart


class AdapterSpec(Frozen):
    """One adapter to serve."""

    name: Annotated[str, Field(pattern=ADAPTER_NAME_PATTERN)]
    """The name requests use as `model`."""
    source: str
    """Local folder (relative to the config file), or Hub id `org/name` or `org/name@revision`."""
    revision: str | None = None
    """Hub sources only: branch, tag or 40-digit commit; a branch is resolved to its commit once and locked."""
    subfolder: str | None = None
    """Folder inside the source that holds the two adapter files."""
    routed: bool = True
    """Whether `auto` may route to it; false serves it by name only."""
    pinned: bool = False
    """Whether it stays in memory however rarely it is used (`server.adapter_memory_mib`)."""
    max_gate_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Largest share of the routed traffic that it may take; beyond, `auto` leaves it out until an operator lets it in
    again; null: `server.hot_max_gate_share` where its gate row was made without training, else no cap."""
    description: str = ""
    """One sentence for people; shown in /v1/adapters."""

    def with_revision_apart(self, root: Path, allowed: Sequence[Path] | None = None) -> "AdapterSpec":
        """Source `org/name@revision` as source and revision; of a local folder with that very name, as it is.

        Everything that compares or records specs takes this form. `root` is what relative sources are relative to, and
        `allowed`, if given, the resolved folders below which local ones count. Raises InvalidRequestError for a
        revision that is empty, or not the one given apart.
        """
        if _is_folder(root / self.source, allowed):
            return self
        try:
            source, revision = revision_apart(self.source, self.revision)
        except ValueError as error:
            raise InvalidRequestError(f"adapter {self.name!r}: {error}", param="revision") from error
        return self if source == self.source else self.model_copy(update={"source": source, "revision": revision})


def _is_folder(path: Path, allowed: Sequence[Path] | None) -> bool:
    try:
        folder = path.resolve()
        return folder.is_dir() and (allowed is None or any(folder.is_relative_to(root) for root in allowed))
    except (OSError, ValueError, RuntimeError):  # A name too long, null characters, a loop of links.
        return False
