"""Downloads a base model from the Hub: the files a safetensors model needs, at one commit, and nothing else."""

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm as hub_tqdm

from server.errors import ModelLoadError
from server.model.progress import on_terminal
from server.model.sources import HubSource

logger = logging.getLogger(__name__)

ALLOWED_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""No Python, no pickle, no second copy of the weights in another format."""


class DownloadBar(hub_tqdm):
    """The Hub client's bar, drawn on terminals only."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["disable"] = kwargs.get("disable") or not on_terminal()
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]


def download_model(
    source: HubSource, *, endpoint: str | None = None, hub_cache: Path | None = None
) -> tuple[Path, str]:
    """Fetch the model into the Hub client's cache; returns its folder and the commit.

    A branch or tag is resolved to its commit. With the network away, or HF_HUB_OFFLINE set, the cached snapshot of
    that revision is used. `endpoint` and `hub_cache` default to the client's own (HF_ENDPOINT, HF_HOME).
    Raises ModelLoadError.
    """
    logger.info("fetching base model %s at revision %s", source.repo_id, source.revision or "main")
    try:
        folder = snapshot_download(
            source.repo_id,
            revision=source.revision,
            allow_patterns=list(ALLOWED_FILES),
            tqdm_class=DownloadBar,
            endpoint=endpoint,
            cache_dir=hub_cache,
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelLoadError(_explain(source, error)) from error
    # The cache keeps one folder per commit, named after it.
    return Path(folder), Path(folder).name


def _explain(source: HubSource, error: Exception) -> str:
    what = f"base model {source.repo_id!r}"
    if isinstance(error, GatedRepoError):
        return f"{what} is gated on the Hub. Accept its conditions there and set HF_TOKEN."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{what} is neither a folder here nor a repository on the Hub (or it is private and HF_TOKEN is not set). "
            "Correct base_model.source."
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{what} has no revision {source.revision!r}. Correct base_model.revision, "
            "or delete base_model from adapters.lock if it is the commit there."
        )
    if isinstance(error, LocalEntryNotFoundError):
        return (
            f"{what} at revision {source.revision or 'main'!r} is not in the local cache and the Hub cannot be "
            f"reached ({str(error).partition(chr(10))[0]}). Check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or set "
            "base_model.source to a local folder."
        )
    return f"{what} could not be downloaded: {type(error).__name__}: {error}"
