"""kill -9 at random moments of registrations, replacements and retirements: a restart serves what was acknowledged."""

import contextlib
import json
import random
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.adapters.calibrating import ORDINARY, OWN
from tests.adapters.fake_hub import FakeHub, Fault
from tests.integration.tiny import make_tiny_root, serve_apart

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

NAMES = ("red", "green", "blue")
LONGEST_LIFE_S = 1.5
"""From the first operation to the kill; an operation takes some 50 ms, more from the Hub."""


class Client:
    """Does random things to a server and knows which states each name may be in: a digest, or None for absent."""

    def __init__(self, digests: dict[str, str], seed: int) -> None:
        self._digests = digests  # by source
        self._rng = random.Random(seed)
        self.possible: dict[str, set[str | None]] = {name: {None} for name in NAMES}
        self.num_acknowledged = 0

    def work(self, url: str) -> None:
        """Until the server is gone."""
        with httpx.Client(base_url=url, timeout=30) as http, contextlib.suppress(httpx.TransportError):
            while True:
                self._change(http, self._rng.choice(NAMES))

    def _change(self, http: httpx.Client, name: str) -> None:
        before = self.possible[name]
        if self._rng.random() < 0.3:
            self.possible[name] = before | {None}
            answer = http.delete(f"/v1/adapters/{name}")
            after: set[str | None] = {None}
        else:
            source = self._rng.choice(sorted(self._digests))
            self.possible[name] = before | {self._digests[source]}
            headers = {} if before == {None} else {"If-Match": "*"}
            body = {"name": name, "source": source, "wait": True}
            answer = http.post("/v1/adapters", json=body, headers=headers)
            after = {self._digests[source]}
        if answer.is_success:
            assert answer.status_code in (200, 201), answer.text
            self.possible[name] = after
            self.num_acknowledged += 1
        else:  # one may still be retiring, or the name be free already
            assert answer.status_code in (404, 409, 412), answer.text
            self.possible[name] = before

    def check(self, url: str) -> None:
        """Every name is in a state it may be in, and what is served answers."""
        listed = {info["name"]: info for info in httpx.get(f"{url}/v1/adapters").json()["data"]}
        assert set(listed) <= {*NAMES, "a0"}
        assert listed["a0"]["state"] == "READY"
        for name in NAMES:
            info: dict[str, Any] | None = listed.get(name)
            assert info is None or info["state"] == "READY", info
            digest = None if info is None else info["digest"]
            assert digest in self.possible[name], (name, digest, self.possible[name])
            self.possible[name] = {digest}
            if info is not None:
                body = {"model": name, "prompt": "x", "max_tokens": 2, "ignore_eos": True}
                answer = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
                assert answer.json()["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("num_kills", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_a_restart_after_kill_9_serves_what_was_acknowledged(
    num_kills: int,
    tiny_llama: "Callable[..., LlamaForCausalLM]",
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    digests = make_tiny_root(tmp_path, tiny_llama, make_adapter, num_adapters=4, num_configured=1, max_adapters=8)
    rng = random.Random(7)
    with FakeHub() as hub:
        for name in ("a2", "a3"):
            hub.push_folder(f"org/{name}", tmp_path / "sources" / name)
        hub.fail(Fault("/cdn/", drip_s=0.002, times=10**9))
        sources = {"sources/a1": digests["a1"], "org/a2": digests["a2"], "org/a3": digests["a3"]}
        client = Client(sources, seed=3)
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "cache")}
        for _ in range(num_kills):
            with serve_apart(tmp_path, environment) as (url, process):
                client.check(url)
                worker = threading.Thread(target=client.work, args=(url,))
                worker.start()
                time.sleep(rng.uniform(0.02, LONGEST_LIFE_S))
                process.kill()
                worker.join(60)
        with serve_apart(tmp_path, environment) as (url, _):
            client.check(url)
    assert client.num_acknowledged > num_kills
    assert not list(tmp_path.glob("adapters.*.tmp")), "nothing is left half written"


class Teacher:
    """Gives an adapter examples, and knows which sets of them it may have: acknowledged ones, or None: no adapter."""

    def __init__(self, root: Path, seed: int) -> None:
        self._folder = root / "adapters.state.examples"
        self._rng = random.Random(seed)
        self.possible: set[frozenset[str] | None] = {None}
        self.num_acknowledged = 0

    def work(self, url: str) -> None:
        """Until the server is gone."""
        with httpx.Client(base_url=url, timeout=30) as http, contextlib.suppress(httpx.TransportError):
            while True:
                self._change(http)

    def _change(self, http: httpx.Client) -> None:
        (before,) = self.possible
        texts = self._rng.sample(OWN + ORDINARY, 3)
        after: frozenset[str] | None = (before or frozenset()) | frozenset(texts)
        kind = self._rng.random()
        self.possible = {before, None if kind < 0.3 else after}
        if kind < 0.3:
            after, answer = None, http.delete("/v1/adapters/red")
        elif kind < 0.6:
            body = {"name": "red", "source": "sources/a1", "examples": texts}
            answer = http.post("/v1/adapters", json=body)
        else:
            answer = http.post("/v1/adapters/red/calibrate", json={"examples": texts})
        if answer.is_success:
            self.possible = {after}
            self.num_acknowledged += 1
        else:  # not there, or not READY yet
            assert answer.status_code in (404, 409), answer.text
            self.possible = {before}

    def check(self, url: str) -> None:
        """What is on disk may be, nobody else may read it, and the server has made a row from it."""
        files = sorted(self._folder.iterdir()) if self._folder.is_dir() else []
        listed = {info["name"]: info for info in httpx.get(f"{url}/v1/adapters").json()["data"]}
        found: frozenset[str] | None = None
        if "red" in listed:
            assert len(files) == 1
            assert stat.S_IMODE(files[0].stat().st_mode) == 0o600
            lines = [json.loads(line) for line in files[0].read_text().splitlines()[1:]]
            found = frozenset(chat["messages"][0]["content"] for chat in lines)
            assert listed["red"]["calibration"]["num_examples"] == len(found)
            assert listed["red"]["calibration"]["state"] in ("passed", "refused")
        else:
            assert files == []
        assert found in self.possible, (found, self.possible)
        self.possible = {found}


@pytest.mark.parametrize("num_kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_examples_survive_kill_9_with_their_adapter_and_go_with_it(
    num_kills: int, tiny_llama: "Callable[..., LlamaForCausalLM]", make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    make_tiny_root(tmp_path, tiny_llama, make_adapter, num_adapters=2, num_configured=1, can_calibrate=True)
    rng = random.Random(11)
    teacher = Teacher(tmp_path, seed=5)
    for _ in range(num_kills):
        with serve_apart(tmp_path, {}) as (url, process):
            teacher.check(url)
            before = teacher.num_acknowledged
            worker = threading.Thread(target=teacher.work, args=(url,))
            worker.start()
            deadline_s = time.monotonic() + 30
            while teacher.num_acknowledged == before and time.monotonic() < deadline_s:
                time.sleep(0.01)  # a busy machine may need longer than a life
            time.sleep(rng.uniform(0.0, LONGEST_LIFE_S))
            process.kill()
            worker.join(60)
    with serve_apart(tmp_path, {}) as (url, _):
        teacher.check(url)
    assert teacher.num_acknowledged >= num_kills


def test_a_download_that_a_kill_cut_off_goes_on_after_the_restart_and_then_offline(
    tiny_llama: "Callable[..., LlamaForCausalLM]",
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A private source with a token of its own, accepted with 202; the token is in no file and no line of the log."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    digests = make_tiny_root(tmp_path, tiny_llama, make_adapter, num_adapters=2, num_configured=1)
    with FakeHub() as hub:
        hub.push_folder("org/a1", tmp_path / "sources" / "a1")
        hub.repositories["org/a1"].token = "hf_secret"
        hub.fail(Fault("/cdn/", drip_s=0.3))
        environment = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "LORA_MIXER_HUB_TOKENS": "org/a1=hf_secret",
        }
        with serve_apart(tmp_path, environment) as (url, process):
            answer = httpx.post(f"{url}/v1/adapters", json={"name": "private", "source": "org/a1"})
            assert (answer.status_code, answer.json()["state"]) == (202, "DOWNLOADING")
            info = answer.json()
            while not info["downloaded_bytes"] > 1000:
                assert info["state"] == "DOWNLOADING", info
                time.sleep(0.02)
                info = httpx.get(f"{url}/v1/adapters/private").json()
            assert info["downloaded_bytes"] < info["download_bytes"]
            process.kill()
            process.wait()
        log = (tmp_path / "server.log").read_text()
        hub.requests.clear()
        with serve_apart(tmp_path, environment) as (url, _):
            info = httpx.get(f"{url}/v1/adapters/private").json()
            assert (info["state"], info["digest"], info["generation"]) == ("READY", digests["a1"], 1)
        ranges = [request.range for request in hub.requests if request.method == "GET" and "/cdn/" in request.path]
        assert len(ranges) == 1
        assert str(ranges[0]).startswith("bytes=")
    with serve_apart(tmp_path, {**environment, "HF_HUB_OFFLINE": "1"}) as (url, _):
        info = httpx.get(f"{url}/v1/adapters/private").json()
        assert (info["state"], info["digest"]) == ("READY", digests["a1"])
    log += (tmp_path / "server.log").read_text()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert "hf_secret" not in log
    assert b"hf_secret" not in written


def test_a_hub_that_drips_keeps_a_server_neither_from_its_end_nor_from_its_start(
    tiny_llama: "Callable[..., LlamaForCausalLM]",
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    make_tiny_root(tmp_path, tiny_llama, make_adapter, num_adapters=2, num_configured=1, hub_download_timeout_s=3)
    with FakeHub() as hub:
        hub.push_folder("org/a1", tmp_path / "sources" / "a1")
        hub.fail(Fault("/api/models", header_drip_s=0.1, times=10**9))
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "cache")}
        with serve_apart(tmp_path, environment) as (url, process):
            for index in range(9):
                answer = httpx.post(f"{url}/v1/adapters", json={"name": f"drip-{index}", "source": "org/a1"})
                assert answer.status_code == 202
            process.terminate()
            assert process.wait(20) == 0
        with serve_apart(tmp_path, environment) as (url, _):
            listed = {info["name"]: info["state"] for info in httpx.get(f"{url}/v1/adapters").json()["data"]}
    assert listed == {"a0": "READY", **{f"drip-{index}": "FAILED" for index in range(9)}}
