"""A whole server on a loopback port: real base model, real adapters, real router, real HTTP."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
import yaml

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "examples" / "demo"


@dataclass(frozen=True)
class RunningServer:
    """One server under test, and its parts for looking inside."""

    url: str
    services: Any
    root: Path
    """Its configuration folder, below which adapters may be registered over HTTP."""

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=120, **options)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30)


@contextmanager
def serve(root: Path, **settings: Any) -> Iterator[RunningServer]:
    """Start the demo configuration in float32 from `root`, as `lora-mixer serve` would; stop it at the end."""
    from server.app import create_app
    from server.assembly import build_services
    from server.config import Secrets, load_config

    shutil.copytree(DEMO, root / "examples" / "demo")
    config = yaml.safe_load((REPOSITORY / "adapters.yaml").read_text())
    config["base_model"]["dtype"] = "float32"
    config["server"] = {"kv_cache_mib": 256, "max_model_len": 2048, "log_level": "warning", **settings}
    (root / "adapters.yaml").write_text(yaml.safe_dump(config))
    services = build_services(load_config(root / "adapters.yaml"), Secrets())
    server = uvicorn.Server(uvicorn.Config(create_app(services), port=0, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, name="uvicorn")
    thread.start()
    try:
        url = _wait_until_ready(server)
        yield RunningServer(url, services, root)
    finally:
        server.should_exit = True
        thread.join(timeout=60)
    assert not thread.is_alive(), "the server did not stop"


def _wait_until_ready(server: uvicorn.Server) -> str:
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        if server.started:
            port = server.servers[0].sockets[0].getsockname()[1]
            if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                return f"http://127.0.0.1:{port}"
        time.sleep(0.05)
    raise AssertionError("the server was not ready within 60 s")


@pytest.fixture(scope="session")
def demo_server(
    tmp_path_factory: pytest.TempPathFactory, demo_model_folder: Path, _one_torch_thread: None
) -> Iterator[RunningServer]:
    """The demo server in float32, shared by the session; tests must leave it as they found it."""
    del demo_model_folder  # only makes sure that the one conversion has happened
    with serve(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def start_server(tmp_path: Path) -> Callable[..., Any]:
    """`with start_server(max_num_seqs=4) as server`: a server of the test's own."""
    return lambda **settings: serve(tmp_path, **settings)
