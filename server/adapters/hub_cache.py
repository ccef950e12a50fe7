"""What huggingface_hub's cache has of a commit, and what is put there. The layout is the client's own:
<cache>/models--org--name/snapshots/<commit>/<path>, linking into its blobs. Asks nobody over the network.
"""

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.file_download import are_symlinks_supported, repo_folder_name

from server.adapters.examples import EXAMPLES_NAME
from server.adapters.lockfile import LockEntry
from server.adapters.peft_config import CONFIG_NAME
from server.adapters.sources import ResolvedSource


def repository_folder(repository: str, cache_folder: Path | None) -> Path:
    """The cache's folder of a Hub id; None for `cache_folder` is the client's default."""
    return (cache_folder or Path(constants.HF_HUB_CACHE)) / repo_folder_name(repo_id=repository, repo_type="model")


def mark_in_use(folder: Path, commit: str) -> None:
    """Keep `hf cache prune` from a commit, which takes those that no ref names for left over."""
    mark = _mark(folder, commit)
    if mark.exists():
        return
    with contextlib.suppress(OSError):  # then it is downloaded again after a prune
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(commit, encoding="ascii")


def unmark(folder: Path, commit: str) -> None:
    """Leave a commit to `hf cache prune`."""
    with contextlib.suppress(OSError):
        _mark(folder, commit).unlink(missing_ok=True)


def _mark(folder: Path, commit: str) -> Path:
    """A ref of our own: a branch's would be what the client takes for its newest commit."""
    return folder / "refs" / "lora-mixer" / commit


def note_absence(folder: Path, commit: str, path: str) -> None:
    """Note, where the client does, that a commit lacks a file, so that the cache can tell next time."""
    note = folder / ".no_exist" / commit / path
    with contextlib.suppress(OSError):  # then the Hub is asked again
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()


def place(blob: Path, folder: Path, commit: str, path: str) -> Path:
    """Have a blob of the cache under its path in a commit, as the client does: by a relative link, or a copy where the
    file system has no links. Whoever reads it meanwhile finds what was there before, or this.
    """
    target = folder / "snapshots" / commit / path
    if target.exists() and target.samefile(blob):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{uuid.uuid4().hex[:8]}.lora-mixer")
    try:
        if are_symlinks_supported(folder):
            draft.symlink_to(os.path.relpath(blob, target.parent))
        else:
            shutil.copyfile(blob, draft)
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
    return target


def has_files(repository: str, paths: Iterable[str], commit: str, cache_folder: Path | None) -> bool:
    """Whether the cache has these files of a commit."""
    found = (try_to_load_from_cache(repository, path, cache_dir=cache_folder, revision=commit) for path in paths)
    return all(isinstance(path, str) for path in found)


def cached_source(
    repository: str, wanted: Mapping[str, str], commit: str, locked: LockEntry | None, cache_folder: Path | None
) -> ResolvedSource | None:
    """The files of a commit if the cache has the required ones, and they are the locked ones.

    With an `examples_problem` when it does not know about the examples, or has others than the locked ones.
    """
    found = {
        name: try_to_load_from_cache(repository, path, cache_dir=cache_folder, revision=commit)
        for name, path in wanted.items()
    }
    paths = {name: Path(path) for name, path in found.items() if isinstance(path, str)}
    hashes = {name: sha256_of(path) for name, path in paths.items()}
    expected = {name: hashes.get(name) if locked is None else locked.files.get(name) for name in wanted}
    if any(name not in hashes or hashes[name] != expected[name] for name in wanted if name != EXAMPLES_NAME):
        return None
    problem = None
    is_unknown = EXAMPLES_NAME in wanted and found[EXAMPLES_NAME] is None  # neither there nor known to be absent
    if is_unknown or hashes.get(EXAMPLES_NAME) != expected.get(EXAMPLES_NAME):
        problem = (
            f"{wanted[EXAMPLES_NAME]} of the repository is not in the cache, and the Hub could not be asked for it"
        )
        hashes.pop(EXAMPLES_NAME, None)
    return resolved_source(paths, hashes, wanted, problem)


def resolved_source(
    paths: Mapping[str, Path], hashes: Mapping[str, str], wanted: Mapping[str, str], examples_problem: str | None
) -> ResolvedSource:
    """Files in the cache as one source: its links lead into the folder of its repository, and nowhere else."""
    config = paths[CONFIG_NAME]
    depth = len(PurePosixPath(wanted[CONFIG_NAME]).parts)
    return ResolvedSource(
        folder=config.parent,
        link_root=config.parents[depth + 2],
        revision=config.parents[depth - 1].name,
        files=hashes,
        examples_problem=examples_problem,
    )


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
