"""The structure that the documents promise: which module may import which, and where each third party is allowed."""

import ast
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import server

ROOT = Path(__file__).parents[1]

MAX_LINES = 300
"""Longest source file; beyond it, a file usually holds two things."""

LAYERS = {
    "errors": set[str](),
    "naming": set[str](),
    "atomic_file": set[str](),
    "config_file": {"errors"},
    "adapter_spec": {"config_file", "errors", "naming"},
    "config": {"adapter_spec", "config_file", "errors", "naming"},
    "model": {"config", "errors", "naming"},
    "routing": {"config", "atomic_file", "errors", "naming"},
    "native": {"model", "routing", "config", "errors", "naming"},
    "engine": {"native", "model", "routing", "config", "errors", "naming"},
    "adapters": {"model", "routing", "config", "atomic_file", "errors", "naming"},
    "metrics": {"adapters", "engine", "native", "model", "routing", "config", "errors", "naming"},
    "api": {"metrics", "adapters", "engine", "native", "model", "routing", "config", "errors", "naming"},
    "app": {"api", "metrics", "adapters", "engine", "native", "model", "routing", "config", "errors", "naming"},
}
"""Part of `server` -> parts it may import besides itself. Parts not named here stand at the top and import any."""

PLACES = {
    "transformers": {"server/model/", "router_training/"},
    "tokenizers": {"server/model/", "router_training/"},
    "huggingface_hub": {"server/adapters/hub", "server/model/loader"},
    "fastapi": {"server/api/", "server/app.py"},
    "starlette": {"server/api/", "server/app.py"},
    "prometheus_client": {"server/metrics.py"},
    "uvicorn": {"server/cli"},
    "httpx": {"server/cli", "server/bench"},
    "peft": {"router_training/"},
    "gguf": {"server/model/"},
}
"""Third party -> path prefixes that may import it."""

TORCHLESS = ("server/engine/scheduler.py", "server/engine/sequence.py", "server/engine/block_pool.py")

CONSTANT = re.compile(r"_?[A-Z][A-Z0-9_]*|__all__")
MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.SetComp, ast.DictComp)


@dataclass(frozen=True)
class Import:
    file: str
    line: int
    module: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def source_files() -> list[Path]:
    return sorted(path for folder in ("server", "router_training") for path in (ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(path: Path) -> Iterator[Import]:
    """Every import at any depth, inside functions and `if TYPE_CHECKING` too; relative ones made absolute."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (Import(relative(path), node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.relative_to(ROOT).parts[: -node.level]) if node.level else ""
            base = ".".join(part for part in (package, node.module) if part)
            # `from server import app` names a module only in the alias.
            yield from (Import(relative(path), node.lineno, f"{base}.{alias.name}") for alias in node.names)


ALL_IMPORTS = [found for path in source_files() for found in imports_of(path)]


def part_of(module: str) -> str:
    """`server.api.chat` -> `api`; `server` itself -> ``."""
    return module.partition(".")[2].partition(".")[0]


def test_imports_inside_server_point_one_way() -> None:
    wrong = []
    for found in ALL_IMPORTS:
        if not found.file.startswith("server/") or not found.module.startswith("server."):
            continue
        part = Path(found.file).parts[1].removesuffix(".py")
        target = part_of(found.module)
        if part in LAYERS and target not in LAYERS[part] | {part, "__version__"}:
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_server_never_imports_router_training_nor_tests() -> None:
    wrong = [
        str(found)
        for found in ALL_IMPORTS
        if found.module.split(".")[0] in {"router_training", "tests"} and not found.file.startswith("router_training/")
    ]
    assert not wrong, "\n".join(wrong)


def test_router_training_uses_only_the_lower_layers_of_server() -> None:
    allowed = {"adapters", "routing", "model", "config", "atomic_file", "errors", "naming", "machine"}
    wrong = [
        str(found)
        for found in ALL_IMPORTS
        if found.file.startswith("router_training/")
        and found.module.startswith("server.")
        and part_of(found.module) not in allowed
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("library", PLACES)
def test_a_third_party_is_imported_only_where_it_belongs(library: str) -> None:
    wrong = [
        str(found)
        for found in ALL_IMPORTS
        if found.module.split(".")[0] == library and not found.file.startswith(tuple(PLACES[library]))
    ]
    assert not wrong, "\n".join(wrong)


def test_scheduling_imports_no_torch_not_even_indirectly() -> None:
    """Follows imports through our own modules, so that a helper cannot bring torch in by the back door."""
    by_file: dict[str, set[str]] = {}
    for found in ALL_IMPORTS:
        by_file.setdefault(found.file, set()).add(found.module)
    todo, seen = list(TORCHLESS), set[str]()
    while todo:
        file = todo.pop()
        if file in seen or file not in by_file:
            continue
        seen.add(file)
        assert not any(module.split(".")[0] == "torch" for module in by_file[file]), f"{file} imports torch"
        for module in by_file[file]:
            parts = module.split(".")
            for depth in range(1, len(parts) + 1):
                stem = "/".join(parts[:depth])
                todo += [f"{stem}.py", f"{stem}/__init__.py"]
    assert seen.issuperset(TORCHLESS)


def test_source_files_stay_readable_in_one_sitting() -> None:
    long = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in source_files()}
    assert not {file: lines for file, lines in long.items() if lines > MAX_LINES}


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        relative(path)
        for path in source_files()
        if (tree := ast.parse(path.read_text(encoding="utf-8"))).body and ast.get_docstring(tree) is None
    ]
    assert not silent


def test_only_config_reads_the_environment() -> None:
    pattern = re.compile(r"os\.environ|os\.getenv|\bgetenv\(")
    wrong = [
        f"{relative(path)}:{number}"
        for path in source_files()
        if relative(path) != "server/config.py"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_in_the_server_deserialises_code() -> None:
    """No pickle in any disguise, no evaluation of text, no code of models, no queue that would carry objects."""
    libraries = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "multiprocessing", "zmq"}
    wrong = [str(found) for found in ALL_IMPORTS if found.module.split(".")[0] in libraries]
    calls = re.compile(r"torch\.load\(|(?<![\w.])(eval|exec|compile)\(|trust_remote_code=True|yaml\.(unsafe|full)_load")
    wrong += [
        f"{relative(path)}:{number}"
        for path in source_files()
        if path.is_relative_to(ROOT / "server")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if calls.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_library_that_ran_hub_code_is_not_here() -> None:
    """transformers before 5.3 fetched attention kernels, and ran them, at a config's request (CVE-2026-4372)."""
    pins = (ROOT / "deploy/constraints.txt").read_text(encoding="utf-8")
    version = re.search(r"^transformers==(\d+)\.(\d+)", pins, flags=re.MULTILINE)
    assert version is not None
    assert (int(version[1]), int(version[2])) >= (5, 3)
    assert re.search(r"^kernels==", pins, flags=re.MULTILINE) is None


def test_no_module_keeps_mutable_state() -> None:
    """Module-level lists, sets and dicts are constants by name (UPPER_CASE), and nobody declares a `global`."""
    wrong = []
    for path in source_files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        wrong += [f"{relative(path)}:{node.lineno} global" for node in ast.walk(tree) if isinstance(node, ast.Global)]
        wrong += [f"{relative(path)}: {name}" for name in mutable_names(tree) if not CONSTANT.fullmatch(name)]
    assert not wrong, "\n".join(wrong)


def mutable_names(tree: ast.Module) -> Iterator[str]:
    """Module-level names that are bound to a list, set or dict display."""
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        if isinstance(getattr(statement, "value", None), MUTABLE):
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def test_pages_that_the_server_shows_ship_with_the_package() -> None:
    patterns = project_file()["tool"]["setuptools"]["package-data"]["server"]
    shipped = {path for pattern in patterns for path in (ROOT / "server").glob(pattern)}
    pages = {path for path in (ROOT / "server/playground").iterdir() if path.suffix in {".html", ".css", ".js", ".svg"}}
    assert pages <= shipped


def test_every_dependency_has_its_argument_and_its_pin() -> None:
    project = project_file()["project"]
    wanted = project["dependencies"] + [name for extra in project["optional-dependencies"].values() for name in extra]
    arguments = (ROOT / "docs/dependencies.md").read_text(encoding="utf-8")
    pins = (ROOT / "deploy/constraints.txt").read_text(encoding="utf-8").lower().replace("_", "-")
    for requirement in wanted:
        name = re.split(r"[<>=\[]", requirement)[0]
        pin = name.lower().replace("_", "-")
        assert f"`{name}`" in arguments, f"docs/dependencies.md does not say why {name} is here"
        assert f"\n{pin}==" in pins, f"deploy/constraints.txt does not pin {name}"


def test_the_package_and_the_running_server_name_the_same_version() -> None:
    assert project_file()["project"]["version"] == server.__version__


def project_file() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
