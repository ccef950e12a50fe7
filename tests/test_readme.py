"""The README cannot lie: its commands parse, its requests validate, its paths and routes exist."""

import ast
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from pydantic import BaseModel

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
SHELL_BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def curl_calls() -> list[tuple[str, str, dict[str, object] | None]]:
    """(method, path, JSON body) of every curl command, in shell blocks and inline."""
    commands = [command for block in SHELL_BLOCKS for command in re.split(r"\n(?=curl |make )", block)]
    commands += [code.replace("\n", " ") for code in re.findall(r"`(curl [^`]*)`", README)]
    calls = []
    for command in commands:
        words = shlex.split(command, comments=True)
        if not words or words[0] != "curl":
            continue
        url = next(word for word in words if word.startswith("http://127.0.0.1:8000"))
        body = json.loads(words[words.index("-d") + 1]) if "-d" in words else None
        method = words[words.index("-X") + 1] if "-X" in words else "POST" if body is not None else "GET"
        calls.append((method, url.removeprefix("http://127.0.0.1:8000"), body))
    return calls


def test_make_targets_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"make ([a-z]+)", README))
    assert {"serve", "test", "lint", "bench"} <= targets | {"lint", "bench"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"no target {target}"


def test_make_serve_takes_a_config_whose_path_has_spaces(tmp_path: Path) -> None:
    config = "Anna's models/adapters.yaml"
    command = ["make", "--dry-run", "serve", f"CONFIG={config}", f"VENV={tmp_path}"]
    # `make test` tells this one, in the environment, that it is a part of it.
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    printed = subprocess.run(command, cwd=REPOSITORY, env=own, capture_output=True, check=True, text=True).stdout
    assert shlex.split(printed.splitlines()[-1])[-3:] == ["serve", "--config", config]


def test_files_of_the_map_exist() -> None:
    block = re.search(r"## Map\n\n```\n(.*?)```", README, flags=re.DOTALL)
    assert block is not None
    folder = Path()
    for line in block.group(1).splitlines():
        names, indent = line.split("  ")[0 if not line.startswith("  ") else 1], line.startswith("  ")
        for name in names.split(","):
            name = name.strip()
            if not indent and name.endswith("/"):
                folder = Path(name)
            path = folder / name if indent else Path(name)
            assert list(REPOSITORY.glob(str(path))), f"{path} is in the map only"


def test_requests_validate_and_their_routes_exist() -> None:
    from server.api.adapters import RegisterBody
    from server.api.router import SwapBody
    from server.api.schemas import ChatBody

    bodies: dict[str, type[BaseModel]] = {
        "/v1/chat/completions": ChatBody,
        "/v1/adapters": RegisterBody,
        "/v1/router": SwapBody,
    }
    calls = curl_calls()
    assert len(calls) >= 5
    for _, path, body in calls:
        if body is not None:
            bodies[path].model_validate(body)


@pytest.mark.parametrize("code", PYTHON_BLOCKS)
def test_python_snippets_compile(code: str) -> None:
    ast.parse(code)


def test_commands_parse() -> None:
    from router_training.__main__ import build_parser as training_parser
    from server.cli import build_parser

    commands = re.findall(r"`(lora-mixer(?:-train)? [^`|]+)`", README)
    assert any(command.startswith("lora-mixer-train") for command in commands)
    for command in commands:
        program, *arguments = command.split()
        parser = training_parser() if program == "lora-mixer-train" else build_parser()
        parser.parse_args(arguments)
