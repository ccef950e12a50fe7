"""Gate rows of adapters that the router was not trained with: when they are made, kept, renewed and shown.

One thread of its own calibrates, one adapter at a time, so that neither downloads nor requests wait for it. Routers
are swapped on it too: no calibration is ever for a router that goes meanwhile.
`Calibrator` does the maths, `Residency` publishes.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

from server.adapters.calibration import Calibration, Calibrator
from server.adapters.example_store import ExampleStore
from server.adapters.examples import MAX_EXAMPLES, EncodeExamples, Example
from server.adapters.leases import AdapterLease
from server.adapters.records import AdapterState, Record, RowVerdict
from server.adapters.residency import CancelledLoadError
from server.adapters.roster import routed_slots
from server.adapters.state import RegistryState
from server.errors import AdapterConflictError, InvalidRequestError, LoraMixerError, NotReadyError
from server.routing.heirs import predecessor_of
from server.routing.router import RouterArtefact

logger = logging.getLogger(__name__)


def refuse_examples(_raw: Sequence[Any]) -> tuple[Example, ...]:
    """`EncodeExamples` of a registry that has no tokenizer."""
    raise InvalidRequestError("this server cannot read examples: it has no chat tokenizer", param="examples")


class HotRows:
    """The calibrating thread of one registry. Every method may be called from any thread."""

    def __init__(
        self,
        state: RegistryState,
        calibrator: Calibrator,
        publish: Callable[[], None],
        encode: EncodeExamples,
        store: ExampleStore,
        readmit: Callable[[Record], object],
        hold: Callable[[Sequence[str]], AdapterLease],
    ) -> None:
        """`publish` brings the router in line with the records, `store` keeps examples across restarts, `readmit` lets
        an adapter into the routed pool again, and `hold` brings adapters into the bank, if they are not, and keeps them
        there.
        """
        self._state = state
        self._calibrator = calibrator
        self._publish = publish
        self._encode = encode
        self._store = store
        self._readmit = readmit
        self._hold = hold
        self._additions = threading.Lock()
        """Held while examples are added to an adapter's, written and counted. Taken before the state's mutex."""
        self._readmitting: set[Record] = set()
        """To be let into the routed pool again once they pass. On the thread alone."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapter-calibrator")

    def encode(self, raw: Sequence[Any]) -> tuple[Example, ...]:
        """Checked examples; none for an empty list. Raises InvalidRequestError."""
        return self._encode(raw) if raw else ()

    def add_examples(self, name: str, raw: Sequence[Any]) -> None:
        """Calibrate an adapter anew with these examples besides the ones it has, of which the oldest fall out.

        Raises AdapterNotFoundError, InvalidRequestError, AdapterConflictError for one that is not READY or has a
        trained row, and LoraMixerError when the examples cannot be kept; then nothing has changed.
        """
        examples = self._encode(raw)
        with self._additions:
            with self._state.mutex:
                record = self._state.record(name)
                if record.state is not AdapterState.READY or record.adapter is None:
                    raise _not_ready(record)
                router = self._state.router
                if router is not None and record.adapter.digest in router.artefact.digests:
                    message = f"the router was trained with {name!r}; its gate row needs no examples"
                    raise AdapterConflictError(message, param="name")
            self._add(record, examples, readmits=True)

    def merge(self, name: str, examples: tuple[Example, ...]) -> None:
        """Examples that came with a registration: those that the adapter, or its loading next generation, lacks count
        as well, and a READY one is calibrated anew. Raises AdapterNotFoundError, AdapterConflictError when it is
        retired meanwhile, and LoraMixerError when the examples cannot be kept.
        """
        with self._additions:
            with self._state.mutex:
                record = self._state.record(name)
                pending = self._state.replacements.get(name)
                if pending is not None and pending.state.is_loading:
                    record = pending
                if set(examples) <= set(record.examples):
                    return
            self._add(record, examples)

    def _add(self, record: Record, examples: tuple[Example, ...], *, readmits: bool = False) -> None:
        """Keep more examples, then count them, and calibrate a READY adapter anew."""
        spec, adapter = record.spec, record.adapter
        try:
            merged = _merged(self._known(record), examples)
        except InvalidRequestError as error:
            logger.warning("earlier examples of adapter %s are dropped: %s", spec.name, error)
            merged = examples
        self._store.keep(spec.name, record.generation, None if adapter is None else adapter.digest, merged)
        with self._state.mutex:
            is_alive = record.state is AdapterState.READY or record.state.is_loading
            is_ready = record.state is AdapterState.READY
            if is_alive:
                record.examples = merged
                record.num_calibrations += is_ready  # one that loads has its first calibration still to come
        if not is_alive:  # retired meanwhile, and its examples with it
            self._store.forget(spec.name, only=record.generation)
            raise _not_ready(record)
        if is_ready:
            self._submit(record, readmits=readmits)

    def _known(self, record: Record) -> tuple[Example, ...]:
        """Examples of an adapter, also those that were kept before a restart. Raises InvalidRequestError."""
        if record.examples or record.adapter is None:
            return record.examples
        kept = self._store.recall(record.spec.name, record.generation, record.adapter.digest)
        return self._encode(kept) if kept else ()

    def start(self, record: Record) -> None:
        """Make the row of an adapter that has just become READY, if it wants one and the router has none."""
        self._store.forget(record.spec.name, below=record.generation)  # a next generation brings examples of its own
        self._submit(record)  # the record has counted this one from its beginning, so that `wait` waits for it

    def swap(self, artefact: RouterArtefact, install: Callable[[Mapping[Record, RowVerdict]], object]) -> None:
        """Make rows for an artefact, then have `install` make it the router together with them, so that no request
        misses an adapter that is routed now. All others are calibrated afterwards. Blocks.

        Raises what `install` raises; NotReadyError when the registry is closed before that.
        """
        try:
            swapping = self._thread.submit(self._swap, artefact, install)
        except RuntimeError as error:
            raise NotReadyError("the server is shutting down") from error
        try:
            swapping.result()
        except CancelledError as error:
            raise NotReadyError("the server is shutting down") from error

    def _swap(self, artefact: RouterArtefact, install: Callable[[Mapping[Record, RowVerdict]], object]) -> None:
        """Meanwhile the router before it serves with its rows. Who is retired then just goes; examples that come then
        wait for a calibration of their own behind this."""
        verdicts: dict[Record, RowVerdict] = {}
        with contextlib.ExitStack() as holds:
            while (record := self._routed_one(verdicts)) is not None:
                verdicts[record] = self._judge(record, artefact, holds)
            install(verdicts)
        self._renew(verdicts)

    def _routed_one(self, judged: Collection[Record]) -> Record | None:
        """Another adapter with a row in the present router; of equal ones another may have taken it over."""
        with self._state.mutex:
            slots = frozenset() if self._state.router is None else self._state.router.slots
            ready = (record for record in self._state.records.values() if record.state is AdapterState.READY)
            return next((record for record in ready if record.slot in slots and record not in judged), None)

    def _renew(self, done: Collection[Record]) -> None:
        """Calibrate all but these anew, for another router."""
        with self._state.mutex:
            ready = (record for record in self._state.records.values() if record.state is AdapterState.READY)
            records = [record for record in ready if record not in done]
            for record in records:
                record.num_calibrations += 1
            self._state.commit(self._state.router, *records)  # they say so
        for record in records:
            self._submit(record)

    def close(self) -> None:
        """End the running calibration, forget the waiting ones."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _submit(self, record: Record, *, readmits: bool = False) -> None:
        try:
            self._thread.submit(self._run, record, readmits)
        except RuntimeError:  # the registry is closing; nobody will look
            self._finish(record)

    def _run(self, record: Record, readmits: bool) -> None:
        """Its adapter is held until the router has the row: from then on it stays. Of several that wait, the last one
        counts: it has the examples of all."""
        if readmits:
            self._readmitting.add(record)
        with self._state.mutex:
            is_overtaken = record.num_calibrations > 1
            router = self._state.router
        if is_overtaken:
            self._finish(record)
            return
        readmits = record in self._readmitting
        self._readmitting.discard(record)
        with contextlib.ExitStack() as holds:
            before = record.calibration
            calibration, problem = self._judge(record, None if router is None else router.artefact, holds)
            with self._state.mutex:
                record.calibration, record.calibration_problem = calibration, problem
            try:
                if calibration is not before:
                    self._publish()
                if readmits and calibration is not None and not calibration.problems:
                    self._readmit(record)
            except Exception:
                logger.exception("the gate row of adapter %s could not be published", record.spec.name)
            self._finish(record)

    def _judge(self, record: Record, artefact: RouterArtefact | None, holds: contextlib.ExitStack) -> RowVerdict:
        """A row for this router, or why there is none."""
        problem: str | None = None
        try:
            return RowVerdict(self._calibrate(record, artefact, holds))
        except CancelledLoadError:
            pass
        except NotReadyError:
            problem = "the server is shutting down"
        except LoraMixerError as error:
            problem = error.message
        except Exception as error:
            logger.exception("adapter %s could not be calibrated", record.spec.name)
            problem = f"its gate row could not be made ({type(error).__name__})"
        return RowVerdict(problem=problem)

    def _finish(self, record: Record) -> None:
        with self._state.mutex:
            record.num_calibrations -= 1
            self._state.commit(self._state.router, record)

    def _calibrate(
        self, record: Record, artefact: RouterArtefact | None, holds: contextlib.ExitStack
    ) -> Calibration | None:
        """None when nobody asked for a row, there is no router, or the router knows the adapter."""
        state = self._state
        with state.mutex:
            adapter = record.adapter
        if artefact is None or adapter is None or adapter.digest in artefact.digests:
            return None
        with self._additions:
            if not (examples := self._known(record)) and (raw := adapter.examples.read()) is not None:
                examples = self._encode(raw)
            record.examples = examples
        if not examples and not (record.spec.routed and "routed" in record.spec.model_fields_set):
            return None

        def poll() -> None:
            if record.cancelled.is_set() or record.state is not AdapterState.READY:
                raise CancelledLoadError

        poll()
        lease = self._hold([record.spec.name])
        holds.callback(lease.release)
        with state.mutex:
            slot, trained = record.slot, _trained_slots(state, artefact)
            digests = {known.adapter.digest for known in state.records.values() if known.adapter is not None}
        if slot is None or slot not in lease.plan.slots:  # another generation has the name now
            raise CancelledLoadError
        predecessor = predecessor_of(artefact, record.spec.name, digests)
        calibration = self._calibrator.calibrate(slot, examples, artefact, trained, poll, predecessor=predecessor)
        logger.info(
            "adapter %s calibrated from %s: %s",
            record.spec.name,
            f"{calibration.num_examples} examples ({calibration.method})" if examples else "its weights",
            "; ".join(calibration.problems) or "passed",
        )
        return calibration


def _not_ready(record: Record) -> AdapterConflictError:
    return AdapterConflictError(
        f"adapter {record.spec.name!r} is {record.state}; it cannot be calibrated", param="name"
    )


def _merged(known: tuple[Example, ...], more: tuple[Example, ...]) -> tuple[Example, ...]:
    """Each once; of too many, the oldest fall out."""
    return tuple(dict.fromkeys((*known, *more)))[-MAX_EXAMPLES:]


def _trained_slots(state: RegistryState, artefact: RouterArtefact) -> dict[str, int]:
    """digest -> slot of the resident adapters that the router was trained with. With the mutex."""
    return {digest: slot for digest, slot in routed_slots(state.residents()).items() if digest in artefact.digests}
