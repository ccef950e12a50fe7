"""The app's life: requests in flight at shutdown, draining while it listens, and what is closed at the end."""

import asyncio
import threading
import time
from typing import Any

import httpx

from server.adapters.records import AdapterInfo, AdapterState
from server.app import drain
from tests.api.fakes import Harness

SLOW = {"model": "auto", "prompt": "x", "ignore_eos": True, "max_tokens": 100}
NUM_WAITING = 40
"""More than asyncio's worker threads on any machine, 32."""


class _Background(threading.Thread):
    """A request in flight."""

    def __init__(self, client: httpx.Client, body: dict[str, Any], path: str = "/v1/completions") -> None:
        super().__init__()
        self.response: httpx.Response | None = None
        self._client, self._body, self._path = client, body, path
        self.start()

    def run(self) -> None:
        self.response = self._client.post(self._path, json=self._body)


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


def test_draining_refuses_changes_of_adapters_and_router() -> None:
    harness = Harness()
    source = {"name": "new", "source": "org/new"}
    vllms = {"lora_name": "new", "lora_path": "org/new"}
    with harness.serve() as client:
        asyncio.run(drain(harness.services))
        for response in (
            client.post("/v1/adapters", json=source),
            client.post("/v1/adapters", json={**source, "name": "gsm8k"}, headers={"If-Match": "*"}),
            client.delete("/v1/adapters/gsm8k"),
            client.post("/v1/adapters/gsm8k/calibrate", json={"examples": ["one", "two"]}),
            client.post("/v1/load_lora_adapter", json=vllms),
            client.post("/v1/unload_lora_adapter", json={"lora_name": "gsm8k"}),
            client.post("/v1/router", json={"path": "router"}),
        ):
            assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
            assert response.headers["retry-after"] == "5"
        assert client.get("/v1/adapters/gsm8k").json()["state"] == "READY"
    assert harness.registry.registered == []
    assert harness.registry.router_folders == []


def test_registrations_that_are_waited_for_hold_up_neither_others_nor_the_end() -> None:
    """However many: asyncio has few worker threads, which lists and changes of adapters need."""
    harness = Harness()
    harness.registry.settles_as = AdapterInfo("new", AdapterState.DOWNLOADING, "org/new")
    with harness.serve() as client:
        body = {"name": "new", "source": "org/new", "wait": True}
        requests = [_Background(client, body, "/v1/adapters") for _ in range(NUM_WAITING)]
        while len(harness.registry.registered) < NUM_WAITING:
            time.sleep(0.005)
        start_s = time.monotonic()
        assert client.get("/v1/models").status_code == 200
        assert client.get("/v1/adapters").status_code == 200
        assert time.monotonic() - start_s < 1
        asyncio.run(drain(harness.services))
        for request in requests:
            request.join()
    for request in requests:
        assert request.response is not None
        assert (request.response.status_code, request.response.headers["retry-after"]) == (503, "5")


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
