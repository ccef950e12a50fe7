"""`lora-mixer adapters list`, `add` and `remove`: the HTTP calls against a running server, and how they are shown."""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from server.adapters.examples import MAX_FILE_BYTES, read_lines
from server.cli_flags import is_loopback_url, key_from_environment
from server.errors import ConfigError, LoraMixerError
from server.naming import printable

REQUEST_TIMEOUT_S = 60.0
"""No call of these takes long on the server: registration is only accepted, then watched."""

POLL_INTERVAL_S = 0.5
"""How often `add` asks how far a registration is."""

PENDING_STATES = frozenset({"DOWNLOADING", "VALIDATING"})
"""A registration in one of these goes on."""


class ServerRefusedError(LoraMixerError):
    """The server could not be reached or answered with an error; the message is the server's own."""


class AdapterClient:
    """The adapter routes of one server. Every method raises ServerRefusedError with the server's reasons."""

    def __init__(self, url: str, key: str | None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            # A proxy from the environment cannot reach this machine's own loopback.
            self._http = httpx.Client(
                base_url=url, headers=headers, timeout=REQUEST_TIMEOUT_S, trust_env=not is_loopback_url(url)
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise ConfigError(f"--url {url!r} is not a URL: {error}") from error
        if self._http.base_url.scheme not in ("http", "https") or not self._http.base_url.host:
            raise ConfigError(f"--url {url!r} must be http://HOST:PORT or https://HOST:PORT")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _t: type[BaseException] | None, _e: BaseException | None, _b: TracebackType | None) -> None:
        self._http.close()

    def list(self) -> Any:
        return self._call("GET", "/v1/adapters")

    def get(self, name: str) -> Any:
        return self._call("GET", _path_of(name))

    def register(self, body: Mapping[str, Any], *, replace: bool = False) -> Any:
        """With `replace`, other content under a registered name becomes its next generation."""
        is_known = replace and any(info["name"] == body["name"] for info in self.list()["data"])
        try:
            return self._call("POST", "/v1/adapters", json=body, headers={"If-Match": "*"} if is_known else {})
        except ServerRefusedError as error:
            raise ServerRefusedError(error.message.replace("send If-Match", "add --replace")) from error

    def retire(self, name: str) -> Any:
        return self._call("DELETE", _path_of(name))

    def _call(self, method: str, path: str, **content: Any) -> Any:
        try:
            response = self._http.request(method, path, **content)
        except httpx.HTTPError as error:
            raise ServerRefusedError(
                f"no answer from {self._http.base_url}: {error or type(error).__name__}. Is the server running there?"
            ) from error
        if response.is_success:
            return _json_of(response) if response.content else {}
        raise ServerRefusedError(_explain(response))


def run_list(arguments: argparse.Namespace) -> int:
    """Print every adapter of the server."""
    with _client(arguments) as client:
        listed = client.list()
    if arguments.json:
        print(json.dumps(listed, indent=2))
    else:
        print(table_of(listed["data"]))
    return 0


def run_add(arguments: argparse.Namespace) -> int:
    """Register one adapter; unless --no-wait, watch it until it is READY (0) or has FAILED (1)."""
    with _client(arguments) as client:
        info = client.register(_registration(arguments), replace=arguments.replace)
        if not arguments.no_wait:
            info = _watch(client, info, arguments.timeout, is_quiet=arguments.json)
    info = _newest(info)
    failed = info.get("state") == "FAILED"
    if arguments.json:
        print(json.dumps(info, indent=2))
    elif failed:
        reasons = _reason_lines(info.get("reasons")) or [f"  {_reason_of(info)}"]
        print("\n".join([f"{info['name']} cannot be served:", *reasons]))
    else:
        print(f"{info['name']}: {_state_of(info)}")
        if info.get("state") == "READY" and arguments.routed is not False and not info.get("routed"):
            print(f"  served by name only, not routed to: {_reason_of(info)}")
    return 1 if failed else 0


def run_remove(arguments: argparse.Namespace) -> int:
    """Retire one adapter."""
    with _client(arguments) as client:
        info = client.retire(arguments.name)
    in_words = f"{arguments.name}: retired; requests under way end undisturbed"
    print(json.dumps(info, indent=2) if arguments.json else in_words)
    return 0


def table_of(adapters: Sequence[Mapping[str, Any]]) -> str:
    """Adapter objects as an aligned table, and why each one that is not served or not routed is not."""
    if not adapters:
        return "no adapters"
    rows = [("NAME", "STATE", "ROUTED", "PLACE", "RANK", "SHARE", "MIB", "DIGEST", "SOURCE")]
    for info in adapters:
        share, num_bytes = info.get("traffic_share"), info.get("bytes")
        rows.append((
            str(info["name"]),
            str(info["state"]),
            "yes" if info.get("routed") else "no",
            _place_of(info),
            "-" if info.get("rank") is None else str(info["rank"]),
            "-" if share is None else f"{100 * share:.1f}%",
            "-" if not num_bytes else f"{num_bytes / 2**20:.1f}",
            (info.get("digest") or "-")[:12],
            printable(_source_of(info)),
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"{info['name']}: {_reason_of(info)}" for info in adapters if info.get("reason")]
    return "\n".join(lines)


def _client(arguments: argparse.Namespace) -> AdapterClient:
    return AdapterClient(arguments.url, arguments.admin_key or key_from_environment())


def _registration(arguments: argparse.Namespace) -> dict[str, Any]:
    source = arguments.source
    examples = None if arguments.examples is None else read_lines(arguments.examples, MAX_FILE_BYTES)
    if examples == []:
        raise ConfigError(f"--examples {arguments.examples} holds no examples, one JSON value a line")
    if is_loopback_url(arguments.url) and Path(source).is_dir():
        source = str(Path(source).resolve())  # The server's working folder is another one.
    body = {
        "name": arguments.name,
        "source": source,
        "revision": arguments.revision,
        "subfolder": arguments.subfolder,
        "routed": arguments.routed,
        "examples": examples,
        "pinned": True if arguments.pinned else None,
        "max_gate_share": arguments.max_gate_share,
        "description": arguments.description,
    }
    return {key: value for key, value in body.items() if value is not None}


def _watch(client: AdapterClient, info: Any, timeout_s: float, *, is_quiet: bool) -> Any:
    """Poll until the registration has ended; prints a line whenever something changed."""
    deadline_s = time.monotonic() + timeout_s
    shown = ""
    while _newest(info).get("state") in PENDING_STATES:
        if (state := _state_of(_newest(info))) != shown and not is_quiet:
            print(f"{info['name']}: {state}", flush=True)
            shown = state
        if time.monotonic() > deadline_s:
            raise ServerRefusedError(
                f"{info['name']} is still {state} after {timeout_s:g} s. It goes on: "
                "watch it with `lora-mixer adapters list`."
            )
        time.sleep(POLL_INTERVAL_S)
        info = client.get(info["name"])
    return info


def _newest(info: Any) -> Any:
    """The generation that a registration is about: the one that loads, or failed to, if there is one."""
    return info.get("replacement") or info


def _state_of(info: Mapping[str, Any]) -> str:
    progress = info.get("progress")
    is_measured = info.get("state") == "DOWNLOADING" and isinstance(progress, int | float)
    return f"{info.get('state')}{f' {100 * progress:.0f}%' if is_measured else ''}"  # type: ignore[operator]


def _reason_of(info: Mapping[str, Any]) -> str:
    """On one line, with nothing in it that a terminal obeys: sources and foreign files speak through it."""
    return printable(str(info.get("reason") or "no reason given"))


def _place_of(info: Mapping[str, Any]) -> str:
    """Where its weights are; pinned ones are in memory to stay."""
    if info.get("resident"):
        return "pinned" if info.get("pinned") else "memory"
    return "disk" if info.get("state") == "READY" else "-"


def _source_of(info: Mapping[str, Any]) -> str:
    revision, subfolder = info.get("revision"), info.get("subfolder")
    source = f"{info.get('source') or '-'}{f'/{subfolder}' if subfolder else ''}"
    return f"{source}@{revision[:12]}" if revision else source


def _path_of(name: str) -> str:
    if not name or any(character in "/?#%" or character.isspace() for character in name):
        raise ConfigError(f"{name!r} is not the name of an adapter")
    return f"/v1/adapters/{name}"


def _json_of(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError as error:
        raise ServerRefusedError(f"{response.url} answered, but not with JSON; is it this server?") from error


def _explain(response: httpx.Response) -> str:
    """The server's message; with reasons, those line by line instead of its one-line summary of them."""
    try:
        error = response.json()["error"]
        message, code, reasons = error["message"], error.get("code"), _reason_lines(error.get("reasons"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{response.url} answered {response.status_code} {response.reason_phrase}"
    summary = f"the server refused ({response.status_code} {code})"
    return "\n".join([f"{summary}:", *reasons]) if reasons else f"{summary}: {printable(str(message))}"


def _reason_lines(reasons: Any) -> "list[str]":
    lines = [f"[{reason['code']}] {reason['message']} ({reason['where']})" for reason in reasons or ()]
    return [f"  {printable(line)}" for line in lines]
