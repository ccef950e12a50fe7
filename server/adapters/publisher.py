"""One lane for everything that changes bank and routers: staged off the model's thread, published between two steps.

Staging must be serial, since each snapshot builds on the one before; a lane of one thread is what makes it so. The
model's thread only ever runs the few assignments of a publication.
"""

import concurrent.futures
import logging
from collections.abc import Callable, Iterable
from typing import TypeVar

from server.errors import NotReadyError
from server.routing.attach import RoutedModel
from server.routing.bank import BankSnapshot
from server.routing.router_bank import RouterGeneration

logger = logging.getLogger(__name__)

T = TypeVar("T")

RunBetweenSteps = Callable[[Callable[[], None]], "concurrent.futures.Future[None]"]
"""Runs a function on the model's thread between two steps."""

POLL_S = 0.2
"""How often a publication that waits for its step looks whether the server is closing."""


class Publisher:
    """The lane. Its thread starts with the first task."""

    def __init__(self, routed: RoutedModel, run_between_steps: RunBetweenSteps) -> None:
        self._routed = routed
        self._run_between_steps = run_between_steps
        self._lane = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-publisher")
        self._is_closing = False

    def run(self, task: Callable[[], T]) -> T:
        """Run a task on the lane and wait for it. Raises what it raises; NotReadyError when the lane is closed."""
        try:
            return self._lane.submit(task).result()
        except (RuntimeError, concurrent.futures.CancelledError) as error:
            if self._is_closing:
                raise NotReadyError("the server is shutting down") from error
            raise

    def enqueue(self, task: Callable[[], None]) -> None:
        """Run a task on the lane some time later; its failure is logged. Does nothing when the lane is closed."""
        try:
            self._lane.submit(_logged, task)
        except RuntimeError:
            if not self._is_closing:
                raise

    def publish(
        self,
        *,
        bank: BankSnapshot | None = None,
        router: RouterGeneration | None = None,
        drop_routers: Iterable[int] = (),
        commit: Callable[[], None],
    ) -> None:
        """Between two steps: bank, then routers, then `commit`, which makes them reachable. On the lane only.

        All or nothing: when a part raises, bank and routers are what they were, and the error is raised here.
        """
        dropped = tuple(drop_routers)

        def step() -> None:
            routed = self._routed
            before = routed.bank.snapshot, routed.routers.generations
            try:
                if bank is not None:
                    routed.bank.publish(bank)
                if router is not None:
                    routed.routers.publish(router)
                for generation in dropped:
                    routed.routers.drop(generation)
                commit()
            except BaseException:
                routed.bank.snapshot, routed.routers.generations = before
                raise

        self._wait_for(self._run_between_steps(step))

    def close(self) -> None:
        """Finish the running task, forget the waiting ones."""
        self._is_closing = True
        self._lane.shutdown(wait=True, cancel_futures=True)

    def _wait_for(self, future: "concurrent.futures.Future[None]") -> None:
        """An engine that has stopped never runs the step: do not wait for it when closing."""
        while not concurrent.futures.wait([future], timeout=POLL_S).done:
            if self._is_closing and future.cancel():
                raise NotReadyError("the server is shutting down")
        future.result()


def _logged(task: Callable[[], None]) -> None:
    try:
        task()
    except Exception:
        logger.exception("a change of the adapter bank failed")
