"""Requests to the Hub that come to an end: soon after their caller's check says so, whatever the Hub sends or does not.

The HTTP library bounds the wait for each piece of an answer and never their sum, headers included. So a call runs in a
thread of its own; when it is given up, its connections are shut down, which ends that thread too. The library would
also read whole bodies of redirects and errors: redirects are followed here, and bodies of errors are not read at all.
"""

import contextlib
import socket
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._headers import get_token_to_send
from huggingface_hub.utils._http import default_client_factory, hf_raise_for_status

from server.adapters.hub_retry import SLICE_S, CutShortError

if TYPE_CHECKING:
    from types import TracebackType

T = TypeVar("T")

HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""Base of the errors of the HTTP library that the client is built on: timeouts, connections that fail or break."""

MAX_REDIRECTS = 20
"""As the client has it."""

PIECE_BYTES = 64 * 1024
"""Most that one piece of a compressed body becomes at a time."""


class TooManyRedirectsError(OSError):
    """Redirects that do not end."""


class StorageError(HfHubHTTPError):
    """A status of failure of a host that the Hub has sent us to for content."""


class HubRequests:
    """The connections of one download, for one call at a time. Apart from huggingface_hub's own session, which all
    downloads share, but made as it makes that, with its hooks, proxies and tokens.
    """

    def __init__(self, *, token: str | None, timeout_s: float) -> None:
        """`timeout_s` bounds each wait for the Hub."""
        self._client = default_client_factory()
        self._token = token
        self._headers: dict[str, str] | None = None
        self._timeout_s = timeout_s
        self._streams: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: "TracebackType | None"
    ) -> None:
        self._client.close()

    def call(self, task: Callable[["HubCall"], T], check: Callable[[], object]) -> T:
        """What `task` gives or raises, or what `check` raises, which is asked several times a second meanwhile."""
        call = HubCall(self._client, self._own_headers, self._timeout_s, self._streams)
        outcome: Future[T] = Future()
        # A daemon: one that hangs in a name server or a disk does not keep the process from its end.
        threading.Thread(target=_settle, args=(outcome, task, call), name="hub-request", daemon=True).start()
        try:
            while not wait([outcome], timeout=SLICE_S).done:
                check()
        except BaseException:
            call.abandon()
            wait([outcome], timeout=SLICE_S)  # it should let go of its file before anybody is told
            raise
        return outcome.result()

    def _own_headers(self) -> Mapping[str, str]:
        """Made in the thread of a call, since the client may have to renew the token of a login first.

        Not the client's `build_hf_headers`: that asks the Hub for a list of agents, without a bound on time or size,
        keeps the answer on disk, and tells the Hub which of them the environment's variables speak of.
        """
        if self._headers is None:
            token = get_token_to_send(self._token)
            authorization = {} if token is None else {"authorization": f"Bearer {token}"}
            self._headers = {"user-agent": f"lora-mixer; hf_hub/{huggingface_hub.__version__}", **authorization}
        return self._headers


class HubCall:
    """What a call may do, in its thread."""

    def __init__(
        self, client: Any, headers: Callable[[], Mapping[str, str]], timeout_s: float, streams: list[Any]
    ) -> None:
        """`headers` gives those of every request; `streams` collects the connections as they are made, and later calls
        use them again.
        """
        self._client = client
        self._headers = headers
        self._timeout_s = timeout_s
        self._streams = streams
        self._is_abandoned = False

    @contextlib.contextmanager
    def open(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        follows: Callable[[str, str], bool] = lambda _origin, _target: True,
    ) -> Iterator[Any]:
        """The answer, its body still to be read, after redirects from one URL to another that `follows` agrees to.

        Raises HfHubHTTPError or a class below it for a status of failure, StorageError if it is not the Hub's,
        TooManyRedirectsError and HTTP_ERROR.
        """
        request = self._client.build_request(
            method,
            url,
            headers={**self._headers(), **headers},
            timeout=self._timeout_s,
            extensions={"trace": self._trace},
        )
        for _ in range(MAX_REDIRECTS + 1):
            with contextlib.closing(self._client.send(request, stream=True, follow_redirects=False)) as response:
                following = response.next_request
                if following is None or not follows(str(request.url), str(following.url)):
                    # By name alone: a mirror may send its clients from http to https.
                    hub_hosts = {host for _, host, _ in hub_origins(url)}
                    _raise_for_status(response, is_hubs=origin(str(request.url))[1] in hub_hosts)
                    yield response
                    return
            request = following
        raise TooManyRedirectsError(url)

    def pieces(self, response: Any) -> Iterator[bytes]:
        """The body as it arrives, decompressed. Raises CutShortError where it breaks off, ValueError where it cannot be
        decompressed, and HTTP_ERROR.
        """
        try:
            for piece in _decompressed(response.iter_raw(), encoding_of(response)):
                if self._is_abandoned:
                    raise CutShortError("given up")
                yield piece
        except HTTP_ERROR as error:
            if "Timeout" in type(error).__name__:
                raise
            raise CutShortError(type(error).__name__) from error

    def abandon(self) -> None:
        """Break off whatever it does. From another thread."""
        self._is_abandoned = True
        for stream in list(self._streams):
            _shut_down(stream)

    def _trace(self, _event: str, info: Mapping[str, Any]) -> None:
        """The HTTP library tells of every connection, and every TLS layer over one, before it waits for an answer."""
        if hasattr(stream := info.get("return_value"), "get_extra_info"):
            self._streams.append(stream)
            if self._is_abandoned:  # `abandon` may have been too early for this one
                _shut_down(stream)


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port: whom a request for the URL goes to, and whether others on the way can read it."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def hub_origins(url: str) -> frozenset[tuple[str, str | None, int | None]]:
    """Whose answers to a request for a URL of the Hub, or of a mirror, are the Hub's own."""
    return frozenset(map(origin, (url, constants.ENDPOINT, "https://huggingface.co")))


def encoding_of(response: Any) -> str:
    """How a body is compressed; empty: not at all."""
    encoding = str(response.headers.get("Content-Encoding", "")).strip().lower()
    return "" if encoding == "identity" else encoding


def _settle(outcome: "Future[T]", task: Callable[[HubCall], T], call: HubCall) -> None:
    try:
        outcome.set_result(task(call))
    except BaseException as error:  # Whatever it is, it belongs to whoever waits for the outcome.
        outcome.set_exception(error)


def _shut_down(stream: Any) -> None:
    """Wake up who waits for this connection, which closing it would not. TLS is passed over: it would want to talk."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(stream.get_extra_info("socket"), socket.SHUT_RDWR)


def _raise_for_status(response: Any, *, is_hubs: bool) -> None:
    """Raise what the client raises for a status of failure and its headers. It would also read the body, however large,
    for a text that nobody is shown.
    """
    if 300 <= response.status_code < 400 and response.next_request is None:
        raise ValueError("a redirect to nowhere")
    if response.status_code >= 400:
        about_body = ("content-encoding", "content-length", "transfer-encoding")
        headers = [(name, value) for name, value in response.headers.items() if name.lower() not in about_body]
        answer = type(response)(response.status_code, headers=headers, request=response.request)
        if not is_hubs:
            raise StorageError("not the Hub's", response=answer)
        hf_raise_for_status(answer)


def _decompressed(pieces: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """The HTTP library would make any amount of memory out of one piece."""
    if not encoding:
        yield from pieces
        return
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise ValueError("compressed in a way that was not asked for")
    inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS + 32)  # 32: gzip or zlib, as the first bytes say
    for piece in pieces:
        while not inflater.eof:
            try:
                plain = inflater.decompress(piece, PIECE_BYTES)
            except zlib.error as error:
                raise ValueError("not compressed as it says") from error
            if plain:
                yield plain
            piece = inflater.unconsumed_tail
            if not piece and len(plain) < PIECE_BYTES:
                break
        if inflater.eof:
            return
    raise CutShortError("the end of a compressed body is missing")
