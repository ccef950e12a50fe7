"""`lora-mixer serve` as a process of its own: Hub adapters over loopback, offline restart, openai-python, SIGTERM."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from openai import NotFoundError, OpenAI

from tests.adapters.fake_hub import FakeHub
from tests.integration.conftest import DEMO, REPOSITORY

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
START_TIMEOUT_S = 90


@contextmanager
def command_line_server(root: Path, environment: dict[str, str]) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """Run the server in `root` on a free port; yields its URL when /ready answers 200."""
    command = [sys.executable, "-m", "server", "serve", "--config", str(root / "adapters.yaml"), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "listening on http://" in line, line
        url = line.split()[-1]
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while httpx.get(f"{url}/ready").status_code != 200:
            assert time.monotonic() < deadline_s, "not ready in time"
            time.sleep(0.05)
        yield url, process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def hub_root(tmp_path: Path, demo_model_folder: Path) -> Iterator[tuple[Path, FakeHub]]:
    """A configuration whose two adapters live on a Hub: one at a branch, one in a subfolder."""
    with FakeHub() as hub:
        hub.push_folder("team/maths", DEMO / "adapters" / "gsm8k")
        hub.push_folder("team/collection", DEMO / "adapters" / "sst2", prefix="reviews/sst2/")
        config = {
            "base_model": {"name": BASE, "source": str(demo_model_folder), "dtype": "float32"},
            "router": str(DEMO / "router"),
            "adapters": [
                {"name": "maths", "source": "team/maths", "revision": "main"},
                {"name": "reviews", "source": "team/collection", "subfolder": "reviews/sst2"},
                {"name": "absent", "source": "team/nowhere"},
            ],
            "server": {"kv_cache_mib": 128, "max_model_len": 512},
        }
        (tmp_path / "adapters.yaml").write_text(yaml.safe_dump(config))
        yield tmp_path, hub


def adapters_of(url: str) -> dict[str, dict[str, Any]]:
    return {adapter["name"]: adapter for adapter in httpx.get(f"{url}/v1/adapters").json()["data"]}


def test_hub_adapters_load_lock_and_restart_without_a_network(
    hub_root: tuple[Path, FakeHub], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root, hub = hub_root
    cache = {"HF_HUB_CACHE": str(tmp_path_factory.mktemp("hub")), "HF_ENDPOINT": hub.endpoint}
    with command_line_server(root, cache) as (url, process):
        adapters = adapters_of(url)
        assert adapters["maths"]["state"] == adapters["reviews"]["state"] == "READY"
        assert adapters["maths"]["routed"], "the gate row follows the digest, whatever the adapter is called"
        assert len(adapters["maths"]["revision"]) == 40
        assert adapters["absent"]["state"] == "FAILED"
        assert "team/nowhere" in adapters["absent"]["reason"]
        answer = ask(url, "maths")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    locked = (root / "adapters.lock").read_text()
    assert adapters["maths"]["revision"] in locked
    assert adapters["reviews"]["digest"] in locked
    hub.stop()
    offline = {**cache, "HF_HUB_OFFLINE": "1"}
    with command_line_server(root, offline) as (url, _):
        again = adapters_of(url)
        assert again["maths"]["digest"] == adapters["maths"]["digest"]
        assert again["reviews"]["state"] == "READY"
        assert ask(url, "maths") == answer


def ask(url: str, model: str) -> str:
    """One greedy answer through openai-python, streamed and whole; both must agree."""
    with OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        question: Any = [{"role": "user", "content": "A pen costs 3 dollars. What do 5 pens cost?"}]
        arguments: Any = {"model": model, "messages": question, "max_tokens": 24, "temperature": 0}
        whole = client.chat.completions.create(**arguments).choices[0].message.content
        chunks = client.chat.completions.create(**arguments, stream=True)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert whole == streamed
        with pytest.raises(NotFoundError):
            client.chat.completions.create(**{**arguments, "model": "no-such-model"})
        assert whole
        return str(whole)


def test_wrong_configurations_end_with_one_line_and_no_traceback(tmp_path: Path) -> None:
    def start(content: dict[str, Any]) -> "subprocess.CompletedProcess[str]":
        (tmp_path / "adapters.yaml").write_text(yaml.safe_dump(content))
        command = [sys.executable, "-m", "server", "serve", "--config", "adapters.yaml", "--port", "0"]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)

    unknown_key = start({"adapter": []})
    assert unknown_key.returncode == 2
    assert "did you mean 'adapters'?" in unknown_key.stderr
    no_model = start({"base_model": {"source": "./nowhere"}})
    assert no_model.returncode == 1
    assert "nowhere" in no_model.stderr
    no_router = start({"router": "missing"})
    assert no_router.returncode == 1
    assert "no router artefact in" in no_router.stderr
    for result in (unknown_key, no_model, no_router):
        assert "Traceback" not in result.stderr


def test_another_bases_router_is_refused_at_start(tmp_path: Path, demo_model_folder: Path) -> None:
    router = tmp_path / "router"
    router.mkdir()
    for name in ("router.json", "router.safetensors"):
        (router / name).write_bytes((DEMO / "router" / name).read_bytes())
    record = json.loads((router / "router.json").read_text())
    record["base_model"]["name"] = "someone/else"
    (router / "router.json").write_text(json.dumps(record))
    content = {"base_model": {"name": BASE, "source": str(demo_model_folder)}, "router": "router"}
    (tmp_path / "adapters.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "server", "serve", "--config", "adapters.yaml", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "someone/else" in result.stderr
    assert "Traceback" not in result.stderr
