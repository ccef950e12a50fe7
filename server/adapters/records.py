"""What the registry knows about one adapter, and the immutable view of it that leaves the registry."""

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from server.adapters.calibration import Calibration
from server.adapters.examples import Example
from server.adapters.exclusions import Exclusion
from server.adapters.roster import ResidentAdapter, ServedAdapter
from server.adapters.weights import Adapter
from server.config import AdapterSpec
from server.errors import AdapterRefusedError, LoraMixerError, RefusalReason
from server.naming import looks

Kind = TypeVar("Kind", bound=ServedAdapter)


class AdapterState(StrEnum):
    """Life of a registration. FAILED names may be registered again; RETIRING ends when the last lease does."""

    DOWNLOADING = "DOWNLOADING"
    VALIDATING = "VALIDATING"
    READY = "READY"
    RETIRING = "RETIRING"
    FAILED = "FAILED"

    @property
    def is_loading(self) -> bool:
        return self in (AdapterState.DOWNLOADING, AdapterState.VALIDATING)


@dataclass(frozen=True)
class AdapterInfo:
    """One adapter as /v1/adapters shows it."""

    name: str
    state: AdapterState
    source: str
    revision: str | None = None
    """Commit of a Hub source once it is resolved; before that, what was asked for."""
    subfolder: str | None = None
    digest: str | None = None
    rank: int | None = None
    targets: tuple[str, ...] = ()
    routed: bool = False
    """Whether `auto` may choose it now."""
    reason: str | None = None
    """Why it failed, or why it is not routed."""
    code: str | None = None
    """FAILED only: stable word for the failure, e.g. `adapter_refused` or `adapter_download_failed`."""
    reasons: tuple[RefusalReason, ...] = ()
    """FAILED only: every reason of a refusal."""
    bytes: int | None = None
    """Size of the weights file."""
    progress: float = 0.0
    """Share of the download that is done, 0 to 1."""
    traffic_share: float = 0.0
    """Its gate mass over all gate mass since the server started, the base model's included."""
    generation: int = 1
    """How many times this name has been registered."""
    description: str = ""
    pinned: bool = False
    """Whether it is never evicted from memory."""
    resident: bool = False
    """Whether its rows are in memory; where not, the first request loads them."""
    memory_bytes: int = 0
    """What its rows cost in memory, whether they are there or not; 0 until it is checked."""
    downloaded_bytes: int = 0
    """Bytes of the download that are here."""
    download_bytes: int = 0
    """Bytes of the download in all; 0 while unknown, and for local folders."""
    traffic_alarm: bool = False
    """Whether it captures far more of the recent traffic than its even share."""
    max_gate_share: float | None = None
    """Largest share of the routed traffic that it may take; None: any."""
    exclusion: Mapping[str, Any] | None = None
    """Set while `auto` leaves it out since it took more than that, with the numbers."""
    calibration: Mapping[str, Any] | None = None
    """How its gate row was made without training, with the canary's numbers; None where there is no such row."""
    replacement: "AdapterInfo | None" = None
    """The next generation of this name while it loads, or why it failed."""

    @property
    def etag(self) -> str:
        """What If-Match compares: changes with every generation and every content."""
        return f'"{self.generation}-{(self.digest or self.state)[:16]}"'

    @property
    def is_settled(self) -> bool:
        """Whether nothing is under way that its registration, replacement or calibration started."""
        is_loading = self.state.is_loading or (self.replacement is not None and self.replacement.state.is_loading)
        return not is_loading and (self.calibration or {}).get("state") != "running"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, every field by its name, and the etag."""
        replacement = None if self.replacement is None else self.replacement.to_dict()
        fields = {**asdict(self), "state": self.state.value, "targets": list(self.targets)}
        return {**fields, "replacement": replacement, "etag": self.etag}


class RowVerdict(NamedTuple):
    """What a calibration came to."""

    calibration: Calibration | None = None
    problem: str | None = None
    """Why there is no row, if one was asked for."""


@dataclass(eq=False)
class Record:
    """Mutable state of one registration. Every access holds the registry's mutex."""

    spec: AdapterSpec
    generation: int
    number: int = 0
    """Place of its name in the order of registration."""
    state: AdapterState = AdapterState.DOWNLOADING
    slot: int | None = None
    """Set while the bank holds its rows."""
    adapter: Adapter | None = None
    """Facts only: weights are dropped once the bank has them, or has no room for them."""
    memory_bytes: int = 0
    """What its rows cost in the bank."""
    last_use: int = 0
    """When a request took it last, or the bank did, on a clock of the registry's own."""
    failure: LoraMixerError | None = None
    progress: float = 0.0
    downloaded_bytes: int = 0
    download_bytes: int = 0
    logged_s: float = 0.0
    """When its progress was last logged, on the monotonic clock."""
    gate_mass: float = 0.0
    is_configured: bool = False
    """Whether the configuration lists it, so that the journal need not."""
    expected_digest: str | None = None
    """Restored from the journal: the digest that was acknowledged."""
    has_alarm: bool = False
    exclusion: Exclusion | None = None
    """Why it is out of the routed pool although the router has a row for it."""
    examples: tuple[Example, ...] = ()
    calibration: Calibration | None = None
    calibration_problem: str | None = None
    """Why the last calibration made no row."""
    num_calibrations: int = 1
    """Asked for and not finished. The first is its registration's own."""
    load: "Future[None] | None" = None
    """Its place among the loads; None until it has one."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set when it is retired while it loads; read without the mutex."""

    @property
    def is_acknowledged(self) -> bool:
        """Whether a client put it in the place of another, or registered it before this start."""
        return self.generation > 1 or self.expected_digest is not None

    def abandon(self) -> bool:
        """Have its load end. Whether no thread had taken it up, so that none will end it."""
        self.cancelled.set()
        return self.load is not None and self.load.cancel()

    @cached_property
    def looks(self) -> tuple[str, str]:
        """See `naming.looks`."""
        return looks(self.spec.name)

    @property
    def served(self) -> ServedAdapter | None:
        """What the roster shows of it; None while nobody may use it."""
        return self._as(ServedAdapter, self.slot) if self.state is AdapterState.READY else None

    @property
    def resident(self) -> ResidentAdapter | None:
        """Its place in the bank; None while it has none."""
        return None if self.slot is None else self._as(ResidentAdapter, self.slot)

    def _as(self, kind: type[Kind], slot: int | None) -> Kind:
        assert self.adapter is not None
        problem = "its gate row is being calibrated" if self.num_calibrations else self.calibration_problem
        digest = self.adapter.digest
        return kind(self.spec.name, slot, digest, self.spec.routed, self.calibration, problem, self.exclusion)

    def info(
        self,
        *,
        unrouted_reason: str | None,
        total_gate_mass: float,
        max_gate_share: float | None = None,
        replacement: "Record | None" = None,
    ) -> AdapterInfo:
        """Immutable view; `unrouted_reason` counts when READY only."""
        adapter, failure = self.adapter, self.failure
        is_ready = self.state is AdapterState.READY
        facts: Mapping[str, Any] = {}
        if adapter is not None:
            facts = {
                "revision": adapter.revision,
                "digest": adapter.digest,
                "rank": adapter.rank,
                "targets": adapter.targets,
                "bytes": adapter.num_bytes,
            }
        return AdapterInfo(
            name=self.spec.name,
            state=self.state,
            source=self.spec.source,
            **{"revision": self.spec.revision, **facts},
            subfolder=self.spec.subfolder,
            routed=is_ready and unrouted_reason is None,
            reason=failure.message if failure is not None else unrouted_reason if is_ready else None,
            code=None if failure is None else failure.code,
            reasons=failure.reasons if isinstance(failure, AdapterRefusedError) else (),
            progress=self.progress,
            traffic_share=self.gate_mass / total_gate_mass if total_gate_mass else 0.0,
            generation=self.generation,
            description=self.spec.description,
            pinned=self.spec.pinned,
            resident=self.slot is not None,
            memory_bytes=self.memory_bytes,
            downloaded_bytes=self.downloaded_bytes,
            download_bytes=self.download_bytes,
            traffic_alarm=is_ready and self.has_alarm,
            max_gate_share=max_gate_share,
            exclusion=asdict(self.exclusion) if is_ready and self.exclusion is not None else None,
            replacement=None if replacement is None else replacement.info(unrouted_reason=None, total_gate_mass=0.0),
            calibration=self._calibration_facts() if is_ready else None,
        )

    def _calibration_facts(self) -> Mapping[str, Any] | None:
        if self.num_calibrations:
            return {"state": "running", "num_examples": len(self.examples)}
        if self.calibration is None:
            return None
        report, prompt = self.calibration.report, self.calibration.prompt
        return {
            "state": "refused" if self.calibration.problems else "passed",
            "method": self.calibration.method,
            "num_examples": self.calibration.num_examples,
            **asdict(report),
            "prompt_gate": None if prompt is None else prompt.facts(),
        }
