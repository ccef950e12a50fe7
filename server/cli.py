"""The `lora-mixer` command: parser, exit codes, logging, and `serve`.

Exit status of every command: 0 done, 1 it failed, 2 wrong usage or configuration, 130 interrupted. Errors that we raise
on purpose are one message on stderr, never a traceback. Torch is imported only by commands that compute.
"""

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from server import __version__
from server.bench.command import add_bench_parser
from server.cli_adapters import add_adapters_parser
from server.cli_connections import HEAD_TIMEOUT_S, ImpatientProtocol, allow_many_connections, log_exhaustion_rarely
from server.cli_flags import HelpFormatter, add_config_flags, add_settings_flags, config_from
from server.config import ServerSettings, load_secrets
from server.errors import ConfigError, LoraMixerError

if TYPE_CHECKING:
    from server.api.services import Services

logger = logging.getLogger(__name__)

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130

LOG_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"

LAST_WORDS_S = 5
"""Seconds that connections get to take the end of their answers after the drain, before they are cut."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. argparse itself exits with 0 for --help and 2 for wrong usage."""
    arguments = build_parser().parse_args(argv)
    configure_logging("info")
    try:
        return int(arguments.run(arguments))
    except LoraMixerError as error:
        print(f"lora-mixer: {error.message}", file=sys.stderr)
        return WRONG_USAGE if isinstance(error, ConfigError) else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`, a function of the parsed arguments that returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="lora-mixer",
        description="Adapter-routing inference server: one frozen base model, many LoRA adapters, "
        "a router that picks per token and layer.",
    )
    parser.add_argument("--version", action="version", version=f"lora-mixer {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    serve = commands.add_parser(
        "serve",
        formatter_class=HelpFormatter,
        help="run the server",
        description="Loads model, adapters and router, then serves until SIGTERM or Ctrl-C. On either it refuses new "
        "requests, lets running ones finish (drain-timeout-s), and exits with 0; a second signal cuts them off.",
        epilog="Keys come from the environment: LORA_MIXER_API_KEYS (comma-separated; needed for every /v1 and "
        "tokenizer route when set) and LORA_MIXER_ADMIN_KEY (needed to change adapters or router; without it only this "
        "machine may). README.md lists the others.",
    )
    add_config_flags(serve)
    add_settings_flags(serve)
    serve.set_defaults(run=run_serve)
    add_adapters_parser(commands)
    add_bench_parser(commands)
    return parser


def run_serve(arguments: argparse.Namespace) -> int:
    """Serve until a signal. Raises ConfigError, ModelLoadError or RouterArtefactError if the start fails."""
    config = config_from(arguments)
    configure_logging(config.server.log_level)
    # Before the model is loaded: a port that is taken should not cost half a minute to find out.
    with bound_socket(config.server) as listener:
        from server.assembly import build_services, settle

        services = build_services(config, load_secrets())
        settle()
        return serve(services, listener)


def serve(services: "Services", listener: socket.socket) -> int:
    """Serve an app around `services` on a bound socket until SIGTERM or SIGINT."""
    from server.app import create_app

    config = uvicorn.Config(
        create_app(services),
        http=ImpatientProtocol,
        log_config=None,
        access_log=services.config.server.log_level == "debug",
        lifespan="on",
        ws="none",
        server_header=False,
        proxy_headers=False,  # Whoever connects is the client; `api/auth.py` judges forwarded requests itself.
        timeout_graceful_shutdown=LAST_WORDS_S,
        # At uvicorn's 5 s, httpx, and so OpenAI's client, gives idle connections up too: a request could meet the end.
        timeout_keep_alive=int(HEAD_TIMEOUT_S),
    )
    allow_many_connections()
    with _signals_ignored():
        _DrainingServer(config, services).run(sockets=[listener])
    return DONE


@contextlib.contextmanager
def _signals_ignored() -> Iterator[None]:
    """uvicorn handles the signals itself, but raises them again after its clean end; that must not kill us then."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _DrainingServer(uvicorn.Server):
    """Announces where it listens, and drains while it still listens, so that /ready can say so."""

    def __init__(self, config: uvicorn.Config, services: "Services") -> None:
        super().__init__(config)
        self._services = services

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Any signal after the first sets `force_exit`; uvicorn's own handler does so for SIGINT only."""
        super().handle_exit(signal.SIGINT if self.should_exit else sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        log_exhaustion_rarely(asyncio.get_running_loop())
        for listener in sockets or ():
            # What is left of our connections must not keep the next server from binding; see `bound_socket`.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            await super().startup(sockets)
        except OSError as error:  # Somebody began to listen there while the model was being loaded.
            raise ConfigError(f"cannot listen any more: {error.strerror or error}. Pass another --port.") from error
        for listener in sockets or ():
            with contextlib.suppress(OSError):  # A pipe that nobody reads or a full disk is no reason not to serve.
                print(f"listening on {url_of(listener)}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        from server.app import drain

        timeout_s = self._services.config.server.drain_timeout_s
        advice = "a second signal cuts them off at once"
        logger.info("stopping: no new requests; running ones get up to %g s to finish; %s", timeout_s, advice)
        for patience_s in (timeout_s, 0):  # A second signal ends the patience, a third does not wait for that either.
            draining = asyncio.create_task(drain(self._services, patience_s))
            self.force_exit = False
            while not draining.done() and not self.force_exit:
                await asyncio.wait([draining], timeout=0.1)
            if draining.done():
                break
            draining.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await draining
        await super().shutdown(sockets)


def bound_socket(settings: ServerSettings) -> socket.socket:
    """A TCP socket bound to host and port, not listening yet. Raises ConfigError if that is impossible."""
    where = f"{settings.host}:{settings.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on {where}: {error.strerror or error}") from error
    try:
        try:
            listener.bind(address)  # Alone: another server that is still loading its model holds the port as well.
        except OSError:  # Or do only connections of a server before linger there?
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {where}: {error.strerror or error}. Pass another --port, or 0 for any free one."
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """The address of a bound socket as a URL."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def configure_logging(level: str) -> None:
    """One line per record on stderr. Ours at `level`; libraries only what went wrong, unless `level` is debug."""
    logging.basicConfig(format=LOG_FORMAT, stream=sys.stderr)  # Does nothing the second time.
    logging.getLogger().setLevel(logging.ERROR if level == "error" else logging.WARNING)
    logging.getLogger("server").setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel(logging.INFO if level == "debug" else logging.NOTSET)
