"""Plans over the tiny project of conftest.py, and the command that works on them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from router_training.__main__ import main

SETTINGS = {"samples": 16, "max_length": 64, "warm_start_samples": 8, "batch_size": 4, "lm_weighting": "relative"}


def write_plan(project: Path, *runs: dict[str, Any], **settings: Any) -> None:
    defaults = {"settings": {**SETTINGS, "steps": 2, **settings}, "evaluation": {"rows": 2}}
    listed = [{"section": "ablation", **run} for run in runs]
    (project / "study.yaml").write_text(yaml.safe_dump({"defaults": defaults, "runs": listed}), encoding="utf-8")


def command(project: Path, *flags: str) -> list[str]:
    inputs = ["--config", str(project / "adapters.yaml"), "--data", str(project / "data")]
    return ["study", *inputs, "--plan", str(project / "study.yaml"), "--out", str(project / "out"), *flags]


def run(project: Path, *flags: str) -> int:
    return main(command(project, *flags))


def stages(project: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, str]:
    """Title of a run -> what `--list` says of it."""
    capsys.readouterr()
    assert run(project, "--list", *flags) == 0
    return dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
