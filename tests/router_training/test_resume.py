"""Runs killed at random moments and repeated end in the bytes of a run that nobody touched."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from router_training import prompt_fit
from router_training.__main__ import main
from router_training.checkpoint import CHECKPOINT_NAME, Checkpoint, claimed
from router_training.data import Chat
from router_training.mixing import Mix
from router_training.run import fingerprint
from router_training.settings import TrainingConfig
from server.errors import ConfigError

FLAGS = {
    "--samples": "16",
    "--max-length": "64",
    "--warm-start-samples": "8",
    "--warm-start-rounds": "1",
    "--steps": "40",
    "--batch-size": "2",
    "--checkpoint-every": "3",
    "--lr": "0.05",
    "--lm-weighting": "relative",
    "--distil": "0.5",
    "--validation-rows": "2",
}
JOINT_FLAGS = {**FLAGS, "--hard-steps": "10", "--steps": "20", "--rank": "4", "--beta": "5"}
"""As many steps in all: ten for each of two adapters, twenty soft ones."""
TIMED = {"metrics.jsonl", "events.out.tfevents.0.router"}
"""Files that hold durations."""


def command(project: Path, out: str, name: str = "train") -> list[str]:
    inputs = ["--config", str(project / "adapters.yaml"), "--data", str(project / "data")]
    flags = FLAGS if name == "train" else JOINT_FLAGS
    return [
        name,
        *inputs,
        "--out",
        str(project / out),
        "--prompt-gate",
        *(part for pair in flags.items() for part in pair),
    ]


def results(out: Path) -> dict[str, bytes]:
    """Every file of a finished run whose bytes are its own."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name not in TIMED]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def steps_done(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0


def kill_after(project: Path, out: str, name: str, num_steps: int, delay_s: float) -> None:
    """Run the command in a process of its own and SIGKILL it some time after `num_steps` steps."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "router_training", *command(project, out, name)],
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while steps_done(project / out) < num_steps and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()


@pytest.mark.parametrize("name", ["train", "joint"])
def test_a_run_killed_at_three_random_moments_ends_in_the_same_bytes(project: Path, name: str) -> None:
    assert main(command(project, "whole", name)) == 0
    generator = random.Random()  # not seeded: any moment must do
    moments = [(generator.randrange(start, start + 10), generator.random() * 0.02) for start in (0, 11, 22)]
    for num_steps, delay_s in moments:
        kill_after(project, "killed", name, num_steps, delay_s)
    assert not (project / "killed" / "router.json").exists()
    assert main(command(project, "killed", name)) == 0
    whole = results(project / "whole")
    assert {"router.json", "router.safetensors"} <= whole.keys()
    assert ("adapters/letters/adapter_model.safetensors" in whole) == (name == "joint")
    assert results(project / "killed") == whole, moments
    steps = [
        [json.loads(line) for line in (project / out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for out in ("whole", "killed")
    ]
    assert [step["step"] for step in steps[1]] == list(range(40))
    assert [step["loss"] for step in steps[1]] == [step["loss"] for step in steps[0]]
    assert not (project / "killed" / CHECKPOINT_NAME).exists()


def test_a_checkpoint_of_another_run_is_refused_and_kept(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = project / "router"
    out.mkdir()
    Checkpoint(out, "another run").save({"trainer": {}})
    assert main(command(project, "router")) == 1
    assert "belongs to an unfinished run" in capsys.readouterr().err
    assert Checkpoint(out, "another run").load() == {"trainer": {}}


def test_a_damaged_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT_NAME).write_bytes(b"half a file")
    with pytest.raises(ConfigError, match=r"damaged .*delete it"):
        Checkpoint(tmp_path, "run").load()


def test_saving_replaces_the_old_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tmp_path, "run")
    assert checkpoint.load() is None
    checkpoint.save({"step": 1})

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save({"step": 2})
    assert checkpoint.load() == {"step": 1}
    monkeypatch.undo()
    checkpoint.delete()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changed", ["dtype", "base weights"])
def test_a_run_does_not_go_on_over_other_weights(
    project: Path, changed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base model in a folder has no name that tells its weights from others."""

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("router_training.run.write_results", crash)
    with pytest.raises(KeyboardInterrupt):
        main(command(project, "router"))
    monkeypatch.undo()
    if changed == "base weights":
        weights = load_file(project / "base/model.safetensors")
        save_file({name: value * 1.5 for name, value in weights.items()}, project / "base/model.safetensors")
    flags = ["--dtype", "bfloat16"] if changed == "dtype" else []
    assert main([*command(project, "router"), *flags]) == 1
    assert "other settings, data, weights, dtype" in capsys.readouterr().err
    assert (project / "router" / CHECKPOINT_NAME).exists()


def test_one_run_at_a_time_writes_a_folder(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with claimed(project / "router"):
        assert main(command(project, "router")) == 1
        assert "another run writes there now" in capsys.readouterr().err
    assert list((project / "router").iterdir()) == []
    with claimed(project / "router"):
        pass


def test_a_file_is_no_folder_to_write_to(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "router").write_text("mine", encoding="utf-8")
    assert main(command(project, "router")) == 1
    assert f"--out {project / 'router'}: not a folder" in capsys.readouterr().err
    assert (project / "router").read_text(encoding="utf-8") == "mine"


def test_a_run_that_another_way_to_make_prompt_gates_began_is_not_gone_on_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mix = Mix((Chat("a", ({"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}), "a:1"),), ())
    composed, plain = TrainingConfig(composite_fraction=0.5), TrainingConfig()
    before = [
        fingerprint({"a": 1}, composed, [mix]),
        fingerprint({"a": 1}, plain, [mix]),
        fingerprint({"a": 1}, plain, []),
    ]
    assert len(set(before)) == 3
    monkeypatch.setattr(prompt_fit, "RECIPE", "another")
    monkeypatch.setattr(prompt_fit, "MIN_STEPS", 7)
    gated = [fingerprint({"a": 1}, composed, [mix]), fingerprint({"a": 1}, plain, [mix])]
    assert not set(gated) & set(before)
    assert fingerprint({"a": 1}, plain, []) == before[2], "has none"
