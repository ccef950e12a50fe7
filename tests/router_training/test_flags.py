"""Flags that several commands share."""

import argparse
from pathlib import Path

import pytest

from router_training.flags import add_sources, config_from


def parsed(project: Path, *flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_sources(parser)
    return parser.parse_args(["--config", str(project / "adapters.yaml"), "--data", str(project / "data"), *flags])


def in_bfloat16(project: Path) -> None:
    config = project / "adapters.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace("float32", "bfloat16"), encoding="utf-8")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype_replaces_the_configs(project: Path, dtype: str) -> None:
    assert config_from(parsed(project)).base_model.dtype == "float32"
    chosen = config_from(parsed(project, "--dtype", dtype))
    assert chosen.base_model.dtype == dtype
    assert chosen.base_model.name == config_from(parsed(project)).base_model.name


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_a_cpu_without_bfloat16_is_told_of_unless_the_user_chose(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], has_bfloat16: bool
) -> None:
    monkeypatch.setattr("router_training.flags.has_bfloat16", lambda: has_bfloat16)
    config_from(parsed(project))
    in_bfloat16(project)
    config_from(parsed(project, "--dtype", "bfloat16"))
    assert capsys.readouterr().err == ""
    config_from(parsed(project))
    assert ("--dtype float32" in capsys.readouterr().err) is not has_bfloat16
