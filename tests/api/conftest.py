"""Fixtures of the HTTP tests: one served app per module around fakes, put back to its first state for every test."""

from collections.abc import Iterator

import httpx
import pytest

from tests.api.fakes import Harness


@pytest.fixture(scope="module")
def _served() -> Iterator[tuple[Harness, httpx.Client]]:
    harness = Harness()
    with harness.serve() as client:
        yield harness, client


@pytest.fixture
def harness(_served: tuple[Harness, httpx.Client]) -> Iterator[Harness]:
    """The fakes; afterwards nothing may run, wait or hold a lease."""
    harness, _ = _served
    harness.reset()
    yield harness
    harness.settle()


@pytest.fixture
def client(harness: Harness, _served: tuple[Harness, httpx.Client]) -> httpx.Client:
    """A client of the served app."""
    del harness  # Asked for, so that it is reset first.
    return _served[1]
