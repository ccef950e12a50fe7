"""The cache is huggingface_hub's: each finds what the other has put there."""

import os
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download, scan_cache_dir, try_to_load_from_cache

from server.adapters.hub import HubSource
from server.adapters.hub_retry import RetryPolicy
from server.config import AdapterSpec
from server.errors import AdapterDownloadError
from tests.adapters.fake_hub import FakeHub, Fault

FILES = {"x/adapter_config.json": b'{"r": 4}', "x/adapter_model.safetensors": bytes(range(256)) * 1000}
SPEC = AdapterSpec(name="a", source="org/name", subfolder="x")


@pytest.fixture
def source(hub: FakeHub, tmp_path: Path) -> HubSource:
    return HubSource(endpoint=hub.endpoint, cache_folder=tmp_path, retries=RetryPolicy(1, first_wait_s=0.01))


def test_the_client_finds_what_we_fetch(hub: FakeHub, source: HubSource, tmp_path: Path) -> None:
    commit = hub.push("org/name", FILES)
    folder = source.fetch(SPEC).folder
    for path, content in FILES.items():
        found = try_to_load_from_cache("org/name", path, cache_dir=tmp_path, revision=commit)
        assert found == str(folder / Path(path).name)
        assert Path(found).read_bytes() == content
        assert os.readlink(found).startswith("../../../blobs/")
        assert hf_hub_download("org/name", path, revision=commit, cache_dir=tmp_path, local_files_only=True) == found
    assert not scan_cache_dir(tmp_path).warnings
    assert sorted(path.name for path in folder.iterdir()) == sorted(Path(path).name for path in FILES)


def test_what_the_client_has_fetched_is_not_fetched_again(hub: FakeHub, source: HubSource, tmp_path: Path) -> None:
    commit = hub.push("org/name", FILES)
    for path in FILES:
        hf_hub_download("org/name", path, cache_dir=tmp_path, endpoint=hub.endpoint)
    hub.requests.clear()
    resolved = source.fetch(SPEC)
    assert resolved.revision == commit
    assert hub.count("GET", "/resolve/") == hub.count("GET", "/cdn/") == 0


def test_every_file_is_asked_for_its_headers_once_and_for_no_more_bytes_than_it_has(
    hub: FakeHub, source: HubSource, tmp_path: Path
) -> None:
    """A second answer could name another blob and another size, of which nobody would have checked anything."""
    hub.push("org/name", FILES)
    source.fetch(SPEC)
    assert hub.count("HEAD", "/resolve/") == hub.count("GET", "/resolve/") == len(FILES)
    written = sum(path.stat().st_size for path in tmp_path.rglob("blobs/*") if path.is_file())
    assert written == sum(map(len, FILES.values()))


def test_file_systems_without_links_get_copies(
    hub: FakeHub, source: HubSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.adapters.hub_cache.are_symlinks_supported", lambda _: False)
    hub.push("org/name", FILES)
    resolved = source.fetch(SPEC)
    weights = resolved.folder / "adapter_model.safetensors"
    assert not weights.is_symlink()
    assert weights.read_bytes() == FILES["x/adapter_model.safetensors"]
    weights.write_bytes(b"damaged")
    assert (source.fetch(SPEC).folder / weights.name).read_bytes() == FILES["x/adapter_model.safetensors"]


def test_a_name_of_the_snapshot_that_is_taken_is_an_error(hub: FakeHub, source: HubSource) -> None:
    hub.push("org/name", FILES)
    folder = source.fetch(SPEC).folder
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json" / "x").mkdir(parents=True)
    with pytest.raises(AdapterDownloadError, match="the Hub cache cannot be used"):
        source.fetch(SPEC)


def test_links_that_lead_elsewhere_are_set_right(hub: FakeHub, source: HubSource, tmp_path: Path) -> None:
    hub.push("org/name", FILES)
    config = source.fetch(SPEC).folder / "adapter_config.json"
    (tmp_path / "other").write_bytes(b"{}")
    config.unlink()
    config.symlink_to(tmp_path / "other")
    hub.fail(Fault("/cdn/", status=500, times=99))
    assert (source.fetch(SPEC).folder / "adapter_config.json").read_bytes() == b'{"r": 4}'
