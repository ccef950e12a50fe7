"""The HTTP side of `adapters` against scripted answers: progress, refusals, keys, and servers that are no servers."""

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from server import cli, cli_client
from server.cli_flags import is_loopback_url
from tests.cli_isolation import isolated_cli


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with isolated_cli(monkeypatch):
        yield


class StubServer:
    """Answers (method, path) with scripted (status, content) pairs, the last one over and over; notes what it got."""

    def __init__(self) -> None:
        self.script: dict[tuple[str, str], list[tuple[int, Any]]] = {}
        self.seen: list[tuple[str, str, Any]] = []
        self.keys: list[str | None] = []
        self.guards: list[str | None] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                stub.seen.append((self.command, self.path, body))
                stub.keys.append(self.headers.get("Authorization"))
                stub.guards.append(self.headers.get("If-Match"))
                answers = stub.script[self.command, self.path]
                status, content = answers.pop(0) if len(answers) > 1 else answers[0]
                data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = answer  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "StubServer":
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class TestAgainstAStub:
    """What a fake registry cannot script: progress, refusals after the fact, keys, servers that are no servers."""

    @pytest.fixture
    def stub(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubServer]:
        monkeypatch.setattr(cli_client, "POLL_INTERVAL_S", 0.001)
        with StubServer() as stub:
            yield stub

    def add(self, stub: StubServer, *flags: str) -> int:
        return cli.main(["adapters", "add", "new", "org/new", "--url", stub.url, *flags])

    def test_add_shows_progress_until_ready(self, stub: StubServer, capsys: pytest.CaptureFixture[str]) -> None:
        stub.script["POST", "/v1/adapters"] = [(202, {"name": "new", "state": "DOWNLOADING", "progress": 0.0})]
        stub.script["GET", "/v1/adapters/new"] = [
            (200, {"name": "new", "state": "DOWNLOADING", "progress": 0.0}),
            (200, {"name": "new", "state": "DOWNLOADING", "progress": 0.5}),
            (200, {"name": "new", "state": "VALIDATING", "progress": 1.0}),
            (200, {"name": "new", "state": "READY", "progress": 1.0, "routed": True}),
        ]
        assert self.add(stub) == 0
        assert capsys.readouterr().out.splitlines() == [
            "new: DOWNLOADING 0%",
            "new: DOWNLOADING 50%",
            "new: VALIDATING",
            "new: READY",
        ]
        assert stub.seen[0] == ("POST", "/v1/adapters", {"name": "new", "source": "org/new"})

    def test_add_says_why_an_adapter_is_not_routed_to(
        self, stub: StubServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        info = {"name": "new", "state": "READY", "routed": False, "reason": "the canary check failed"}
        stub.script["POST", "/v1/adapters"] = [(201, info)]
        assert self.add(stub) == 0
        assert "served by name only, not routed to: the canary check failed" in capsys.readouterr().out

    def test_a_registration_that_fails_later_exits_with_1_and_every_reason(
        self, stub: StubServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        reasons = [{"code": c, "message": f"because of {c}", "where": "adapter_config.json"} for c in ("dora", "bias")]
        stub.script["POST", "/v1/adapters"] = [(202, {"name": "new", "state": "VALIDATING"})]
        stub.script["GET", "/v1/adapters/new"] = [(200, {"name": "new", "state": "FAILED", "reasons": reasons})]
        assert self.add(stub) == 1
        assert capsys.readouterr().out.splitlines()[1:] == [
            "new cannot be served:",
            "  [dora] because of dora (adapter_config.json)",
            "  [bias] because of bias (adapter_config.json)",
        ]

    @pytest.mark.parametrize("is_sound", [True, False])
    def test_add_watches_a_replacement_to_its_end(
        self, is_sound: bool, stub: StubServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        served = {"name": "new", "state": "READY", "routed": True, "generation": 1}
        pending = {"name": "new", "state": "DOWNLOADING", "progress": 0.5, "generation": 2}
        failed = {**pending, "state": "FAILED", "reason": "no such file"}
        after = {**served, "generation": 2} if is_sound else {**served, "replacement": failed}
        stub.script = {
            ("GET", "/v1/adapters"): [(200, {"data": [served]})],
            ("POST", "/v1/adapters"): [(202, {**served, "replacement": pending})],
            ("GET", "/v1/adapters/new"): [(200, {**served, "replacement": pending}), (200, after)],
        }
        assert self.add(stub, "--replace") == (0 if is_sound else 1)
        assert stub.guards[:2] == [None, "*"]
        output = capsys.readouterr().out
        assert "DOWNLOADING 50%" in output
        assert ("new: READY" if is_sound else "no such file") in output

    def test_replacing_a_name_that_is_free_is_an_ordinary_registration(self, stub: StubServer) -> None:
        stub.script = {
            ("GET", "/v1/adapters"): [(200, {"data": []})],
            ("POST", "/v1/adapters"): [(201, {"name": "new", "state": "READY", "routed": True})],
        }
        assert self.add(stub, "--replace") == 0
        assert stub.guards == [None, None]

    def test_examples_and_routing_are_sent(self, stub: StubServer, tmp_path: Path) -> None:
        stub.script["POST", "/v1/adapters"] = [(201, {"name": "new", "state": "READY", "routed": True})]
        path = tmp_path / "examples.jsonl"
        path.write_text('"one"\n\n{"prompt": "two"}\n', encoding="utf-8")
        assert self.add(stub, "--routed", "--examples", str(path)) == 0
        assert self.add(stub, "--not-routed") == 0
        assert self.add(stub) == 0
        bodies = [body for method, _, body in stub.seen if method == "POST"]
        assert [body.get("routed") for body in bodies] == [True, False, None]
        assert [body.get("examples") for body in bodies] == [["one", {"prompt": "two"}], None, None]

    def test_examples_that_cannot_be_read_are_refused_before_anything_is_sent(
        self, stub: StubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "examples.jsonl"
        path.write_text('"one"\n{\n', encoding="utf-8")
        assert self.add(stub, "--examples", str(path)) == 1
        assert "examples.jsonl, line 2 is not JSON" in capsys.readouterr().err
        assert not stub.seen

    def test_a_refusal_prints_every_reason(self, stub: StubServer, capsys: pytest.CaptureFixture[str]) -> None:
        error = {
            "message": "adapter 'new' cannot be served: [dora] no (here); [bias] no (there)",
            "code": "adapter_refused",
            "reasons": [
                {"code": "dora", "message": "no", "where": "here"},
                {"code": "bias", "message": "no", "where": "there"},
            ],
        }
        stub.script["POST", "/v1/adapters"] = [(422, {"error": error})]
        assert self.add(stub) == 1
        assert capsys.readouterr().err.splitlines() == [
            "lora-mixer: the server refused (422 adapter_refused):",
            "  [dora] no (here)",
            "  [bias] no (there)",
        ]

    def test_add_gives_up_after_its_timeout(self, stub: StubServer, capsys: pytest.CaptureFixture[str]) -> None:
        stub.script["POST", "/v1/adapters"] = [(202, {"name": "new", "state": "VALIDATING"})]
        stub.script["GET", "/v1/adapters/new"] = [(200, {"name": "new", "state": "VALIDATING"})]
        assert self.add(stub, "--timeout", "0.01") == 1
        assert "new is still VALIDATING after 0.01 s" in capsys.readouterr().err

    def test_json_output_is_json_alone(self, stub: StubServer, capsys: pytest.CaptureFixture[str]) -> None:
        stub.script["POST", "/v1/adapters"] = [(202, {"name": "new", "state": "VALIDATING"})]
        stub.script["GET", "/v1/adapters/new"] = [(200, {"name": "new", "state": "READY"})]
        assert self.add(stub, "--json") == 0
        assert json.loads(capsys.readouterr().out) == {"name": "new", "state": "READY"}

    @pytest.mark.parametrize(
        ("environment", "flags", "sent"),
        [
            ({}, (), None),
            ({"LORA_MIXER_API_KEYS": "one,two"}, (), "Bearer one"),
            ({"LORA_MIXER_API_KEYS": "one", "LORA_MIXER_ADMIN_KEY": "boss"}, (), "Bearer boss"),
            ({"LORA_MIXER_ADMIN_KEY": "boss"}, ("--admin-key", "given"), "Bearer given"),
        ],
        ids=["none", "api-key", "admin-key", "flag"],
    )
    def test_the_best_key_is_sent(
        self,
        stub: StubServer,
        monkeypatch: pytest.MonkeyPatch,
        environment: dict[str, str],
        flags: tuple[str, ...],
        sent: str | None,
    ) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        stub.script["GET", "/v1/adapters"] = [(200, {"data": []})]
        assert cli.main(["adapters", "list", "--url", stub.url, *flags]) == 0
        assert stub.keys == [sent]

    def test_an_answer_that_is_not_ours_is_told_as_it_is(
        self, stub: StubServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stub.script["GET", "/v1/adapters"] = [(502, "<html>bad gateway"), (200, "<html>hello")]
        assert cli.main(["adapters", "list", "--url", stub.url]) == 1
        assert "answered 502 Bad Gateway" in capsys.readouterr().err
        assert cli.main(["adapters", "list", "--url", stub.url]) == 1
        assert "not with JSON" in capsys.readouterr().err

    def test_a_server_that_is_not_there_is_told(self, capsys: pytest.CaptureFixture[str]) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{unused.getsockname()[1]}"
            assert cli.main(["adapters", "list", "--url", url]) == 1
        assert "Is the server running there?" in capsys.readouterr().err

    @pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://x:y"])
    def test_a_bad_url_is_wrong_usage(self, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["adapters", "list", "--url", url]) == 2
        assert "--url" in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["a/b", "a?b", "", "a b", "%2e"])
    def test_a_name_that_would_change_the_route_is_refused(self, name: str) -> None:
        assert cli.main(["adapters", "remove", name, "--url", "http://127.0.0.1:9"]) == 2

    def test_no_adapters_is_said_in_words(self, stub: StubServer, capsys: pytest.CaptureFixture[str]) -> None:
        stub.script["GET", "/v1/adapters"] = [(200, {"data": []})]
        assert cli.main(["adapters", "list", "--url", stub.url]) == 0
        assert capsys.readouterr().out == "no adapters\n"

    def test_the_table_shows_shares_revisions_and_reasons(self) -> None:
        info = {
            "name": "a", "state": "FAILED", "routed": False, "rank": None, "traffic_share": 0.125, "bytes": 3 * 2**20,
            "digest": None, "source": "org/a", "revision": "c" * 40, "subfolder": "x", "reason": "it is damaged",
        }  # fmt: skip
        lines = cli_client.table_of([info]).splitlines()
        assert lines[1].split() == ["a", "FAILED", "no", "-", "-", "12.5%", "3.0", "-", f"org/a/x@{'c' * 12}"]
        assert lines[2] == "a: it is damaged"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://localhost", True),
        ("http://[::1]:1", True),
        ("http://10.0.0.1", False),
        ("http://127.0.0.1.example.org", False),
        ("nonsense", False),
    ],
)
def test_loopback_urls_are_told_apart(url: str, expected: bool) -> None:
    assert is_loopback_url(url) is expected


def test_texts_of_the_server_cannot_act_on_the_terminal() -> None:
    evil = "\x1b[2J\u202e\nREADY"
    info = {"name": "a", "state": "FAILED", "source": f"org/{evil}", "reason": evil}
    assert all(line.isprintable() for line in cli_client.table_of([info]).splitlines())
    assert len(cli_client.table_of([info]).splitlines()) == 3
