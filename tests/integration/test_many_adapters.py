"""More adapters than memory holds, over HTTP: no token changes, nobody starves, and nothing else is held up."""

import asyncio
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml

from server.config import Secrets, load_config
from server.errors import ConfigError
from tests.adapters.folders import BASE, edit_config
from tests.integration.conftest import RunningServer
from tests.integration.tiny import make_tiny_root, serve_here

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

NUM_ADAPTERS = 12
NUM_STREAMS = 24
NUM_CLIENTS = 1000

MakeRoot = Callable[..., Path]


@pytest.fixture
def make_root(
    tiny_llama: "Callable[..., LlamaForCausalLM]", make_adapter: Callable[..., Path], tmp_path: Path
) -> MakeRoot:
    """`make_root(num_routed, **settings)`: the tiny root, with further adapters below sources/ for registration."""

    def build(num_routed: int, **settings: Any) -> Path:
        make_tiny_root(
            tmp_path, tiny_llama, make_adapter, num_adapters=NUM_ADAPTERS, num_configured=num_routed, **settings
        )
        return tmp_path

    return build


def configure(root: Path, adapters: list[dict[str, Any]] | None = None, **settings: Any) -> None:
    """Change the configuration of a root."""
    config = yaml.safe_load((root / "adapters.yaml").read_text())
    config["server"] |= settings
    config["adapters"] = config["adapters"] if adapters is None else adapters
    (root / "adapters.yaml").write_text(yaml.safe_dump(config))


def named(index: int, **fields: Any) -> dict[str, Any]:
    return {"name": f"a{index}", "source": f"./sources/a{index}", "routed": False, **fields}


def mib_of(server: RunningServer, *names: str) -> float:
    return float(sum(info.memory_bytes for info in server.services.registry.list() if info.name in names)) / 2**20


def completion(model: str, prompt: str, num_tokens: int = 12, **fields: Any) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, **fields}


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def counted(client: httpx.Client, name: str) -> float:
    """Sum of a metric's series."""
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"lora_mixer_{name}"))


async def answers_of(url: str, bodies: list[dict[str, Any]]) -> list[str]:
    """Texts of all requests, `NUM_STREAMS` at a time."""
    places = asyncio.Semaphore(NUM_STREAMS)

    async def answer(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        async with places:
            response = await client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])

    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        return await asyncio.gather(*(answer(client, body) for body in bodies))


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_many_streams_over_a_small_memory_get_the_tokens_of_a_large_one(
    make_root: MakeRoot, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_root(2, backend=backend, max_num_seqs=NUM_STREAMS)
    adapters = [named(0, routed=True), named(1, routed=True), *map(named, range(2, NUM_ADAPTERS))]
    configure(root, adapters)
    models: list[dict[str, Any]] = [{"model": f"a{index}"} for index in range(NUM_ADAPTERS)]
    models += [{"model": "auto"}, {"model": BASE}, {"model": "auto", "adapters": {"a3": 0.5, "a7": 0.5}}]
    bodies = [{**completion("", f"number {index}"), **models[index * 7 % len(models)]} for index in range(120)]
    with serve_here(root) as server:
        expected = asyncio.run(answers_of(server.url, bodies))
        budget_mib = mib_of(server, "a0", "a1", "a2", "a3", "a7")
    configure(root, adapters, adapter_memory_mib=budget_mib)
    with serve_here(root) as server, httpx.Client(base_url=server.url) as client:
        registry = server.services.registry
        largest = 0.0

        def observe() -> None:
            nonlocal largest
            infos = registry.list()
            assert {info.name for info in infos if info.resident} >= {"a0", "a1"}, "what is routed to stays"
            largest = max(largest, sum(info.memory_bytes for info in infos if info.resident) / 2**20)

        record = registry.record_traffic

        def observed(*masses: Any) -> None:
            observe()
            record(*masses)

        monkeypatch.setattr(registry, "record_traffic", observed)
        for _ in range(2):
            assert asyncio.run(answers_of(server.url, bodies)) == expected
        assert 0 < largest <= budget_mib
        assert counted(client, "adapter_evictions_total") > 20
        assert counted(client, "adapter_reloads_total") > 20
        assert counted(client, 'adapter_waits_total{outcome="leased"}') > 20
        assert counted(client, "requests_waiting_for_adapters") == 0
        wait_until(lambda: not registry.has_leases)
        shown = {info["name"]: info for info in client.get("/v1/adapters").json()["data"]}
        assert counted(client, "adapters_resident") == sum(info["resident"] for info in shown.values()) < NUM_ADAPTERS
        assert all(info["memory_bytes"] > 0 for info in shown.values())


@pytest.fixture
def many_files() -> Iterator[None]:
    """Sockets for `NUM_CLIENTS` clients and their server in one process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * NUM_CLIENTS + 500
    if soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            pytest.skip(f"needs {wanted} open files")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
def test_a_thousand_clients_that_wait_for_cold_adapters_hold_up_nobody_else(make_root: MakeRoot) -> None:
    root = make_root(2, max_resident_adapters=3, max_num_seqs=64, adapter_wait_s=300)
    configure(root, [named(0, routed=True), named(1, routed=True), *map(named, range(2, NUM_ADAPTERS))])

    async def crowd(server: RunningServer) -> list[int]:
        desk = server.services.registry.desk
        (held,) = await desk.lease_when_resident("a2")
        limits = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client,
            httpx.AsyncClient(base_url=server.url, timeout=60) as others,
        ):
            bodies = [completion(f"a{3 + index % (NUM_ADAPTERS - 3)}", "x", 1) for index in range(NUM_CLIENTS)]
            waiting = [asyncio.create_task(client.post("/v1/completions", json=body)) for body in bodies]
            while desk.num_waiting < NUM_CLIENTS:
                await asyncio.sleep(0.05)
            for _ in range(3):
                for call in (
                    others.get("/health"),
                    others.get("/metrics"),
                    others.get("/v1/adapters"),
                    others.post("/tokenize", json={"prompt": "x"}),
                    others.post("/v1/completions", json=completion(BASE, "hello", 4)),
                    others.post("/v1/completions", json=completion("auto", "hello", 4)),
                    others.post("/v1/completions", json=completion("auto", "hello", 4, adapters=["a0"])),
                ):
                    start_s = time.monotonic()
                    response = await call
                    assert response.status_code == 200, response.text
                    assert time.monotonic() - start_s < 10
            assert desk.num_waiting == NUM_CLIENTS
            held.release()
            return [(await task).status_code for task in waiting]

    with serve_here(root) as server:
        assert asyncio.run(crowd(server)) == [200] * NUM_CLIENTS
        wait_until(lambda: not server.services.registry.has_leases)
        assert server.services.registry.desk.num_waiting == 0


def test_a_wait_that_is_too_long_is_503_and_a_client_that_leaves_is_out_of_the_line(make_root: MakeRoot) -> None:
    root = make_root(0, max_resident_adapters=1, adapter_wait_s=1.0, max_waiting_requests=2)
    configure(root, [named(0), named(1)])
    with serve_here(root) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        desk = server.services.registry.desk
        held = desk.lease("a0")[0]
        response = client.post("/v1/completions", json=completion("a1", "x"))
        assert (response.status_code, response.json()["error"]["code"]) == (503, "adapter_memory_full")
        assert int(response.headers["Retry-After"]) >= 1
        assert "within 1 s" in response.json()["error"]["message"]
        for is_stream in (True, False):
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=completion("a1", "x", stream=is_stream), timeout=0.2)
            wait_until(lambda: desk.num_waiting == 0, 0.7)
        held.release()
        assert client.post("/v1/completions", json=completion("a1", "x")).status_code == 200
        assert counted(client, 'adapter_waits_total{outcome="left"}') == 2
        wait_until(lambda: not server.services.registry.has_leases)


def test_a_file_that_changed_on_disk_is_never_served(make_root: MakeRoot) -> None:
    root = make_root(0, max_resident_adapters=1)
    configure(root, [named(0), named(1)])
    with serve_here(root) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.post("/v1/completions", json=completion("a0", "x")).status_code == 200  # in memory, so a1 is not
        edit_config(root / "sources" / "a1", {"lora_alpha": 3})
        response = client.post("/v1/completions", json=completion("a1", "x"))
        assert response.status_code == 422
        assert [reason["code"] for reason in response.json()["error"]["reasons"]] == ["content_changed"]
        info = client.get("/v1/adapters/a1").json()
        assert (info["state"], info["resident"]) == ("FAILED", False)
        assert client.post("/v1/completions", json=completion("a1", "x")).status_code == 404
        assert client.post("/v1/completions", json=completion("a0", "x")).status_code == 200


@pytest.mark.parametrize(
    ("num_routed", "adapters", "settings", "message"),
    [
        (
            0,
            [named(index, pinned=True) for index in range(3)],
            {"max_resident_adapters": 2},
            "pinned adapters do not fit.*allows 2",
        ),
        (0, [named(0, pinned=True)], {"adapter_memory_mib": 0.001}, r"a0.*allows 0\.001 MiB"),
        (2, None, {"max_resident_adapters": 1}, "router's adapters do not fit"),
        (1, [named(0, routed=True), named(1, pinned=True)], {"max_resident_adapters": 1}, "router's adapters"),
    ],
)
def test_a_memory_that_does_not_hold_what_must_stay_is_a_wrong_configuration(
    make_root: MakeRoot, num_routed: int, adapters: list[dict[str, Any]] | None, settings: dict[str, Any], message: str
) -> None:
    from server.assembly import build_services

    root = make_root(num_routed, **settings)
    configure(root, adapters)
    with pytest.raises(ConfigError, match=message):
        build_services(load_config(root / "adapters.yaml"), Secrets())
