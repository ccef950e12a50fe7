"""Base models from a Hub, over HTTP with the Hub's own client, against a small Hub on loopback."""

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.config import BaseModelConfig
from server.errors import ModelLoadError
from server.model import loader
from server.model.loader_hub import download_model
from server.model.sources import HubSource
from tests.adapters.fake_hub import FakeHub

ROOT = Path(__file__).parents[2]
NAME = "org/tiny"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_branch_is_resolved_to_a_commit_and_only_model_files_are_fetched(
    hub: FakeHub, model_folder: Path, tmp_path: Path
) -> None:
    wanted = files_in(model_folder)
    for unwanted in ("pytorch_model.bin", "modeling.py", "consolidated.safetensors"):
        (model_folder / unwanted).write_bytes(b"unwanted")
    commit = hub.push_folder(NAME, model_folder)
    folder, revision = download_model(HubSource(NAME, None), endpoint=hub.endpoint, hub_cache=tmp_path / "hub")
    assert revision == commit
    assert files_in(folder) == wanted
    assert not hub.count("GET", "unwanted")


def test_an_older_commit_can_be_asked_for(hub: FakeHub, model_folder: Path, tmp_path: Path) -> None:
    first = hub.push_folder(NAME, model_folder)
    (model_folder / "config.json").write_text("{}")
    hub.push_folder(NAME, model_folder)
    folder, revision = download_model(HubSource(NAME, first), endpoint=hub.endpoint, hub_cache=tmp_path / "hub")
    assert revision == first
    assert (folder / "config.json").read_text() != "{}"


def test_with_a_warm_cache_the_hub_may_be_away(hub: FakeHub, model_folder: Path, tmp_path: Path) -> None:
    commit = hub.push_folder(NAME, model_folder)
    source = HubSource(NAME, commit)
    online, _ = download_model(source, endpoint=hub.endpoint, hub_cache=tmp_path / "hub")
    offline, revision = download_model(source, endpoint="http://127.0.0.1:9", hub_cache=tmp_path / "hub")
    assert (offline, revision) == (online, commit)


def test_what_is_wrong_with_a_hub_source_is_said(hub: FakeHub, model_folder: Path, tmp_path: Path) -> None:
    def message(repo_id: str, revision: str | None = None, endpoint: str = hub.endpoint) -> str:
        with pytest.raises(ModelLoadError) as caught:
            download_model(HubSource(repo_id, revision), endpoint=endpoint, hub_cache=tmp_path / "hub")
        return caught.value.message

    hub.push_folder(NAME, model_folder)
    assert "neither a folder here nor a repository" in message("org/nothing")
    assert "has no revision 'v9'" in message(NAME, "v9")
    assert "cannot be reached" in message(NAME, endpoint="http://127.0.0.1:9")
    hub.repositories[NAME].is_gated = True
    assert "is gated" in message(NAME)


def test_the_endpoint_comes_from_the_environment_and_offline_mode_works_with_the_cache(
    hub: FakeHub, model_folder: Path, tmp_path: Path
) -> None:
    """In processes of their own, since the Hub client reads the environment when it is imported."""
    commit = hub.push_folder(NAME, model_folder)
    script = (
        "from server.model.loader_hub import download_model\nfrom server.model.sources import HubSource\n"
        f"print(download_model(HubSource('{NAME}', None))[1])"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    for offline in ("0", "1"):
        hub.requests.clear()
        command = [sys.executable, "-c", script]
        result = subprocess.run(
            command,
            cwd=ROOT,
            env={**environment, "HF_HUB_OFFLINE": offline},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.stdout.strip() == commit, result.stderr
        assert "it/s" not in result.stderr, "no bars outside terminals"
        assert (not hub.requests) == (offline == "1")


def test_a_model_from_the_hub_loads_with_its_commit_as_revision(
    hub: FakeHub, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.push_folder(NAME, model_folder)
    local = functools.partial(download_model, endpoint=hub.endpoint, hub_cache=tmp_path / "hub")
    monkeypatch.setattr(loader, "download_model", local)
    config = BaseModelConfig(name="org/tiny", source=NAME, dtype="float32")
    loaded = loader.load_base_model(config, device="cpu", cache_folder=tmp_path, root=tmp_path)
    assert loaded.revision == commit
    assert loaded.vocab_size == 320
