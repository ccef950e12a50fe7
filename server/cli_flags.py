"""Flags made from the settings of `config.py`, so that the help cannot drift from what the configuration accepts.

Knows argparse and pydantic; starts nothing.
"""

import argparse
import ipaddress
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from server.config import NULL, BaseModelConfig, ServerConfig, ServerSettings, load_config, load_secrets

DEFAULT_CONFIG = Path("adapters.yaml")

PRECISIONS = ("dtype", "quantization")
"""Settings of the base model that are flags too."""

SINGULAR_FLAGS = {"adapter_roots": "adapter-root", "hub_allowed": "hub-allowed"}
"""Lists are given one value per flag, so their flag is singular and may be repeated."""


class HelpFormatter(argparse.HelpFormatter):
    """Wide enough for one setting per line on most terminals."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36)


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """`--config` and the base model's precisions."""
    parser.add_argument(
        "--config",
        type=Path,
        default=DEFAULT_CONFIG,
        metavar="FILE",
        help=f"configuration file; its relative paths start at its folder (default: {DEFAULT_CONFIG})",
    )
    for name in PRECISIONS:
        field = BaseModelConfig.model_fields[name]
        choices = [value if isinstance(value, str) else "null" for value in _flat(field.annotation)]
        text = f"{_sentence(field.description)} (default: {_shown(field.default)})"
        parser.add_argument(f"--{name}", choices=choices, help=text)


def add_settings_flags(parser: argparse.ArgumentParser, only: Collection[str] | None = None) -> None:
    """One flag per field of ServerSettings, or per field in `only`."""
    group = parser.add_argument_group(
        "settings",
        "Each overrides the key of the same name under `server:` in the configuration file; "
        "the default holds where neither sets it.",
    )
    for name in ServerSettings.model_fields:
        if only is None or name in only:
            _add_flag(group, name)


def config_from(arguments: argparse.Namespace) -> ServerConfig:
    """The configuration file with this command's flags on top. Raises ConfigError."""
    overrides = {name: getattr(arguments, name, None) for name in ServerSettings.model_fields}
    if overrides["adapter_roots"]:
        # A folder typed into a shell is relative to the shell's folder, one in the file to the file's.
        overrides["adapter_roots"] = tuple(map(_from_shell, overrides["adapter_roots"]))
    config = load_config(arguments.config, overrides)
    given = {name: getattr(arguments, name) for name in PRECISIONS}
    update = {name: None if value == "null" else value for name, value in given.items() if value is not None}
    return config.model_copy(update={"base_model": config.base_model.model_copy(update=update)})


def _from_shell(folder: str) -> str:
    """Absolute, unless it starts at a home: shells expand `--adapter-root ~/x`, but not `--adapter-root=~/x`."""
    return folder if folder.startswith("~") else str(Path(folder).resolve())


def key_from_environment() -> str | None:
    """The key that a client sends: the admin key, which opens every route, else the first API key."""
    secrets = load_secrets()
    return secrets.admin_key or next(iter(secrets.api_keys), None)


def is_loopback_url(url: str) -> bool:
    """Whether `url` is this machine's: paths mean the same there, and no proxy leads to it."""
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def positive_int(text: str) -> int:
    """Argument type: an integer of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    """Argument type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def _add_flag(group: Any, name: str) -> None:
    field = ServerSettings.model_fields[name]
    flag = "--" + SINGULAR_FLAGS.get(name, name).replace("_", "-")
    text = f"{_sentence(field.description)} (default: {_shown(field.default)})"
    choices = [value for value in get_args(field.annotation) if isinstance(value, str)]
    if isinstance(field.default, bool):
        group.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, default=None, help=text)
    elif name in SINGULAR_FLAGS:
        metavar = "DIR" if name == "adapter_roots" else "ORG[/NAME]"
        group.add_argument(flag, dest=name, action="append", metavar=metavar, help=f"{text}; repeatable")
    elif choices:
        group.add_argument(flag, dest=name, choices=choices, help=text)
    else:
        group.add_argument(flag, dest=name, type=_checked(ServerSettings, name), metavar="VALUE", help=text)


def _checked(model: type[BaseModel], name: str) -> Callable[[str], Any]:
    """Argument type that applies the field's own validation, so that a bad flag is reported as a flag. `null` is what
    it is in the file, where the field takes it."""
    takes_null = type(None) in get_args(model.model_fields[name].annotation)

    def parse(text: str) -> Any:
        if takes_null and text == "null":
            return NULL
        try:
            return getattr(model.model_validate({name: text}), name)
        except ValidationError as error:
            raise argparse.ArgumentTypeError(f"{error.errors()[0]['msg']}, got {text!r}") from None

    return parse


def _flat(annotation: Any) -> list[Any]:
    """The literals of `Literal[...]`, or of `Literal[...] | None`, whose last is NoneType."""
    return [value for part in get_args(annotation) for value in (get_args(part) or (part,))]


def _sentence(description: str | None) -> str:
    """A field's docstring as help text: one line, Markdown ticks dropped, percent signs safe for argparse."""
    assert description is not None, "every setting has a docstring"
    return " ".join(description.split()).rstrip(".").replace("`", "").replace("%", "%%")


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return "null" if default is None else "none" if default == () else str(default)
