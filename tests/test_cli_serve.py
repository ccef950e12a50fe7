"""`serve` from its socket to its last request: the real app around a fake model, ended by real signals."""

import io
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import uvicorn

from server import cli
from server.cli_connections import HEAD_TIMEOUT_S
from server.config import ServerSettings
from server.errors import ConfigError
from tests.api.fakes import Harness


class TestServe:
    """The real app around a fake model, served in this thread; a helper thread is its client and sends the signal."""

    @pytest.fixture
    def served(self, capsys: pytest.CaptureFixture[str]) -> Callable[[Harness, Callable[[str], None]], str]:
        """`served(harness, use)` serves until `use(url)` has sent a signal; returns what was printed."""

        def run(harness: Harness, use: Callable[[str], None]) -> str:
            failures: list[BaseException] = []
            with cli.bound_socket(ServerSettings(port=0)) as listener:

                def client() -> None:
                    try:
                        wait_until_ready(cli.url_of(listener))
                        use(cli.url_of(listener))
                    except BaseException as failure:
                        failures.append(failure)
                        os.kill(os.getpid(), signal.SIGTERM)

                thread = threading.Thread(target=client)
                thread.start()
                assert cli.serve(harness.services, listener) == 0
                thread.join()
            assert failures == []
            return capsys.readouterr().out

        return run

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_it_announces_its_address_and_ends_well_on_a_signal(
        self, served: Callable[[Harness, Callable[[str], None]], str], number: signal.Signals
    ) -> None:
        urls: list[str] = []

        def use(url: str) -> None:
            urls.append(url)
            assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
            os.kill(os.getpid(), number)

        harness = Harness()
        handler = signal.getsignal(number)
        assert served(harness, use) == f"listening on {urls[0]}\n"
        assert not harness.engine.is_alive
        assert harness.registry.is_closed
        assert signal.getsignal(number) is handler

    def test_it_serves_where_nobody_takes_its_announcement(
        self, served: Callable[[Harness, Callable[[str], None]], str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Broken(io.StringIO):
            def flush(self) -> None:
                raise BrokenPipeError

        monkeypatch.setattr(sys, "stdout", Broken())
        served(Harness(), lambda _: os.kill(os.getpid(), signal.SIGTERM))

    def test_idle_connections_outlive_the_time_after_which_clients_give_them_up(
        self, served: Callable[[Harness, Callable[[str], None]], str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        configs: list[uvicorn.Config] = []

        class Recording(uvicorn.Config):
            def __init__(self, *args: Any, **settings: Any) -> None:
                super().__init__(*args, **settings)
                configs.append(self)

        monkeypatch.setattr(uvicorn, "Config", Recording)
        served(Harness(), lambda _: os.kill(os.getpid(), signal.SIGTERM))
        assert configs[0].timeout_keep_alive == HEAD_TIMEOUT_S

    def test_a_running_request_finishes_while_ready_says_draining(
        self, served: Callable[[Harness, Callable[[str], None]], str]
    ) -> None:
        harness = Harness()
        harness.runner.reply = "x" * 40
        answers: list[Any] = []

        def use(url: str) -> None:
            harness.runner.step_s = 0.02
            body = {"model": "auto", "prompt": "hello", "max_tokens": 30}
            request = threading.Thread(
                target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json=body, trust_env=False).json())
            )
            request.start()
            while harness.engine.num_running == 0:
                time.sleep(0.005)
            os.kill(os.getpid(), signal.SIGTERM)
            while (ready := httpx.get(f"{url}/ready", trust_env=False)).status_code == 200:
                time.sleep(0.005)
            assert ready.json()["reason"] == "draining"
            request.join()

        served(harness, use)
        assert answers[0]["choices"][0]["text"] == "x" * 30

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_second_signal_cuts_running_requests_off(
        self,
        served: Callable[[Harness, Callable[[str], None]], str],
        number: signal.Signals,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        caplog.set_level(logging.INFO, "server")
        harness = Harness(drain_timeout_s=60)
        started_s, answers = time.monotonic(), list[httpx.Response]()

        def use(url: str) -> None:
            harness.runner.step_s = 0.05
            body = {"model": "auto", "prompt": "hello", "max_tokens": 400, "ignore_eos": True}
            request = threading.Thread(
                target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json=body, trust_env=False))
            )
            request.start()
            while harness.engine.num_running == 0:
                time.sleep(0.005)
            os.kill(os.getpid(), signal.SIGTERM)
            while httpx.get(f"{url}/ready", trust_env=False).status_code == 200:
                time.sleep(0.005)
            os.kill(os.getpid(), number)
            request.join()

        served(harness, use)
        assert time.monotonic() - started_s < 15, "400 steps would take 20 s"
        assert answers[0].status_code == 503
        assert "cut this generation off" in answers[0].text
        assert harness.registry.is_closed
        assert "running ones get up to 60 s to finish; a second signal cuts them off at once" in caplog.text
        assert "Traceback" not in caplog.text

    def test_a_body_that_is_still_on_its_way_holds_up_nothing(
        self, served: Callable[[Harness, Callable[[str], None]], str], caplog: pytest.LogCaptureFixture
    ) -> None:
        head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        answers: list[bytes] = []

        def use(url: str) -> None:
            address = httpx.URL(url)
            with socket.create_connection((address.host, address.port or 80), timeout=5) as connection:
                connection.sendall(head)
                time.sleep(0.05)
                os.kill(os.getpid(), signal.SIGTERM)
                answers.append(connection.recv(64))

        served(Harness(), use)
        assert answers[0].startswith(b"HTTP/1.1 503")
        assert caplog.text == ""

    def test_a_port_has_one_server_that_loads_and_is_free_again_at_its_end(
        self, served: Callable[[Harness, Callable[[str], None]], str]
    ) -> None:
        with cli.bound_socket(ServerSettings(port=0)) as loading, pytest.raises(ConfigError, match="cannot listen on"):
            cli.bound_socket(ServerSettings(port=loading.getsockname()[1]))
        urls: list[str] = []
        with httpx.Client(trust_env=False) as client:  # The server closes its connection first, which lingers then.

            def use(url: str) -> None:
                urls.append(url)
                assert client.get(f"{url}/health").status_code == 200
                os.kill(os.getpid(), signal.SIGTERM)

            served(Harness(), use)
        cli.bound_socket(ServerSettings(port=httpx.URL(urls[0]).port)).close()

    def test_ipv6_addresses_are_urls(self) -> None:
        with cli.bound_socket(ServerSettings(host="::1", port=0)) as listener:
            assert re.fullmatch(r"http://\[::1\]:\d+", cli.url_of(listener))

    def test_a_host_that_does_not_exist_is_a_config_error(self) -> None:
        with pytest.raises(ConfigError, match="cannot listen on not a host:0"):
            cli.bound_socket(ServerSettings(host="not a host", port=0))


def wait_until_ready(url: str) -> None:
    deadline_s = time.monotonic() + 10
    with httpx.Client(base_url=url, trust_env=False) as client:
        while time.monotonic() < deadline_s:
            try:
                if client.get("/ready").status_code == 200:
                    return
            except httpx.ConnectError:
                pass
            time.sleep(0.01)
    raise AssertionError("the server did not become ready")
