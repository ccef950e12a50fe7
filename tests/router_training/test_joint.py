"""Whole joint runs over the command line: what they leave behind can be served, and what they refuse."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from router_training.__main__ import main
from router_training.joint import WRITTEN_BY
from router_training.joint_settings import JointConfig
from router_training.report import evaluation_table
from router_training.roster import check_artefact, load_roster
from router_training.run import evaluate_folder
from router_training.suite import SuiteOptions
from server.config import load_config
from server.routing.router import load_artefact

EXISTING = ["--samples", "16", "--max-length", "64", "--warm-start-samples", "8", "--batch-size", "4", "--steps", "4"]
QUICK = [*EXISTING, "--rank", "4", "--hard-steps", "6", "--hard-lr", "0.01"]


def run(project: Path, *flags: str, out: str = "out") -> int:
    inputs = ["--config", str(project / "adapters.yaml"), "--data", str(project / "data")]
    return main(["joint", *inputs, "--out", str(project / out), *flags])


def test_the_results_load_as_the_server_loads_them(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file(project / "base" / "model.safetensors")
    assert run(project, *QUICK) == 0
    out = project / "out"
    config = load_config(out / "adapters.yaml")
    assert config.router_folder == out
    roster = load_roster(config)
    assert roster.names == ["digits", "letters"]
    assert {adapter.rank for adapter in roster.adapters} == {4}
    artefact = load_artefact(out)
    check_artefact(artefact, roster)
    assert artefact.background
    digests = {adapter.name: adapter.digest for adapter in roster.adapters}
    assert artefact.training["adapter_digests"] == digests
    assert not set(artefact.training["start_digests"].values()) & set(digests.values())
    again = evaluate_folder(config, [project / "data"], out, SuiteOptions(), validation_rows=0)
    evaluation = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert again == evaluation
    assert artefact.training["validation"] == {key: value for key, value in evaluation.items() if key != "gates"}
    assert JointConfig(**artefact.training["settings"]).hard_steps == 6
    assert all(
        torch.equal(value, weights[name]) for name, value in load_file(project / "base/model.safetensors").items()
    )
    printed = capsys.readouterr()
    assert "| letters" in printed.out
    assert f"lora-mixer serve --config {out / 'adapters.yaml'}" in printed.err


def test_both_stages_lower_the_loss_on_held_out_chats(project: Path) -> None:
    assert run(project, *QUICK, "--steps", "12") == 0
    record = json.loads((project / "out" / "evaluation.json").read_text(encoding="utf-8"))
    after_hard = load_artefact(project / "out").training["joint"]["own_adapter_after_hard"]
    for task in ("digits", "letters"):
        base = record["policies"]["base"][task]["nll"]
        assert after_hard[task] < 0.9 * base
        assert record["policies"]["routed"][task]["nll"] < 0.9 * base
    lines = [json.loads(line) for line in (project / "out/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(24))
    assert [line["mode"] for line in lines[:12]] == ["hard digits"] * 6 + ["hard letters"] * 6
    assert {line["mode"] for line in lines[12:]} == {"dense", "straight_through"}


@pytest.mark.parametrize("beta", ["0", "1e12"])
def test_existing_adapters_are_trained_on_as_far_as_beta_lets_them(project: Path, beta: str) -> None:
    assert run(project, *EXISTING, "--start", "existing", "--hard-steps", "0", "--beta", beta) == 0
    config = load_config(project / "adapters.yaml")
    before = {adapter.name: adapter for adapter in load_roster(config).adapters}
    after = load_roster(load_config(project / "out" / "adapters.yaml")).adapters
    assert [adapter.name for adapter in after] == ["letters", "digits"]
    recorded = JointConfig(**load_artefact(project / "out").training["settings"])
    assert (recorded.start, recorded.beta) == ("existing", float(beta))
    for adapter in after:
        assert adapter.targets == before[adapter.name].targets
        gaps = [
            float((lora.B - before[adapter.name].weights[name].B).abs().max()) for name, lora in adapter.weights.items()
        ]
        assert (max(gaps) > 1e-5) == (beta == "0")
        assert max(gaps) < 1e-7 or beta == "0"


def test_a_null_expert_is_a_choice_in_the_soft_stage_only(project: Path) -> None:
    source = (project / "data/letters/train.jsonl").read_text(encoding="utf-8")
    for split in ("train", "validation"):
        path = project / f"data/base/{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8")
    assert run(project, *QUICK, "--null-expert", "--samples", "24") == 0
    artefact = load_artefact(project / "out")
    assert [adapter.name for adapter in artefact.adapters] == ["base", "digits", "letters"]
    assert artefact.training["data_chats"]["base"] == 8


REFUSED: dict[str, tuple[list[str], str]] = {
    "unknown projection": (["--targets", "query"], "no projection 'query'"),
    "one task": (["--tasks", "letters"], "at least two tasks"),
    "task without data": (["--tasks", "letters,poems"], "adapter 'poems' has no readable samples"),
    "name of the router": (["--tasks", "letters,auto"], "must not look like 'auto'"),
    "constrained stranger": (["--constrained", "poems"], "constrained names 'poems'"),
    "shape of existing": (["--start", "existing"], "existing adapters keep their shape; leave out rank"),
    "rank beyond the server's": (["--rank", "513"], "rank"),
    "negative beta": (["--beta", "-1"], "beta: Input should be greater"),
    "too few chats": (["--samples", "1"], "samples is 1, not one chat for each"),
    "composites alone": (["--composite", "1"], "of which 16 are composites, not one chat"),
    "over-long chat": (["--max-length", "8"], "the longest allowed is 8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_before_training(
    project: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, message = REFUSED[case]
    assert run(project, *QUICK, *flags) == 1
    assert message in capsys.readouterr().err
    assert not (project / "out").exists()


def test_a_bad_line_is_named_by_file_and_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (project / "data/letters/train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"task": "letters"}\n')
    assert run(project, *QUICK) == 1
    assert "letters/train.jsonl:13: field 'messages' is missing" in capsys.readouterr().err


def test_results_never_overwrite_the_adapters_they_began_with(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(project, *QUICK) == 0
    inputs = ["--config", str(project / "out/adapters.yaml"), "--data", str(project / "data")]
    assert main(["joint", *inputs, "--out", str(project / "out"), "--start", "existing", "--steps", "1"]) == 1
    assert "take another --out" in capsys.readouterr().err


def test_the_document_shows_what_was_recorded() -> None:
    root = Path(__file__).parents[2]
    document = (root / "docs/joint-training.md").read_text(encoding="utf-8")
    records = json.loads((root / "benchmarks/results/joint.json").read_text(encoding="utf-8"))
    for name, record in records.items():
        assert evaluation_table(record["evaluation"]) in document
        assert JointConfig(**record["settings"]).beta == float(name.removeprefix("beta_"))
        for nll in record["own_adapter_after_hard"].values():
            assert f"{nll:.3f}" in document


def test_limits_that_the_results_need_are_theirs(project: Path) -> None:
    """What the run read its adapters back under, and nothing that is this machine's."""
    content: dict[str, Any] = yaml.safe_load((project / "adapters.yaml").read_text(encoding="utf-8"))
    content["server"] = {"max_adapter_rank": 600, "port": 9999}
    (project / "adapters.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    assert run(project, *QUICK, "--steps", "0") == 0
    written = yaml.safe_load((project / "out" / "adapters.yaml").read_text(encoding="utf-8"))
    assert written["server"] == {"max_adapter_rank": 600}


def test_a_local_base_is_found_from_the_folder_of_the_results(project: Path) -> None:
    content: dict[str, Any] = yaml.safe_load((project / "adapters.yaml").read_text(encoding="utf-8"))
    content["base_model"]["source"] = "./base"
    (project / "adapters.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    assert run(project, *QUICK, "--steps", "0", out="deep/out") == 0
    assert load_roster(load_config(project / "deep/out/adapters.yaml")).names == ["digits", "letters"]


def test_the_users_own_config_is_never_overwritten(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (project / "adapters.yaml").read_text(encoding="utf-8")
    shutil.rmtree(project / "letters")
    shutil.rmtree(project / "digits")
    assert run(project, *QUICK, out=".") == 1
    assert "adapters.yaml is not of a joint run and would be overwritten" in capsys.readouterr().err
    assert (project / "adapters.yaml").read_text(encoding="utf-8") == before


def test_adapters_in_a_subfolder_of_the_results_are_not_overwritten(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("letters", "digits"):
        shutil.copytree(project / name, project / "out/adapters" / name)
    config = yaml.safe_load((project / "adapters.yaml").read_text(encoding="utf-8"))
    config["adapters"] = [{"name": name, "source": "out/adapters", "subfolder": name} for name in ("letters", "digits")]
    (project / "adapters.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    before = (project / "out/adapters/letters/adapter_model.safetensors").read_bytes()
    assert run(project, *EXISTING, "--start", "existing") == 1
    assert "holds adapters of the config: " in capsys.readouterr().err
    config["adapters"] = [{"name": name, "source": name} for name in ("letters", "digits")]
    (project / "adapters.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert run(project, *QUICK) == 1
    assert "holds adapters that no joint run has written" in capsys.readouterr().err
    config = {**config, "adapters": [{"name": "digits", "source": "adapters/digits"}]}
    text = f"{WRITTEN_BY}\n{yaml.safe_dump(config)}"
    (project / "out/adapters.yaml").write_text(text, encoding="utf-8")
    assert run(project, *QUICK) == 1
    assert "that no joint run has written: letters; take" in capsys.readouterr().err
    assert (project / "out/adapters/letters/adapter_model.safetensors").read_bytes() == before


def test_a_run_may_follow_another_in_its_folder(project: Path) -> None:
    for _ in range(2):
        assert run(project, *QUICK, "--steps", "0") == 0
