"""Flags and help of `lora-mixer adapters`. `cli_check.py` does the offline check, `cli_client.py` talks to servers."""

import argparse
from pathlib import Path
from typing import Any

from server import cli_client
from server.cli_flags import HelpFormatter, add_config_flags, add_settings_flags, positive_float

DEFAULT_URL = "http://127.0.0.1:8000"

CHECK_SETTINGS = ("max_adapter_rank", "max_adapter_bytes")
"""The settings that decide whether an adapter is accepted."""


def add_adapters_parser(commands: Any) -> None:
    """Add `adapters` with its subcommands to the main parser's `commands`."""
    parser = commands.add_parser(
        "adapters", help="check one adapter offline, or list, add and remove those of a running server"
    )
    subcommands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_check(subcommands)
    _add_list(subcommands)
    _add_add(subcommands)
    _add_remove(subcommands)


def _add_check(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "check",
        formatter_class=HelpFormatter,
        help="say whether an adapter can be served, or every reason why not",
        description="Judges one adapter as the server would, without a server. "
        "Exit status: 0 servable, 1 not servable or not reachable, 2 wrong usage or configuration.",
    )
    parser.add_argument("source", metavar="FOLDER_OR_REPO", help="local folder, or Hub id org/name")
    _add_hub_flags(parser)
    parser.add_argument("--json", action="store_true", help="print the verdict as one JSON object")
    add_config_flags(parser)
    add_settings_flags(parser, only=CHECK_SETTINGS)
    parser.set_defaults(run=_run_check)


def _add_list(subcommands: Any) -> None:
    parser = subcommands.add_parser("list", formatter_class=HelpFormatter, help="list a running server's adapters")
    _add_server_flags(parser)
    parser.set_defaults(run=cli_client.run_list)


def _add_add(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "add",
        formatter_class=HelpFormatter,
        help="register an adapter with a running server",
        description="Registers an adapter and waits until it serves, printing its progress. "
        "Exit status: 0 ready (or accepted, with --no-wait), 1 refused or failed, 2 wrong usage.",
    )
    parser.add_argument("name", metavar="NAME", help="the name that requests will use as model")
    parser.add_argument(
        "source", metavar="FOLDER_OR_REPO", help="Hub id org/name, or a folder below one of the server's adapter roots"
    )
    _add_hub_flags(parser)
    routing = parser.add_mutually_exclusive_group()
    routing.add_argument(
        "--routed",
        action="store_const",
        const=True,
        help="route to it, by a row from its weights where neither --examples nor its repository has examples",
    )
    routing.add_argument(
        "--not-routed",
        dest="routed",
        action="store_const",
        const=False,
        help="serve it by name only; auto never picks it",
    )
    parser.add_argument(
        "--examples",
        type=Path,
        metavar="FILE",
        help="2 to 64 prompts or chats that it is for, one JSON value a line, for a gate row without training: "
        '"text", {"prompt": "text"} or {"messages": [...]}',
    )
    parser.add_argument("--pinned", action="store_true", help="keep it in memory however rarely it is used")
    parser.add_argument(
        "--max-gate-share",
        type=positive_float,
        metavar="SHARE",
        help="largest share of the routed traffic that it may take, above 0 and at most 1; beyond, auto leaves it out "
        "(default: the server's hot_max_gate_share if its gate row is made without training, else no cap)",
    )
    parser.add_argument("--description", metavar="TEXT", help="one sentence for people")
    parser.add_argument(
        "--replace",
        action="store_true",
        help="if the name is registered with other content, replace that by a next generation",
    )
    parser.add_argument("--no-wait", action="store_true", help="return as soon as the server has accepted the request")
    parser.add_argument(
        "--timeout",
        type=positive_float,
        default=600.0,
        metavar="SECONDS",
        help="seconds to wait until it serves (default: 600)",
    )
    _add_server_flags(parser)
    parser.set_defaults(run=cli_client.run_add)


def _add_remove(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "remove",
        formatter_class=HelpFormatter,
        help="retire an adapter of a running server",
        description="Retires an adapter: no new request gets it, requests under way end undisturbed.",
    )
    parser.add_argument("name", metavar="NAME", help="the adapter's name")
    _add_server_flags(parser)
    parser.set_defaults(run=cli_client.run_remove)


def _run_check(arguments: argparse.Namespace) -> int:
    from server.cli_check import run_check

    return run_check(arguments)


def _add_hub_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", metavar="REVISION", help="Hub sources only: branch, tag or commit")
    parser.add_argument("--subfolder", metavar="FOLDER", help="folder inside the source that holds the adapter's files")


def _add_server_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default=DEFAULT_URL, help=f"address of the server (default: {DEFAULT_URL})")
    parser.add_argument(
        "--admin-key",
        metavar="KEY",
        help="admin key of the server (default: the environment's LORA_MIXER_ADMIN_KEY, which `ps` does not show)",
    )
    parser.add_argument("--json", action="store_true", help="print the server's answer as JSON")
