"""The verdict that `lora-mixer adapters check` prints."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.adapters.checking import check_adapter
from server.adapters.hub import HubSource
from server.adapters.loading import AdapterLoader
from server.adapters.lockfile import Lockfile
from server.adapters.weights import AdapterLimits
from server.config import AdapterSpec
from server.errors import AdapterDownloadError
from server.routing.bank import ProjectionInfo
from tests.adapters.fake_hub import FakeHub
from tests.adapters.folders import BASE, copied, edit_config


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with FakeHub() as hub:
        yield hub


@pytest.fixture
def loader(hub: FakeHub, projections: dict[str, ProjectionInfo], plain_folder: Path, tmp_path: Path) -> AdapterLoader:
    copied(plain_folder, tmp_path / "sound")
    edit_config(copied(plain_folder, tmp_path / "broken"), {"use_dora": True, "lora_bias": True})
    return AdapterLoader(
        projections=projections,
        base_model_name=BASE,
        limits=AdapterLimits(),
        hub=HubSource(endpoint=hub.endpoint, cache_folder=tmp_path / "cache"),
        lockfile=Lockfile(None),
        root=tmp_path,
    )


def test_a_sound_adapter_is_servable_with_its_facts(loader: AdapterLoader) -> None:
    verdict = check_adapter(AdapterSpec(name="a", source="sound"), loader)
    assert verdict.is_servable
    record = json.loads(json.dumps(verdict.to_dict()))
    assert (record["servable"], record["rank"], record["num_projections"]) == (True, 4, 6)
    assert f"servable on {BASE}; rank 4, 6 projections (q_proj, v_proj), digest {verdict.digest}" in str(verdict)


def test_a_refused_adapter_lists_every_reason(loader: AdapterLoader) -> None:
    verdict = check_adapter(AdapterSpec(name="a", source="broken"), loader)
    assert not verdict.is_servable
    assert [reason["code"] for reason in verdict.to_dict()["reasons"]] == ["lora_bias", "dora"]
    assert str(verdict).splitlines()[1:] == [
        f"  [{reason.code}] {reason.message} ({reason.where})" for reason in verdict.reasons
    ]


def test_a_hub_adapter_is_judged_at_its_commit(loader: AdapterLoader, hub: FakeHub, tmp_path: Path) -> None:
    commit = hub.push_folder("org/a", tmp_path / "sound")
    assert check_adapter(AdapterSpec(name="a", source="org/a"), loader).revision == commit
    hub.push_folder("org/a", tmp_path / "broken")
    at_commit = check_adapter(AdapterSpec(name="a", source=f"org/a@{commit}"), loader)
    assert (at_commit.source, at_commit.revision, at_commit.is_servable) == ("org/a", commit, True)
    with pytest.raises(AdapterDownloadError):
        check_adapter(AdapterSpec(name="a", source="org/absent"), loader)
