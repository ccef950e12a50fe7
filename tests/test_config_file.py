"""How adapters.yaml is read: strictly, in bounded time, and with problems in words for whoever wrote it."""

import time
from pathlib import Path

import pytest

from server.config import ServerConfig, load_config
from server.errors import ConfigError


def written(folder: Path, text: str) -> Path:
    path = folder / "adapters.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("text", ["", "# router: examples/demo/router\n", "---\n"])
def test_a_file_of_nothing_but_comments_means_the_defaults(text: str, tmp_path: Path) -> None:
    assert load_config(written(tmp_path, text)) == ServerConfig(root=tmp_path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("server: {hub_allowed: myorg}\n", "server.hub_allowed: must be a list$"),
        ("server: {adapter_roots: sources}\n", "server.adapter_roots: must be a list$"),
        ("adapters: {name: a, source: b}\n", "adapters: must be a list$"),
        ("adapters: [a]\n", "adapters.0: must be a mapping$"),
        ("base_model: gpt2\n", "base_model: must be a mapping$"),
        ("server: 5\n", "server: must be a mapping$"),
        ("server: []\n", "server: must be a mapping$"),
        ("server: false\n", "server: must not be true or false$"),
        ("adapters: [{name: a, source: 5, routed: null}]\n", "source: must be text; adapters.0.routed: must be true"),
        ("server: {port: true}\n", "server.port: must not be true or false$"),
        ("server: {hub_timeout_s: no}\n", "server.hub_timeout_s: must not be true or false$"),
        ("server: {adapter_memory_mib: .inf}\n", "server.adapter_memory_mib: must be a finite number$"),
        ("server: {adapter_wait_s: .inf}\n", "server.adapter_wait_s: must be a finite number$"),
        ("server: {drain_timeout_s: .nan}\n", "server.drain_timeout_s: must be a finite number$"),
        ("router: on\n", "router: must not be true or false$"),
        ("[a, b]\n", "must hold a mapping"),
        ("router: [\n", "is not valid YAML"),
    ],
)
def test_values_of_the_wrong_shape_are_told_in_the_words_of_the_file(text: str, problem: str, tmp_path: Path) -> None:
    for overrides in ({}, {"port": 1}):
        with pytest.raises(ConfigError, match=problem):
            load_config(written(tmp_path, text), overrides)


def test_a_wrong_value_is_refused_where_a_flag_overrides_it_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"server\.port: Input should be less than or equal to 65535"):
        load_config(written(tmp_path, "server: {port: 99999}\n"), {"port": 1})


INDENTED = "".join(" " * level + "a:\n" for level in range(2000))


@pytest.mark.parametrize("text", ["[" * 2000, "- " * 2000, "{a: " * 2000, INDENTED], ids=list("[-{a"))
def test_nesting_without_end_is_refused_at_once(text: str, tmp_path: Path) -> None:
    started_s = time.monotonic()
    with pytest.raises(ConfigError, match="nested deeper than 32 levels"):
        load_config(written(tmp_path, text))
    assert time.monotonic() - started_s < 2.0, "a few milliseconds, unless it goes on to the end"


def test_a_source_that_names_its_revision_is_source_and_revision(tmp_path: Path) -> None:
    (tmp_path / "org/folder@main").mkdir(parents=True)
    text = "adapters:\n- {name: a, source: org/name@refs/pr/1}\n- {name: b, source: org/folder@main}\n"
    specs = load_config(written(tmp_path, text)).adapters
    assert [(spec.source, spec.revision) for spec in specs] == [("org/name", "refs/pr/1"), ("org/folder@main", None)]
    with pytest.raises(ConfigError, match="adapter 'a': the source names revision 'x', `revision` is 'y'"):
        load_config(written(tmp_path, "adapters: [{name: a, source: org/name@x, revision: y}]\n"))


def test_every_path_may_start_at_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "router: ~/r\nserver: {adapter_roots: [~/one, '~', two], registry_file: ~/state}\n"
    written(tmp_path, text)
    config = load_config(Path("~/adapters.yaml"))
    assert config.root == tmp_path
    assert (config.router_folder, config.registry_file) == (tmp_path / "r", tmp_path / "state")
    assert config.adapter_roots == (tmp_path / "one", tmp_path, tmp_path / "two")


def test_a_home_of_nobody_is_told_with_its_place(tmp_path: Path) -> None:
    problem = "router: '~nobody-of-that-name/r' names the home of nobody; server.adapter_roots.0: "
    with pytest.raises(ConfigError, match=problem):
        load_config(
            written(tmp_path, "router: ~nobody-of-that-name/r\nserver: {adapter_roots: [~nobody-of-that-name]}\n")
        )
    with pytest.raises(ConfigError, match="cannot read ~nobody-of-that-name"):
        load_config(Path("~nobody-of-that-name/adapters.yaml"))
