"""Hubs that drip, never end or send too much: every download ends when it should, its threads too, in little memory."""

import contextlib
import gzip
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from server.adapters.hub import HubSource
from server.adapters.hub_answers import MAX_LIST_BYTES, ask_for_head
from server.adapters.hub_requests import HubCall
from server.adapters.hub_retry import RetryPolicy
from server.config import AdapterSpec
from server.errors import AdapterDownloadError
from tests.adapters.fake_hub import FakeHub, Fault

FILES = {
    "adapter_config.json": b'{"r": 4}',
    "adapter_model.safetensors": bytes(range(256)) * 1000,
    "examples.jsonl": b'"what is two and two?"\n' * 1000,
}
SPEC = AdapterSpec(name="a", source="org/name")

DRIPS = {
    "list": Fault("/api/models", method="GET", drip_s=0.1, piece_bytes=1),
    "headers of the list": Fault("/api/models", header_drip_s=0.1),
    "headers of a file": Fault("adapter_config.json", method="HEAD", header_drip_s=0.1),
    "headers of a body": Fault("/cdn/", method="GET", header_drip_s=0.1),
    "body": Fault("/cdn/", method="GET", drip_s=0.1, piece_bytes=1),
    "silence": Fault("/api/models", delay_s=20.0),
}


def make_source(hub: FakeHub, tmp_path: Path, **options: Any) -> HubSource:
    defaults: dict[str, Any] = {"cache_folder": tmp_path / "cache", "retries": RetryPolicy(1, first_wait_s=0.01)}
    return HubSource(endpoint=hub.endpoint, **{**defaults, **options})


@pytest.fixture(params=DRIPS)
def dripping(request: pytest.FixtureRequest, hub: FakeHub) -> Iterator[FakeHub]:
    """A Hub that lets a client wait; afterwards none of ours does."""
    hub.push("org/name", FILES)
    fault = DRIPS[request.param]
    hub.fail(Fault(**{**vars(fault), "times": 99}))
    yield hub
    until_s = time.monotonic() + 8
    while any(thread.name == "hub-request" for thread in threading.enumerate()):
        assert time.monotonic() < until_s, "a request outlives its download"
        time.sleep(0.01)


def test_nothing_is_asked_of_the_hub_but_what_a_download_needs(hub: FakeHub, tmp_path: Path) -> None:
    """A fresh client would ask it for a list of agents first, and wait for that without a bound."""
    hub.push("org/name", FILES)
    script = (
        "from server.adapters.hub import HubSource; from server.config import AdapterSpec; "
        "HubSource().fetch(AdapterSpec(name='a', source='org/name'))"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_secret"}
    environment.pop("HF_HUB_OFFLINE", None)
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)
    assert all("org/name" in request.path for request in hub.requests)
    assert {request.token for request in hub.requests if "/cdn/" not in request.path} == {"hf_secret"}


def test_a_hub_that_drips_anywhere_is_given_up_in_time(dripping: FakeHub, tmp_path: Path) -> None:
    start_s = time.monotonic()
    with pytest.raises(AdapterDownloadError, match=r"took longer than 0\.5 s"):
        make_source(dripping, tmp_path, download_timeout_s=0.5).fetch(SPEC)
    assert time.monotonic() - start_s < 8


def test_a_download_may_be_abandoned_wherever_it_waits(dripping: FakeHub, tmp_path: Path) -> None:
    class AbandonedError(Exception):
        pass

    start_s = time.monotonic()

    def abandon(_done: int, _total: int) -> None:
        if time.monotonic() - start_s > 0.5:
            raise AbandonedError

    with pytest.raises(AbandonedError):
        make_source(dripping, tmp_path).fetch(SPEC, progress=abandon)
    assert time.monotonic() - start_s < 8


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_examples_whose_headers_drip_cost_the_adapter_nothing_but_them(
    method: str, hub: FakeHub, tmp_path: Path
) -> None:
    hub.push("org/name", FILES)
    hub.fail(Fault("examples.jsonl", method=method, header_drip_s=0.1, times=99))
    resolved = make_source(hub, tmp_path, download_timeout_s=2).fetch(SPEC)
    assert set(resolved.files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert "took longer than 0.5 s" in str(resolved.examples_problem)


@pytest.mark.parametrize("drip_s", [0.0, 0.1])
@pytest.mark.parametrize("path", ["/api/models", "/cdn/"])
def test_the_body_of_an_error_is_not_waited_for(path: str, drip_s: float, hub: FakeHub, tmp_path: Path) -> None:
    hub.push("org/name", FILES)
    hub.fail(Fault(path, status=404, is_endless=True, drip_s=drip_s, piece_bytes=65_536, times=99))
    start_s = time.monotonic()
    with pytest.raises(AdapterDownloadError, match="HTTP 404"):
        make_source(hub, tmp_path).fetch(SPEC)
    assert time.monotonic() - start_s < 8


def test_the_body_of_a_redirect_is_not_waited_for(hub: FakeHub, tmp_path: Path) -> None:
    hub.push("org/name", FILES)
    target = {"Location": "/api/models/org/name/revision/main?securityStatus=true"}
    hub.fail(Fault("/api/models", status=302, is_endless=True, headers=target, piece_bytes=65_536))
    start_s = time.monotonic()
    make_source(hub, tmp_path).fetch(SPEC)
    assert time.monotonic() - start_s < 8


def test_a_redirect_to_nowhere_is_an_error(hub: FakeHub, tmp_path: Path) -> None:
    hub.push("org/name", FILES)
    hub.fail(Fault("/api/models", status=302))
    with pytest.raises(AdapterDownloadError, match="not the Hub's"):
        make_source(hub, tmp_path).fetch(SPEC)


@pytest.mark.parametrize("is_compressed", [False, True])
def test_a_list_without_end_takes_little_memory(is_compressed: bool, hub: FakeHub, tmp_path: Path) -> None:
    hub.push("org/name", FILES)
    if is_compressed:
        body = gzip.compress(bytes(8 * MAX_LIST_BYTES))
        hub.fail(Fault("/api/models", status=200, body=body, headers={"Content-Encoding": "gzip"}))
    else:
        hub.fail(Fault("/api/models", status=200, is_endless=True, piece_bytes=65_536))
    tracemalloc.start()
    with pytest.raises(AdapterDownloadError, match="not the Hub's"):
        make_source(hub, tmp_path).fetch(SPEC)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 3 * MAX_LIST_BYTES


@pytest.mark.parametrize(
    ("target", "is_followed"),
    [
        ("https://mirror.example/new/file", True),
        ("https://huggingface.co/file", True),
        ("http://mirror.example/file", False),
        ("https://mirror.example:444/file", False),
        ("https://cdn.example/file", False),
    ],
)
def test_headers_come_from_the_hub_and_over_what_its_url_promises(target: str, is_followed: bool) -> None:
    """A redirect to plain http would show the Hub's token to everybody on the way."""

    class Call:
        @contextlib.contextmanager
        def open(
            self, _method: str, url: str, _headers: object, *, follows: Callable[[str, str], bool]
        ) -> Iterator[Any]:
            assert follows(url, target) is is_followed
            yield SimpleNamespace(headers={"ETag": "x"}, iter_raw=list, next_request=None)

    ask_for_head(cast("HubCall", Call()), "https://mirror.example/org/name/resolve/main/file")


def test_a_compressed_list_is_read(hub: FakeHub, tmp_path: Path) -> None:
    commit = hub.push("org/name", FILES)
    hub.fail(Fault("/api/models", compresses=True))
    assert make_source(hub, tmp_path).fetch(SPEC).revision == commit


@pytest.mark.parametrize("encoding", ["br", "gzip"])
def test_a_list_that_cannot_be_decompressed_is_an_error(encoding: str, hub: FakeHub, tmp_path: Path) -> None:
    hub.push("org/name", FILES)
    hub.fail(Fault("/api/models", status=200, headers={"Content-Encoding": encoding}))
    with pytest.raises(AdapterDownloadError, match="not the Hub's"):
        make_source(hub, tmp_path).fetch(SPEC)
