"""Whole runs over the command line, from adapters.yaml and chat folders to an artefact that the server loads."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from router_training.__main__ import build_parser, main
from router_training.run import write_json
from router_training.settings import TrainingConfig
from server.routing.background import from_tensors
from server.routing.router import load_artefact, save_artefact

pytestmark = pytest.mark.usefixtures("short_fits")

QUICK = ["--samples", "16", "--max-length", "64", "--warm-start-samples", "8", "--steps", "2", "--batch-size", "4"]


def run(project: Path, command: str, *flags: str) -> int:
    inputs = ["--config", str(project / "adapters.yaml"), "--data", str(project / "data")]
    return main([command, *inputs, *flags])


@pytest.mark.parametrize("granularity", ["layer", "projection"])
def test_train_writes_an_artefact_the_server_accepts_with_its_record(
    project: Path, granularity: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = project / "router"
    assert run(project, "train", "--out", str(out), "--granularity", granularity, *QUICK) == 0
    artefact = load_artefact(out)
    assert artefact.granularity == granularity
    assert [adapter.name for adapter in artefact.adapters] == ["letters", "digits"]
    assert [adapter.source for adapter in artefact.adapters] == ["letters", "digits"]
    assert set(from_tensors(artefact.background, artefact.rows).domains.tolist()) == {0, 1}
    assert artefact.training["data_chats"] == {"letters": 8, "digits": 8}
    assert TrainingConfig(**artefact.training["settings"]).steps == 2
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]
    evaluation = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert set(evaluation["policies"]) == {"base", "own_adapter", "uniform", "routed"}
    assert evaluation["chats"] == {"letters": 4, "digits": 4}
    gates = evaluation.pop("gates")
    assert set(gates["layers"]) == set(gates["opening"]) == {"letters", "digits"}
    assert gates["along"].keys() == {"conversation", "answer"}
    assert artefact.training["validation"] == evaluation
    assert "| letters" in capsys.readouterr().out


def test_two_runs_with_one_seed_give_equal_tensors(project: Path) -> None:
    for name in ("first", "second"):
        assert run(project, "train", "--out", str(project / name), "--validation-rows", "1", *QUICK) == 0
    first, second = load_artefact(project / "first"), load_artefact(project / "second")
    assert all(torch.equal(first.rows[key], second.rows[key]) for key in first.rows)
    assert first.training["data_sha256"] == second.training["data_sha256"]


def test_evaluate_and_report_show_the_trained_router(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = project / "router"
    run(project, "train", "--out", str(out), *QUICK, "--steps", "0")
    trained = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    record = project / "again.json"
    assert run(project, "evaluate", "--router", str(out), "--out", str(record)) == 0
    assert json.loads(record.read_text(encoding="utf-8")) == trained
    capsys.readouterr()
    assert main(["report", str(record), str(out / "evaluation.json")]) == 0
    assert "mean ratio to own adapter" in capsys.readouterr().out


def test_the_whole_evaluation_covers_every_set_and_reuses_what_it_measured(project: Path) -> None:
    shutil.copytree(project / "data/letters", project / "data/base")
    run(project, "train", "--out", str(project / "router"), *QUICK, "--steps", "0", "--validation-rows", "1")
    flags = [
        "--router",
        str(project / "router"),
        "--out",
        str(project / "record.json"),
        "--baselines",
        "--calibration-chats",
        "3",
    ]
    flags += ["--composites", "6", "--generate", "2", "--max-new-tokens", "4", "--cache", str(project / "cells")]
    assert run(project, "evaluate", *flags) == 0
    record = json.loads((project / "record.json").read_text(encoding="utf-8"))
    singles = {"only_letters", "only_digits"}
    weights = {"arrow", "spectr", "seqr_norm", "lag", "mean_activation", "ridge", "lda"}
    fits = {"lora_soups", "lorahub", "phatgoose"}
    calibrated = weights - {"arrow", "spectr", "lag"} | fits
    routers = {"routed", "routed_k1", "per_request", "per_request_opening"}
    expected = {"base", "own_adapter", "uniform"} | singles | weights | fits | routers
    assert (
        set(record["policies"]) == set(record["composite"]["policies"]) == set(record["off_domain"]["nll"]) == expected
    )
    assert record["composite"]["chats"] == 6
    assert record["calibration"]["chats_per_task"] == 3
    assert record["off_domain"]["ratio_to_base"]["base"] == 1.0
    assert set(record["metrics"]) == {"base", "own_adapter", "uniform", "routed"}
    assert record["metrics"]["routed"]["letters"].keys() == {"metric", "value", "chats"}
    cells = {path: path.stat().st_mtime_ns for path in (project / "cells").iterdir()}
    fits_and_gates = 2 + len(singles) + 1  # static mixtures, one fit per adapter, gate shares
    assert len(cells) == 2 * len(expected) + 4 * 2 + fits_and_gates
    assert run(project, "evaluate", *flags) == 0
    assert {path: path.stat().st_mtime_ns for path in (project / "cells").iterdir()} == cells
    assert json.loads((project / "record.json").read_text(encoding="utf-8")) == record
    assert run(project, "evaluate", *flags, "--calibration-chats", "2") == 0
    again = {path for path in (project / "cells").iterdir() if path not in cells}
    assert {json.loads(path.read_text(encoding="utf-8"))["facts"]["policy"] for path in again} == calibrated


def test_the_table_of_systems_names_policies_that_the_evaluation_has(project: Path) -> None:
    run(project, "train", "--out", str(project / "router"), *QUICK, "--steps", "0", "--validation-rows", "1")
    out = project / "record.json"
    flags = ["--baselines", "--calibration-chats", "1", "--validation-rows", "1", "--out", str(out)]
    assert run(project, "evaluate", "--router", str(project / "router"), *flags) == 0
    measured = set(json.loads(out.read_text(encoding="utf-8"))["policies"])
    text = (Path(__file__).parents[2] / "docs" / "routing-systems.md").read_text(encoding="utf-8")
    listed = re.findall(r"polic(?:y|ies) ((?:`\w+`(?:, | and )?)+)", text)
    named = {name for part in listed for name in re.findall(r"`(\w+)`", part)}
    assert len(named) > 14
    # With two adapters there is no k of three.
    assert named - measured == {"routed_k3"}


def test_calibration_without_chats_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(project, "evaluate", "--router", str(project), "--baselines", "--calibration-chats", "0") == 1
    assert "--calibration-chats must be at least 1" in capsys.readouterr().err


def test_statistics_are_added_to_an_artefact_that_has_none(project: Path) -> None:
    out = project / "router"
    assert run(project, "train", "--out", str(out), "--validation-rows", "1", *QUICK) == 0
    trained = load_artefact(out)
    save_artefact(replace(trained, background={}), out)
    assert run(project, "background", "--router", str(out)) == 0
    upgraded = load_artefact(out)
    assert from_tensors(upgraded.background, upgraded.rows).gates
    assert upgraded.row_digests() == trained.row_digests()
    assert upgraded.training["background"]["chats"] == 24
    assert upgraded.training["settings"] == trained.training["settings"]


def test_statistics_of_questions_are_added_to_a_prompt_gate_that_has_none(project: Path) -> None:
    out = project / "router"
    assert run(project, "train", "--out", str(out), "--validation-rows", "1", "--prompt-gate", *QUICK) == 0
    gate = load_artefact(out).prompt_gate
    assert gate is not None
    assert gate.statistics is not None
    save_artefact(replace(load_artefact(out), prompt_gate=replace(gate, statistics=None)), out)
    assert run(project, "background", "--router", str(out)) == 0
    upgraded = load_artefact(out).prompt_gate
    assert upgraded is not None
    assert upgraded.statistics is not None
    assert {choice for _, choice in upgraded.statistics.questions} == {0, 1}
    assert torch.equal(upgraded.scores, gate.scores)


def test_every_data_problem_is_printed_before_any_model_is_loaded(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(project / "base")
    with (project / "data/letters/train.jsonl").open("a", encoding="utf-8") as file:
        file.write("{oops\n")
    (project / "data/digits/validation.jsonl").unlink()
    assert run(project, "train", "--out", str(project / "router"), *QUICK) == 1
    printed = capsys.readouterr().err
    assert "letters/train.jsonl:13: not JSON" in printed
    assert "adapter 'digits' has no readable samples" in printed
    assert not (project / "router").exists()


def test_an_over_long_chat_is_refused_by_line_before_training(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = [{"role": "user", "content": "a" * 80}, {"role": "assistant", "content": "aa"}]
    path = project / "data/letters/train.jsonl"
    path.write_text(json.dumps({"messages": long}) + "\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    flags = ["--out", str(project / "router"), *QUICK, "--samples", "26"]
    assert run(project, "train", *flags) == 1
    printed = capsys.readouterr().err
    assert "letters/train.jsonl:1: " in printed
    assert "tokens, and the longest allowed is 64" in printed
    assert not (project / "router").exists()
    assert run(project, "train", *flags, "--too-long", "cut", "--steps", "0", "--validation-rows", "1") == 0


def test_a_null_expert_needs_chats_of_its_own_and_becomes_a_choice(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--out", str(project / "router"), *QUICK, "--null-expert"]
    assert run(project, "train", *flags) == 1
    assert "'base' has no readable samples" in capsys.readouterr().err
    shutil.copytree(project / "data/letters", project / "general/base")
    assert run(project, "train", *flags, "--prior", "base=2", "--data", str(project / "general")) == 0
    artefact = load_artefact(project / "router")
    assert [adapter.name for adapter in artefact.adapters] == ["base", "letters", "digits"]
    assert artefact.adapters[0].digest == "base"
    evaluation = artefact.training["validation"]
    assert evaluation["chats"] == {"base": 4, "letters": 4, "digits": 4}
    assert evaluation["policies"]["own_adapter"]["base"] == evaluation["policies"]["base"]["base"]
    assert set(evaluation["mean_nll"]) == {"base", "own_adapter", "uniform", "routed"}


@pytest.mark.parametrize("prior", ["letters", "letters=1=", "=2", "poetry=1", "letters=-1"])
def test_a_malformed_prior_is_refused(project: Path, prior: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(project, "train", "--out", str(project / "router"), *QUICK, "--prior", prior) == 1
    assert "prior" in capsys.readouterr().err


def test_an_artefact_of_another_base_is_refused_by_name(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = project / "router"
    run(project, "train", "--out", str(out), *QUICK, "--steps", "0", "--validation-rows", "1")
    record = json.loads((out / "router.json").read_text(encoding="utf-8"))
    record["base_model"]["name"] = "other/base"
    (out / "router.json").write_text(json.dumps(record), encoding="utf-8")
    assert run(project, "evaluate", "--router", str(out)) == 1
    assert "other/base" in capsys.readouterr().err


def test_an_artefact_of_other_adapters_is_refused_by_name(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = project / "router"
    run(project, "train", "--out", str(out), *QUICK, "--steps", "0", "--validation-rows", "1")
    record = json.loads((out / "router.json").read_text(encoding="utf-8"))
    record["adapters"][1]["digest"] = "0" * 64
    (out / "router.json").write_text(json.dumps(record), encoding="utf-8")
    assert run(project, "evaluate", "--router", str(out)) == 1
    assert "digits" in capsys.readouterr().err


def test_every_adapter_that_cannot_be_used_is_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("letters", "digits"):
        shutil.rmtree(project / name)
    assert run(project, "train", "--out", str(project / "router"), *QUICK) == 1
    printed = capsys.readouterr().err
    assert "'letters'" in printed
    assert "'digits'" in printed


def test_settings_out_of_range_are_refused_by_name(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(project, "train", "--out", str(project / "router"), "--batch-size", "0", "--temperature", "0") == 1
    printed = capsys.readouterr().err
    assert "batch_size" in printed
    assert "temperature" in printed


def test_written_numbers_stand_on_one_line_and_strings_stay_as_they_are(tmp_path: Path) -> None:
    content = {"rows": [[0.5, 1e-05], [-2, 3]], "names": ["a [ b ]", "1,\n2"], "none": []}
    write_json(content, tmp_path / "x.json")
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == content
    assert "    [0.5, 1e-05],\n    [-2, 3]\n" in text
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_file_that_is_no_record_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text("{}", encoding="utf-8")
    assert main(["report", str(tmp_path / "x.json")]) == 1
    assert "is not an evaluation record" in capsys.readouterr().err


def test_help_names_a_default_for_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["train", "--help"])
    printed = capsys.readouterr().out
    for flag in ("--samples", "--lambda", "--alpha", "--sign", "--eta", "--lr", "--max-length", "--granularity"):
        assert flag in printed
    assert printed.count("(default ") >= 15


def test_an_over_long_chat_is_refused_whether_or_not_the_mix_holds_it(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = [{"role": "user", "content": "a" * 80}, {"role": "assistant", "content": "aa"}]
    with (project / "data/letters/train.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"messages": long}) + "\n")
    for seed in "012":
        assert run(project, "train", "--out", str(project / "router"), *QUICK, "--samples", "2", "--seed", seed) == 1
        assert "letters/train.jsonl:13: " in capsys.readouterr().err


UNFIT = {
    "more choices than there are": (["--top-k", "3"], "top_k is 3, and there are 2 choices: 'letters', 'digits'"),
    "fewer samples than choices": (["--samples", "1"], "samples is 1, not one chat for each of the 2 choices"),
    "no layer with a gate": (["--routed-from-layer", "9"], "routed_from_layer is 9"),
    "no number": (["--lr", "inf"], "learning_rate: Input should be a finite number"),
    "seed of another kind": (["--seed", "-1"], "seed: Input should be greater than or equal to 0"),
    "seed beyond 64 bits": (["--seed", str(2**64)], "seed: Input should be less than"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_settings_that_do_not_fit_are_refused_before_training(
    project: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, message = UNFIT[case]
    assert run(project, "train", "--out", str(project / "router"), *QUICK, *flags) == 1
    assert message in capsys.readouterr().err
    assert not (project / "router").exists()


def test_one_adapter_under_two_names_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = project / "adapters.yaml"
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    content["adapters"].append({"name": "again", "source": content["adapters"][0]["source"]})
    config.write_text(yaml.safe_dump(content), encoding="utf-8")
    shutil.copytree(project / "data/letters", project / "data/again")
    assert run(project, "train", "--out", str(project / "router"), *QUICK) == 1
    assert "adapters 'letters' and 'again' are one and the same" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--validation-rows", "--composites", "--generate", "--max-new-tokens"])
def test_counts_are_not_negative(project: Path, flag: str) -> None:
    with pytest.raises(SystemExit):
        run(project, "evaluate", flag, "-1")


def test_what_cannot_be_written_is_said_and_no_result_is_lost(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = project / "router"
    assert run(project, "train", "--out", str(out), *QUICK, "--steps", "0", "--validation-rows", "1") == 0
    capsys.readouterr()
    flags = ["--router", str(out), "--validation-rows", "1", "--out"]
    assert run(project, "evaluate", *flags, str(out)) == 1
    assert "is a folder; name a file" in capsys.readouterr().err
    assert run(project, "evaluate", *flags, str(out / "router.json" / "x.json")) == 1
    assert f"{out / 'router.json'}: File exists" in capsys.readouterr().err
    assert run(project, "evaluate", *flags, str(project / "new" / "x.json")) == 0
    assert (project / "new" / "x.json").exists()


def test_answers_of_tasks_that_ask_the_same_are_kept_apart(project: Path) -> None:
    """The own adapter's answer depends on whose question it is."""
    shutil.copyfile(project / "data/letters/validation.jsonl", project / "data/digits/validation.jsonl")
    flags = ["--router", str(project / "router"), "--generate", "2", "--max-new-tokens", "4"]
    run(project, "train", "--out", str(project / "router"), *QUICK, "--steps", "0", "--validation-rows", "1")
    assert run(project, "evaluate", *flags, "--cache", str(project / "cells")) == 0
    asked = [json.loads(path.read_text(encoding="utf-8"))["facts"] for path in (project / "cells").iterdir()]
    answers = [facts for facts in asked if facts["sequences"][0] == "answers" and facts["policy"] == "own_adapter"]
    assert len(answers) == 2


@pytest.mark.parametrize(
    "content", ["5", "null", '"ratio_to_own_adapter"', '{"ratio_to_own_adapter": {"a": 1}}', "[" * 99999]
)
def test_other_json_is_no_record(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text(content, encoding="utf-8")
    assert main(["report", str(tmp_path / "x.json")]) == 1
    assert "x.json" in capsys.readouterr().err


def test_an_artefact_with_a_gate_of_no_layer_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = project / "router"
    run(project, "train", "--out", str(out), *QUICK, "--steps", "0", "--validation-rows", "1")
    artefact = load_artefact(out)
    save_artefact(replace(artefact, rows={**artefact.rows, "layer.77": artefact.rows["layer.0"].clone()}), out)
    assert run(project, "evaluate", "--router", str(out)) == 1
    assert "gate 'layer.77' belongs to no layer of this model" in capsys.readouterr().err
