"""Adapters and the router over HTTP: statuses, what may be named, vLLM's payloads."""

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.adapters.records import AdapterInfo, AdapterState
from server.errors import (
    LoraMixerError,
    PreconditionFailedError,
    RefusalReason,
    RegistryFileError,
    TooManyRegistrationsError,
)
from tests.api.fakes import BASE_NAME, Harness, ready_info

REASONS = (
    RefusalReason("rank_too_large", "rank 4096 is above 512", "adapter_config.json: r"),
    RefusalReason("dora", "DoRA is not supported", "adapter_config.json: use_dora"),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """root/{adapters/one, router, escape -> outside, inside -> adapters/one} next to outside/."""
    top = tmp_path_factory.mktemp("files")
    (top / "root/adapters/one/sub").mkdir(parents=True)
    (top / "root/router").mkdir()
    (top / "root/router/router.json").write_text("{}")
    (top / "root/file").write_text("")
    (top / "outside/deep").mkdir(parents=True)
    (top / "root/escape").symlink_to(top / "outside")
    (top / "root/adapters/one/out").symlink_to(top / "outside")
    (top / "root/inside").symlink_to(top / "root/adapters/one")
    (top / "root/loop").symlink_to(top / "root/loop")
    return top


@pytest.fixture(scope="module")
def _rooted(folders: Path) -> Iterator[tuple[Harness, httpx.Client]]:
    harness = Harness(root=folders / "root")
    with harness.serve() as client:
        yield harness, client


@pytest.fixture
def rooted(_rooted: tuple[Harness, httpx.Client]) -> tuple[Harness, httpx.Client]:
    """A server whose adapter root is `folders/root`."""
    _rooted[0].reset()
    return _rooted


def failed(code: str, **fields: Any) -> AdapterInfo:
    return AdapterInfo("bad", AdapterState.FAILED, "org/bad", reason="why it failed", code=code, **fields)


@pytest.mark.parametrize("path", ["/v1/adapters", "/v1/models"])
def test_long_lists_are_not_made_on_the_event_loop(
    rooted: tuple[Harness, httpx.Client], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Streams would stand still while a thousand adapters are listed."""
    harness, client = rooted
    has_loop = []
    usual = harness.registry.list

    def listing() -> list[AdapterInfo]:
        has_loop.append(asyncio._get_running_loop() is not None)
        return usual()

    monkeypatch.setattr(harness.registry, "list", listing)
    assert client.get(path).status_code == 200
    assert has_loop == [False]


def test_list_and_get_show_adapter_objects(client: httpx.Client) -> None:
    listed = client.get("/v1/adapters").json()
    assert listed["object"] == "list"
    assert [adapter["name"] for adapter in listed["data"]] == ["gsm8k", "mbpp", "sst2"]
    adapter = client.get("/v1/adapters/mbpp").json()
    assert adapter == listed["data"][1]
    assert adapter.keys() >= {
        "name", "state", "source", "revision", "digest", "rank", "targets", "routed", "reason", "bytes", "progress",
        "traffic_share", "generation",
    }  # fmt: skip


def test_unknown_adapter_is_404(client: httpx.Client) -> None:
    for response in (client.get("/v1/adapters/nobody"), client.delete("/v1/adapters/nobody")):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "adapter_not_found"


def test_registration_is_202_at_once_and_201_when_waited_for(client: httpx.Client, harness: Harness) -> None:
    body = {
        "name": "new",
        "source": "org/new",
        "revision": "main",
        "subfolder": "a/b",
        "routed": False,
        "pinned": True,
        "max_gate_share": 0.5,
        "description": "d",
    }
    response = client.post("/v1/adapters", json=body)
    assert (response.status_code, response.json()["state"]) == (202, "DOWNLOADING")
    response = client.post("/v1/adapters", json={**body, "wait": True})
    assert (response.status_code, response.json()["state"]) == (201, "READY")
    assert harness.registry.registered[0].model_dump() == body


@pytest.mark.parametrize("value", [0, -0.1, 1.01, "half", True, "nan"])
def test_a_cap_that_is_no_share_is_refused(value: object, client: httpx.Client) -> None:
    response = client.post("/v1/adapters", json={"name": "new", "source": "org/new", "max_gate_share": value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "max_gate_share"


def test_new_adapter_is_a_model_at_once(client: httpx.Client) -> None:
    client.post("/v1/adapters", json={"name": "new", "source": "org/new", "wait": True})
    assert client.get("/v1/models/new").json()["root"] == "org/new"
    assert client.post("/v1/completions", json={"model": "new", "prompt": "x"}).json()["model"] == "new"
    assert client.delete("/v1/adapters/new").json()["state"] == "RETIRING"
    assert client.get("/v1/models/new").status_code == 404


def test_refused_adapter_is_422_with_every_reason(client: httpx.Client, harness: Harness) -> None:
    harness.registry.settles_as = failed("adapter_refused", reasons=REASONS)
    response = client.post("/v1/adapters", json={"name": "bad", "source": "org/bad", "wait": True})
    assert response.status_code == 422
    error = response.json()["error"]
    assert error["code"] == "adapter_refused"
    assert error["reasons"] == [dataclasses.asdict(reason) for reason in REASONS]
    assert "rank 4096" in error["message"]


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        ("adapter_download_failed", 502, "why it failed"),
        ("registry_not_writable", 507, "why it failed"),
        ("invalid_request", 400, "why it failed"),
        ("internal_error", 500, "The server failed on this request"),
    ],
)
def test_registration_that_fails_otherwise_keeps_its_own_code(
    client: httpx.Client, harness: Harness, code: str, status: int, words: str
) -> None:
    harness.registry.settles_as = failed(code)
    response = client.post("/v1/adapters", json={"name": "bad", "source": "org/bad", "wait": True})
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert words in response.json()["error"]["message"]


def test_name_with_other_content_is_409(client: httpx.Client) -> None:
    response = client.post("/v1/adapters", json={"name": "gsm8k", "source": "org/other"})
    assert (response.status_code, response.json()["error"]["code"]) == (409, "adapter_conflict")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"name": None}, "name", "is required"),
        ({"name": "a/b"}, "name", "must match"),
        ({"name": "-x"}, "name", "must match"),
        ({"name": "x" * 97}, "name", "must match"),
        ({"name": "auto"}, "name", "is reserved"),
        ({"name": "base"}, "name", "is reserved"),
        ({"name": "AUT0"}, "name", "is reserved"),
        ({"name": "smollm2-135m_instruct"}, "name", "is reserved"),
        ({"name": "gsm8k\n"}, "name", "must match"),
        ({"name": "\u0430uto"}, "name", "must match"),
        ({"name": "gsm8k\u200b"}, "name", "must match"),
        ({"name": "\uff47sm8k"}, "name", "must match"),
        ({"name": ".."}, "name", "must match"),
        ({"source": ""}, "source", "at least 1 characters"),
        ({"source": "x" * 1025}, "source", "at most 1024 characters"),
        ({"source": "a\0b"}, "source", "not a path or Hub id"),
        ({"examples": ["one"]}, "examples", "1 examples; give 2 to 64"),
        ({"examples": ["x"] * 65}, "examples", "at most 64 entries"),
        ({"examples": ["x", {"text": "x"}]}, "examples", "examples[1] must be a prompt"),
        ({"wait": 1}, "wait", "must be true or false"),
        ({"routed": "no"}, "routed", "must be true or false"),
        ({"subfolder": "../x"}, "subfolder", "relative path"),
        ({"path": "x"}, "path", "is not a known field"),
    ],
)
def test_bad_registrations_are_refused_by_name(
    client: httpx.Client, harness: Harness, fields: dict[str, Any], param: str, words: str
) -> None:
    response = client.post("/v1/adapters", json={"name": "new", "source": "org/new", **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert words in response.json()["error"]["message"]
    assert not harness.registry.registered


@pytest.mark.parametrize("source", ["adapters/one", "./adapters/one", "inside", "adapters/../adapters/one"])
def test_folders_below_the_root_are_passed_on_resolved(
    rooted: tuple[Harness, httpx.Client], folders: Path, source: str
) -> None:
    harness, client = rooted
    for spelled in (source, str(folders / "root" / source)):
        assert client.post("/v1/adapters", json={"name": "local", "source": spelled}).status_code == 202
        assert harness.registry.registered[-1].source == str(folders / "root/adapters/one")


@pytest.mark.parametrize(
    "fields",
    [
        {"source": "/etc"},
        {"source": "/no/such/folder"},
        {"source": "../outside"},
        {"source": "escape"},
        {"source": "escape/deep"},
        {"source": "~"},
        {"source": "~root/x"},
        {"source": "~nobody-of-that-name/x"},
        {"source": "adapters/../../outside"},
    ],
)
def test_folders_outside_the_root_are_403_whether_they_exist_or_not(
    rooted: tuple[Harness, httpx.Client], fields: dict[str, str]
) -> None:
    harness, client = rooted
    for response in (
        client.post("/v1/adapters", json={"name": "local", **fields}),
        client.post("/v1/load_lora_adapter", json={"lora_name": "local", "lora_path": fields["source"]}),
        client.post("/v1/router", json={"path": fields["source"]}),
    ):
        assert response.status_code == 403
        assert "outside the adapter roots" in response.json()["error"]["message"]
    assert not harness.registry.registered


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"source": "./nothing"}, 400),
        ({"source": "file"}, 400),
        ({"source": "adapters/one", "subfolder": "out"}, 400),
        ({"source": "adapters/one", "revision": "main"}, 400),
        ({"source": "adapters/one", "subfolder": "sub"}, 202),
        ({"source": "loop"}, 400),
        ({"source": "adapters/" + "x" * 300}, 400),
        ({"source": "adapters/nothing"}, 202),  # looks like a Hub id
    ],
)
def test_folders_below_the_root_must_exist(
    rooted: tuple[Harness, httpx.Client], fields: dict[str, str], status: int
) -> None:
    assert rooted[1].post("/v1/adapters", json={"name": "local", **fields}).status_code == status


@pytest.mark.parametrize("revision", ["main", "0" * 40, "refs/pr/1", "a@b", "x" * 500])
def test_a_source_may_name_its_revision(rooted: tuple[Harness, httpx.Client], revision: str) -> None:
    harness, client = rooted
    apart = {"name": "a", "source": "org/name", "revision": revision}
    together = {"name": "a", "source": f"org/name@{revision}"}
    for body in (apart, together, {**together, "revision": revision}):
        assert client.post("/v1/adapters", json=body).status_code == 202
    vllm = {"lora_name": "a", "lora_path": together["source"]}
    assert client.post("/v1/load_lora_adapter", json=vllm).status_code == 200
    first, *others = harness.registry.registered
    assert (first.source, first.revision) == ("org/name", revision)
    assert others == [first] * 3


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"source": "org/name@main", "revision": "dev"}, "revision", "names revision 'main', `revision` is 'dev'"),
        ({"source": "org/name@"}, "revision", "names no revision"),
        ({"source": "adapters/one@main"}, "revision", "revision is for Hub sources"),
        ({"source": "hf://org/name"}, "source", "name a repository of the Hub as org/name"),
        ({"source": "https://huggingface.co/org/name"}, "source", "is a URL, and none is ever opened"),
    ],
)
def test_sources_that_contradict_themselves_or_name_a_host_are_400(
    rooted: tuple[Harness, httpx.Client], fields: dict[str, str], param: str, message: str
) -> None:
    harness, client = rooted
    response = client.post("/v1/adapters", json={"name": "a", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert message in response.json()["error"]["message"]
    assert not harness.registry.registered


def test_a_folder_that_is_named_like_a_revision_is_a_folder_where_it_may_be_named(tmp_path: Path) -> None:
    (tmp_path / "org/name@main").mkdir(parents=True)
    (tmp_path / "open").mkdir()
    for root, expected in ((".", (str(tmp_path / "org/name@main"), None)), ("open", ("org/name", "main"))):
        harness = Harness(root=tmp_path, adapter_roots=(root,))
        with harness.serve() as client:
            assert client.post("/v1/adapters", json={"name": "a", "source": "org/name@main"}).status_code == 202
        assert [(spec.source, spec.revision) for spec in harness.registry.registered] == [expected]


def test_further_adapter_roots_open_further_folders(folders: Path) -> None:
    harness = Harness(root=folders / "root", adapter_roots=("../outside",))
    with harness.serve() as client:
        assert client.post("/v1/adapters", json={"name": "a", "source": "../outside/deep"}).status_code == 202
        assert client.post("/v1/adapters", json={"name": "b", "source": "adapters/one"}).status_code == 403


def test_a_root_that_is_not_there_is_told_at_the_start(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Harness(root=folders / "root", adapter_roots=("adapters", "nothing", "file")).serve():
        pass
    warned = [record.getMessage() for record in caplog.records if "adapter root" in record.getMessage()]
    assert [message.split()[3] for message in warned] == [str(folders / "root" / name) for name in ("nothing", "file")]


def test_guards_travel_as_if_match_and_etag(client: httpx.Client, harness: Harness) -> None:
    etag = client.get("/v1/adapters/gsm8k").headers["ETag"]
    assert etag == client.get("/v1/adapters/gsm8k").json()["etag"] == '"1-dddddddddddddddd"'
    body = {"name": "gsm8k", "source": "org/adapter"}
    client.post("/v1/adapters", json=body, headers={"If-Match": f'"1-0", {etag}'})
    assert harness.registry.expected == ('"1-0"', etag)
    client.post("/v1/adapters", json=body)
    assert harness.registry.expected is None
    client.delete("/v1/adapters/gsm8k", headers={"If-Match": "*"})
    assert harness.registry.expected == ("*",)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (PreconditionFailedError("changed meanwhile"), 412, "precondition_failed"),
        (TooManyRegistrationsError("32 are loading", retry_after_s=5), 429, "too_many_registrations"),
        (RegistryFileError("disk full"), 507, "registry_not_writable"),
    ],
)
def test_registrations_that_may_not_be_made_now_have_their_statuses(
    client: httpx.Client, harness: Harness, error: LoraMixerError, status: int, code: str
) -> None:
    harness.registry.fails_with = error
    response = client.post("/v1/adapters", json={"name": "new", "source": "org/new"})
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.headers.get("Retry-After") == ("5" if status == 429 else None)


def test_a_replacement_is_202_until_it_is_ready_and_its_failure_is_told(client: httpx.Client, harness: Harness) -> None:
    loading = AdapterInfo("gsm8k", AdapterState.DOWNLOADING, "org/other", generation=2)
    harness.registry.infos["gsm8k"] = ready_info("gsm8k", replacement=loading)
    body = {"name": "gsm8k", "source": "org/adapter"}
    response = client.post("/v1/adapters", json=body, headers={"If-Match": "*"})
    assert (response.status_code, response.json()["state"]) == (202, "READY")
    assert response.json()["replacement"]["generation"] == 2
    refused = dataclasses.replace(failed("adapter_refused", reasons=REASONS), name="gsm8k")
    harness.registry.settles_as = ready_info("gsm8k", replacement=refused)
    response = client.post("/v1/adapters", json={**body, "wait": True}, headers={"If-Match": "*"})
    assert (response.status_code, response.json()["error"]["code"]) == (422, "adapter_refused")


def test_vllms_load_in_place_replaces(client: httpx.Client, harness: Harness) -> None:
    body = {"lora_name": "gsm8k", "lora_path": "org/adapter", "load_inplace": True}
    assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
    assert harness.registry.expected == ("*",)
    assert client.post("/v1/load_lora_adapter", json={**body, "lora_name": "new"}).status_code == 200
    assert harness.registry.expected is None


def test_vllms_load_and_unload(client: httpx.Client, harness: Harness) -> None:
    response = client.post("/v1/load_lora_adapter", json={"lora_name": "new", "lora_path": "org/new"})
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'new' added successfully.")
    assert harness.registry.get("new").state == "READY"
    response = client.post("/v1/unload_lora_adapter", json={"lora_name": "new", "lora_int_id": 3})
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'new' removed successfully.")
    response = client.post("/v1/unload_lora_adapter", json={"lora_name": "nobody"})
    assert (response.status_code, response.json()["error"]["param"]) == (404, "lora_name")


def test_vllms_load_claims_no_success_before_there_is_one(
    client: httpx.Client, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.api.adapters.WAIT_LIMIT_S", 0.01)
    harness.registry.settles_as = dataclasses.replace(ready_info("new"), state=AdapterState.DOWNLOADING)
    response = client.post("/v1/load_lora_adapter", json={"lora_name": "new", "lora_path": "org/new"})
    assert response.status_code == 202
    assert response.text == "LoRA adapter 'new' is still DOWNLOADING; GET /v1/adapters/new tells when it serves."


def test_vllms_load_tells_refusals_too(client: httpx.Client, harness: Harness) -> None:
    harness.registry.settles_as = failed("adapter_refused", reasons=REASONS)
    response = client.post("/v1/load_lora_adapter", json={"lora_name": "bad", "lora_path": "org/bad"})
    assert (response.status_code, response.json()["error"]["code"]) == (422, "adapter_refused")
    for name, path, param in (
        ("a b", "", "lora_name"),
        ("auto", "org/new", "lora_name"),
        ("gsm8k", "org/other", "lora_name"),
        ("new", "https://host/x", "lora_path"),
    ):
        response = client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})
        assert (response.json()["error"]["param"], name) == (param, name)


def test_models_list_what_model_may_be(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["auto", BASE_NAME, "gsm8k", "mbpp", "sst2"]
    assert listed["data"][1] == {
        "id": BASE_NAME,
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "lora-mixer",
        "root": BASE_NAME,
        "parent": None,
        "max_model_len": 512,
    }
    adapter = client.get("/v1/models/gsm8k").json()
    assert (adapter["parent"], adapter["root"]) == (BASE_NAME, "org/adapter")
    assert client.get(f"/v1/models/{BASE_NAME}").json() == listed["data"][1]
    assert client.get("/v1/models/no/body").json()["error"]["code"] == "model_not_found"


def test_router_facts_and_hot_swap(rooted: tuple[Harness, httpx.Client], folders: Path) -> None:
    harness, client = rooted
    assert client.get("/v1/router").json()["generation"] == 3
    assert client.post("/v1/router", json={"path": "router"}).json()["generation"] == 4
    assert harness.registry.router_folders == [folders / "root/router"]


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("adapters", 422, "router_refused"),
        ("nothing", 400, "invalid_request"),
        ("file", 400, "invalid_request"),
        ("loop", 400, "invalid_request"),
        ("a\0b", 400, "invalid_request"),
        ("x" * 300, 400, "invalid_request"),
        ("", 400, "invalid_request"),
    ],
)
def test_bad_router_paths_change_nothing(
    rooted: tuple[Harness, httpx.Client], path: str, status: int, code: str
) -> None:
    response = rooted[1].post("/v1/router", json={"path": path})
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert rooted[0].registry.router_folders == []
