"""Connections that ask for nothing or read nothing, over real sockets."""

import asyncio
import logging
import resource
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from server import cli_connections
from server.cli_connections import ImpatientProtocol, allow_many_connections, log_exhaustion_rarely

TIMEOUT_S = 0.3
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_connections, "HEAD_TIMEOUT_S", TIMEOUT_S)
    monkeypatch.setattr(cli_connections, "UNREAD_TIMEOUT_S", TIMEOUT_S)


@asynccontextmanager
async def serving(body_s: float = 0.0, body: bytes = b"ok", ended: asyncio.Event | None = None) -> AsyncIterator[int]:
    """The port of an app that takes so long to answer, and says when the answer is over."""

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await asyncio.sleep(body_s)
        length = str(len(body)).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        if ended is not None:
            ended.set()

    config = uvicorn.Config(app, port=0, http=ImpatientProtocol, lifespan="off", log_config=None, timeout_keep_alive=60)
    server = uvicorn.Server(config)
    running = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await running


async def closed_after(reader: asyncio.StreamReader) -> float:
    """Seconds until the server closes the connection."""
    start_s = time.monotonic()
    while await asyncio.wait_for(reader.read(1000), 10):
        pass
    return time.monotonic() - start_s


@pytest.mark.parametrize("head", [b"", REQUEST[:10]], ids=["silent", "half a head"])
async def test_a_connection_that_asks_for_nothing_is_closed(head: bytes) -> None:
    async with serving() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head)
        assert TIMEOUT_S / 2 < await closed_after(reader) < 5
        writer.close()


async def test_bytes_that_trickle_in_do_not_extend_the_time() -> None:
    async with serving() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        closed = asyncio.create_task(closed_after(reader))
        for byte in REQUEST:
            if closed.done():
                break
            writer.write(bytes([byte]))
            await asyncio.sleep(TIMEOUT_S / 10)
        assert await closed < 5
        writer.close()


async def test_an_answer_may_take_as_long_as_it_likes_and_the_next_request_comes_in_time() -> None:
    async with serving(body_s=3 * TIMEOUT_S) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            writer.write(REQUEST)
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(2) == b"ok"
        writer.write(REQUEST[:12])  # and half of a third
        assert TIMEOUT_S / 2 < await closed_after(reader) < 5
        writer.close()


LONG = bytes(16 * 2**20)  # more than the kernel's buffers take


async def test_an_answer_that_nobody_reads_is_given_up_and_its_connection_cut() -> None:
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    async with serving(body=LONG, ended=ended) as port:
        with socket.socket() as client:
            client.setblocking(False)
            await loop.sock_connect(client, ("127.0.0.1", port))
            await loop.sock_sendall(client, REQUEST)
            await asyncio.wait_for(ended.wait(), 10)
            received = 0
            while part := await loop.sock_recv(client, 2**20):  # What the kernel holds still comes.
                received += len(part)
            assert received < len(LONG)


async def test_a_slow_reader_gets_all_of_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_connections, "UNREAD_TIMEOUT_S", 2 * TIMEOUT_S)
    async with serving(body=LONG) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(REQUEST)
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(8):  # longer in all than the time for one part of it
            await asyncio.sleep(TIMEOUT_S / 2)
            await reader.readexactly(len(LONG) // 8)
        writer.close()


async def test_an_upgrade_that_is_not_served_is_ignored_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(REQUEST[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
        writer.close()
    assert caplog.text == ""


def test_the_limit_of_open_files_is_raised_as_far_as_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    changes: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: changes.append(limits))
    for limits in ((1024, 4096), (1024, resource.RLIM_INFINITY), (1024, 10**6), (4096, 4096), (10**5, 10**6)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=limits: limits)
        allow_many_connections()
    assert changes == [(4096, 4096), (65_536, resource.RLIM_INFINITY), (65_536, 10**6)]


async def test_exhaustion_is_said_once_and_other_problems_as_before(caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    try:
        log_exhaustion_rarely(loop)
        with caplog.at_level(logging.ERROR):
            for _ in range(1000):
                loop.call_exception_handler({"message": "socket.accept() out of system resource"})
            loop.call_exception_handler({"message": "something else"})
    finally:
        loop.set_exception_handler(before)
    assert [record.name for record in caplog.records] == ["server.cli_connections", "asyncio"]
    assert "open files" in caplog.text
