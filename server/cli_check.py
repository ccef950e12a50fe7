"""`lora-mixer adapters check`: the verdict on one adapter, reached as the server reaches it, without a server.

Imports torch and transformers: the command line imports this module only to run it.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from server.adapters.checking import Verdict, check_adapter
from server.adapters.hub import HubSource, Progress, ignore_progress
from server.adapters.loading import AdapterLoader
from server.adapters.lockfile import LockEntry, Lockfile
from server.adapters.sources import ResolvedSource
from server.adapters.weights import AdapterLimits
from server.cli_flags import config_from
from server.config import AdapterSpec, ServerConfig, cache_folder, load_secrets
from server.errors import ConfigError, InvalidRequestError
from server.model.skeleton import load_skeleton
from server.routing.attach import find_projections


def run_check(arguments: argparse.Namespace) -> int:
    """Print the verdict on one adapter; 0 if servable, else 1.

    Raises AdapterDownloadError or ModelLoadError if adapter or base model cannot be fetched, ConfigError for a
    revision of a local folder.
    """
    config = config_from(arguments)
    # The name only appears in messages; a source may hold characters that names may not.
    name = re.sub(r"[^A-Za-z0-9._-]|^[^A-Za-z0-9]+", "", Path(arguments.source).name)[:96] or "adapter"
    spec = AdapterSpec(name=name, source=arguments.source, revision=arguments.revision, subfolder=arguments.subfolder)
    try:
        verdict = judge(spec, config)
    except InvalidRequestError as error:
        raise ConfigError(error.message) from error
    print(json.dumps(verdict.to_dict(), indent=2) if arguments.json else verdict)
    return 0 if verdict.is_servable else 1


def judge(spec: AdapterSpec, config: ServerConfig) -> Verdict:
    """Against the configured base model and limits. A folder is relative to the shell's folder; nothing is locked."""
    limits = AdapterLimits(config.server.max_adapter_rank, config.server.max_adapter_bytes)
    skeleton = load_skeleton(config.base_model, cache_folder=cache_folder(), root=config.root)
    loader = AdapterLoader(
        projections=find_projections(skeleton),
        base_model_name=config.base_model.name,
        limits=limits,
        hub=_ShownHub.from_settings(config.server, load_secrets()),
        lockfile=Lockfile(None),
        root=Path.cwd(),
    )
    return check_adapter(spec, loader)


class _ShownHub(HubSource):
    """Shows how far a download is."""

    def fetch(
        self, spec: AdapterSpec, *, locked: LockEntry | None = None, progress: Progress = ignore_progress
    ) -> ResolvedSource:
        del progress
        return super().fetch(spec, locked=locked, progress=_DownloadLines())


class _DownloadLines:
    """Shows a download on stderr, tenth by tenth: on one line of a terminal, on plain lines elsewhere."""

    def __init__(self) -> None:
        self._shown = 0

    def __call__(self, done: int, total: int) -> None:
        tenths = 10 * done // max(1, total)
        if tenths <= self._shown:
            return
        self._shown = tenths
        start, end = ("\r", "\n" if tenths >= 10 else "") if sys.stderr.isatty() else ("", "\n")
        print(f"{start}downloaded {10 * tenths}% of {total / 2**20:.1f} MiB", end=end, file=sys.stderr, flush=True)
