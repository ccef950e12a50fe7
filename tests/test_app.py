"""The app's life: requests in flight at shutdown, draining while it listens, and what is closed at the end."""

import asyncio
import threading
import time
from typing import Any

import httpx

from server.app import drain
from tests.api.fakes import Harness

SLOW = {"model": "auto", "prompt": "x", "ignore_eos": True, "max_tokens": 100}


class _Background(threading.Thread):
    """A request in flight."""

    def __init__(self, client: httpx.Client, body: dict[str, Any]) -> None:
        super().__init__()
        self.response: httpx.Response | None = None
        self._client, self._body = client, body
        self.start()

    def run(self) -> None:
        self.response = self._client.post("/v1/completions", json=self._body)


def _wait_until_running(harness: Harness) -> None:
    while not harness.engine.num_running:
        time.sleep(0.005)


def test_shutdown_lets_running_requests_finish() -> None:
    harness = Harness()
    with harness.serve() as client:
        harness.runner.step_s = 0.005
        request = _Background(client, SLOW)
        _wait_until_running(harness)
        assert harness.server is not None
        harness.server.should_exit = True
        request.join()
    assert request.response is not None
    assert request.response.json()["usage"]["completion_tokens"] == 100
    assert harness.registry.is_closed
    assert not harness.engine.is_alive
    assert harness.registry.num_open_leases == 0


def test_draining_refuses_new_requests_and_says_so_while_it_listens() -> None:
    harness = Harness()
    with harness.serve() as client:
        harness.runner.step_s = 0.005
        request = _Background(client, SLOW)
        _wait_until_running(harness)
        draining = threading.Thread(target=lambda: asyncio.run(drain(harness.services)))
        draining.start()
        while not harness.engine.is_draining:
            time.sleep(0.001)
        ready = client.get("/ready")
        assert (ready.status_code, ready.json()["reason"]) == (503, "draining")
        refused = client.post("/v1/completions", json={"model": "auto", "prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
        request.join()
        draining.join()
        assert request.response is not None
        assert request.response.status_code == 200
        assert client.get("/health").status_code == 200


def test_drain_cuts_off_what_takes_too_long_with_an_error() -> None:
    harness = Harness(drain_timeout_s=0.1)
    with harness.serve() as client:
        harness.runner.step_s = 0.02
        request = _Background(client, {**SLOW, "max_tokens": 400})
        _wait_until_running(harness)
        asyncio.run(drain(harness.services))
        request.join()
        assert request.response is not None
        assert request.response.status_code == 503
        assert "cut this generation off" in request.response.json()["error"]["message"]
    assert harness.registry.num_open_leases == 0
