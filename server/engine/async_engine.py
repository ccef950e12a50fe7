"""The engine thread: the only one that touches model, K/V cache and bank. Everything else sends it messages.

Knows threads, messages and event loops; not scheduling (`Scheduler`) and not text (the API).
"""

import asyncio
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

from server.engine.admission import Admission
from server.engine.engine import Engine
from server.engine.generation import GenerationHandle, GenerationRequest, Mailbox, put_all
from server.engine.sequence import FinishReason, Sequence, TokenEvent
from server.engine.step_stats import StepStats
from server.errors import NotReadyError

__all__ = ["AsyncEngine", "GenerationHandle", "GenerationRequest"]

logger = logging.getLogger(__name__)
T = TypeVar("T")


class _Submission(NamedTuple):
    request: GenerationRequest
    sequences: list[Sequence]
    mailbox: Mailbox


class _Abort(NamedTuple):
    sequence_ids: tuple[int, ...]


class _Call(NamedTuple):
    function: Callable[[], Any]
    future: Future[Any]


class _WhenIdle(NamedTuple):
    future: Future[None]


_Message = _Submission | _Abort | _Call | _WhenIdle | None
"""None: stop."""


class AsyncEngine:
    """Runs an `Engine` on a thread of its own, for requests from any number of event loops."""

    def __init__(
        self,
        engine: Engine,
        *,
        eos_token_ids: frozenset[int] = frozenset(),
        max_waiting_requests: int = 1024,
        max_waiting_tokens: int = 1_000_000,
        on_step: Callable[[StepStats], None] | None = None,
    ) -> None:
        """`on_step` is called on the engine thread after every step, before the step's events are delivered."""
        self._engine = engine
        self._eos_token_ids = eos_token_ids
        self._on_step = on_step
        self._admission = Admission(
            max_waiting_requests=max_waiting_requests,
            max_waiting_tokens=max_waiting_tokens,
            max_running=engine.scheduler.max_num_seqs,
        )
        self._thread: threading.Thread | None = None
        # Its `put` is reentrant, so that the garbage collector may abort from inside any other call.
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        # The engine thread's own:
        self._mailboxes: dict[int, Mailbox] = {}  # by sequence id
        self._idle_futures: list[Future[None]] = []
        # Guarded by the lock, so that nothing enters the inbox after the engine thread has emptied it for good:
        self._lock = threading.Lock()
        self._is_draining = False
        self._is_closed = False
        self._next_id = 0

    @property
    def is_alive(self) -> bool:
        """Whether the engine thread runs."""
        return self._thread is not None and self._thread.is_alive() and not self._is_closed

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    @property
    def num_running(self) -> int:
        """Sequences being computed, as of the last step."""
        return self._admission.num_running

    @property
    def num_waiting(self) -> int:
        """Sequences that were submitted and are not being computed."""
        return self._admission.num_waiting

    def start(self) -> None:
        """Start the engine thread; once."""
        assert self._thread is None, "the engine thread was started before"
        # A daemon, so that an interpreter that exits without `stop` does not hang.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> GenerationHandle:
        """`submit_all` for one."""
        return self.submit_all([request])[0]

    def submit_all(self, requests: Collection[GenerationRequest]) -> list[GenerationHandle]:
        """Queue what one client asks for, or nothing; call from the event loop that will consume the handles. Owns the
        leases from here, and releases them if it raises: NotReadyError before `start`, while draining and after the
        end; OverloadedError beyond the limits; InvalidRequestError or ContextLengthError for what cannot be computed.
        """
        try:
            return self._submit_all(requests)
        except Exception:
            for request in requests:
                request.lease.release()
            raise

    def call_between_steps(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` on the engine thread while no step runs; from any other thread.

        The future gets its result or exception, or NotReadyError if the engine has stopped. Before `start` it waits.
        """
        future: Future[T] = Future()
        if not self._send(_Call(function, future)):
            future.set_exception(NotReadyError("the engine has stopped"))
        return future

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, let the admitted ones finish for `timeout_s` seconds, then abort the rest."""
        with self._lock:
            self._is_draining = True
        idle: Future[None] = Future()
        if self._thread is None or not self._send(_WhenIdle(idle)):
            return
        waiter = asyncio.wrap_future(idle)
        done, _ = await asyncio.wait([waiter], timeout=timeout_s)
        if not done:
            logger.warning("aborting %d sequences that did not finish in %g s", len(self._mailboxes), timeout_s)
            self.call_between_steps(lambda: self._abort_now(self._engine.scheduler.sequence_ids))
            await waiter

    def stop(self) -> None:
        """End the engine thread after its current step; whatever is unfinished ends with an error event. Idempotent."""
        if self._thread is None:
            self._close("the server is shutting down")
        else:
            self._inbox.put(None)
            self._thread.join()

    # Any thread

    def _submit_all(self, requests: Collection[GenerationRequest]) -> list[GenerationHandle]:
        for request in requests:
            assert request.n >= 1, "a request has at least one sample"
            self._engine.scheduler.check_fits(len(request.prompt_token_ids), request.params.max_tokens)
        loop = asyncio.get_running_loop()
        with self._lock:
            if self._is_draining or not self.is_alive:
                raise NotReadyError("the server is draining" if self._is_draining else "the engine is not running")
            self._admission.enter(sum(request.n for request in requests), sum(r.num_tokens for r in requests))
            return [self._enqueue(request, loop) for request in requests]

    def _enqueue(self, request: GenerationRequest, loop: asyncio.AbstractEventLoop) -> GenerationHandle:
        sequences = request.sequences(self._next_id, self._eos_token_ids)
        self._next_id += request.n
        mailbox = Mailbox(loop, (sequence.id for sequence in sequences))
        self._inbox.put(_Submission(request, sequences, mailbox))
        return GenerationHandle(mailbox, self._abort)

    def _abort(self, sequence_ids: tuple[int, ...]) -> None:
        if sequence_ids and not self._is_closed:
            self._inbox.put(_Abort(sequence_ids))

    def _send(self, message: _Call | _WhenIdle) -> bool:
        """Whether the engine thread will see the message."""
        with self._lock:
            if not self._is_closed:
                self._inbox.put(message)
            return not self._is_closed

    # Engine thread

    def _run(self) -> None:
        reason = "the server is shutting down"
        try:
            while self._receive():
                self._step()
        except BaseException as error:
            logger.critical("the engine thread died; nothing is served any more", exc_info=error)
            reason = f"the engine stopped ({type(error).__name__})"
        finally:
            self._close(reason)

    def _receive(self) -> bool:
        """Handle the messages that have arrived; sleep while there is nothing to compute. False: stop."""
        while True:
            is_busy = self._engine.has_work
            if not is_busy and self._inbox.empty():
                self._resolve_idle()
            try:
                message = self._inbox.get(block=not is_busy)
            except Empty:
                return True
            match message:
                case _Submission(request, sequences, mailbox):
                    self._mailboxes |= {sequence.id: mailbox for sequence in sequences}
                    for sequence in sequences:
                        self._engine.add(sequence)
                    self._publish_load(arrived=request)
                case _Abort(sequence_ids):
                    self._abort_now(sequence_ids)
                case _Call(function, future):
                    _run_into(future, function)
                case _WhenIdle(future):
                    self._idle_futures.append(future)
                case None:
                    return False

    def _step(self) -> None:
        events, stats = self._engine.step()
        self._publish_load()
        if self._on_step is not None:
            try:
                self._on_step(stats)
            except Exception:  # counting requests must not end them
                logger.exception("on_step failed")
        self._deliver(events)

    def _publish_load(self, arrived: GenerationRequest | None = None) -> None:
        scheduler = self._engine.scheduler
        self._admission.update(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            waiting_tokens=scheduler.waiting_tokens,
            arrived=(arrived.n, arrived.num_tokens) if arrived else (0, 0),
        )

    def _deliver(self, events: Iterable[TokenEvent]) -> None:
        """Hand events over, with one call per event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Mailbox, TokenEvent]]] = defaultdict(list)
        for event in events:
            take = self._mailboxes.get if event.finish_reason is None else self._mailboxes.pop
            mailbox = take(event.sequence_id, None)
            if mailbox is not None:
                by_loop[mailbox.loop].append((mailbox, event))
        for loop, deliveries in by_loop.items():
            try:
                loop.call_soon_threadsafe(put_all, deliveries)
            except RuntimeError:  # the loop is closed, its consumers are gone
                self._abort_now(event.sequence_id for _, event in deliveries)

    def _abort_now(self, sequence_ids: Iterable[int]) -> None:
        for sequence_id in sequence_ids:
            self._engine.abort(sequence_id)

    def _resolve_idle(self) -> None:
        for future in self._idle_futures:
            _run_into(future, lambda: None)
        self._idle_futures.clear()

    def _close(self, reason: str) -> None:
        """The end: refuse what is still in the inbox, and give every open handle its terminal event."""
        with self._lock:
            self._is_closed = True
        while not self._inbox.empty():
            match self._inbox.get():
                case _Submission(request, sequences, mailbox):
                    self._mailboxes |= {sequence.id: mailbox for sequence in sequences}
                    self._publish_load(arrived=request)
                    request.lease.release()
                case _Call(_, future) if future.set_running_or_notify_cancel():
                    future.set_exception(NotReadyError(reason))
                case _WhenIdle(future):
                    self._idle_futures.append(future)
        try:
            self._deliver(self._engine.fail_all(reason))
        except Exception:
            logger.exception("could not end all sequences in order")
        # Whatever a broken step left without its terminal event.
        self._deliver([TokenEvent(id_, finish_reason=FinishReason.ERROR, error=reason) for id_ in self._mailboxes])
        self._publish_load()
        self._resolve_idle()


def _run_into(future: Future[Any], function: Callable[[], Any]) -> None:
    """Complete the future with what the function returns or raises, unless it was cancelled before."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)
