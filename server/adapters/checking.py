"""Offline verdict on one adapter: servable, or every reason why not. Needs the base model's shapes, not its weights."""

from dataclasses import asdict, dataclass
from typing import Any

from server.adapters.loading import AdapterLoader
from server.config import AdapterSpec
from server.errors import AdapterRefusedError, RefusalReason


@dataclass(frozen=True)
class Verdict:
    """What `lora-mixer adapters check` prints."""

    source: str
    base_model_name: str
    reasons: tuple[RefusalReason, ...] = ()
    digest: str | None = None
    revision: str | None = None
    rank: int | None = None
    targets: tuple[str, ...] = ()
    num_projections: int = 0
    num_bytes: int = 0

    @property
    def is_servable(self) -> bool:
        return not self.reasons

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with `servable` first."""
        return {"servable": self.is_servable, **asdict(self)}

    def __str__(self) -> str:
        if self.is_servable:
            return (
                f"{self.source}: servable on {self.base_model_name}; rank {self.rank}, "
                f"{self.num_projections} projections ({', '.join(self.targets)}), digest {self.digest}"
            )
        lines = [f"{self.source}: cannot be served on {self.base_model_name}:"]
        return "\n".join(lines + [f"  [{r.code}] {r.message} ({r.where})" for r in self.reasons])


def check_adapter(spec: AdapterSpec, loader: AdapterLoader) -> Verdict:
    """Load and judge one adapter. Raises AdapterDownloadError when there is nothing to judge, and InvalidRequestError
    when the spec contradicts itself."""
    spec = spec.with_revision_apart(loader.root)
    try:
        adapter = loader.load(spec)
    except AdapterRefusedError as error:
        return Verdict(spec.source, loader.base_model_name, reasons=error.reasons)
    return Verdict(
        source=spec.source,
        base_model_name=loader.base_model_name,
        digest=adapter.digest,
        revision=adapter.revision,
        rank=adapter.rank,
        targets=adapter.targets,
        num_projections=len(adapter.weights),
        num_bytes=adapter.num_bytes,
    )
