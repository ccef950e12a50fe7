"""Stand-ins around a registry: the thread that runs the model, and router artefacts for given adapters."""

import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from server.adapters.records import AdapterState
from server.adapters.registry import AdapterRegistry
from server.config import AdapterSpec
from server.routing.attach import RoutedModel
from server.routing.policy import BASE_DIGEST
from server.routing.router import ArtefactAdapter, RouterArtefact, save_artefact
from tests.adapters.folders import BASE


def run_inline(step: Callable[[], None]) -> "Future[None]":
    """`run_between_steps` of a server whose engine has not started."""
    future: Future[None] = Future()
    try:
        step()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(None)
    return future


class StepThread:
    """`run_between_steps` of a running engine: a thread that takes one function between two steps.

    `between` is called there before each function: what a running engine could observe at that moment.
    """

    def __init__(self, between: Callable[[], object] = lambda: None) -> None:
        self._inbox: queue.SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = queue.SimpleQueue()
        self._between = between
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def __call__(self, step: Callable[[], None]) -> "Future[None]":
        future: Future[None] = Future()
        self._inbox.put((step, future))
        return future

    def stop(self) -> None:
        self._inbox.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (item := self._inbox.get()) is not None:
            step, future = item
            self._between()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                step()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)


def artefact_for(
    routed: RoutedModel,
    adapters: Iterable[tuple[str, str]],
    *,
    seed: int = 0,
    has_null_expert: bool = False,
    **fields: Any,
) -> RouterArtefact:
    """A random per-layer router with a row for each (name, digest)."""
    known = [ArtefactAdapter(name, digest) for name, digest in adapters]
    if has_null_expert:
        known.append(ArtefactAdapter("base", BASE_DIGEST))
    generator = torch.Generator().manual_seed(seed)
    rows = {
        f"layer.{layer}": torch.randn(len(known), routed.hidden_size, generator=generator)
        for layer in range(routed.num_layers)
    }
    options: dict[str, Any] = {
        "base_model": BASE,
        "hidden_size": routed.hidden_size,
        "num_layers": routed.num_layers,
        "granularity": "layer",
        "top_k": min(2, len(known)),
        "temperature": 1.0,
        "adapters": tuple(known),
        "rows": rows,
        **fields,
    }
    return RouterArtefact(**options)


def save_router(folder: Path, routed: RoutedModel, adapters: Iterable[tuple[str, str]], **options: Any) -> Path:
    """`artefact_for`, written to a folder."""
    save_artefact(artefact_for(routed, adapters, **options), folder)
    return folder


def local(name: str, source: str | None = None, **fields: Any) -> AdapterSpec:
    return AdapterSpec(name=name, source=f"./{source or name}", **fields)


def add(registry: AdapterRegistry, *names: str, **fields: Any) -> None:
    """Register local adapters one after the other and wait until they are ready."""
    for name in names:
        registry.register(local(name, **fields))
        info = registry.wait(name, 30)
        assert info.state is AdapterState.READY, info
