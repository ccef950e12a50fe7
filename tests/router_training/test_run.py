"""Whole runs over the command line, from adapters.yaml and chat folders to an artefact that the server loads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from router_training.__main__ import build_parser, main
from router_training.settings import TrainingConfig
from server.routing.router import load_artefact

BASE = "tiny/llama"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ADAPTERS = {"letters": ["q_proj", "v_proj"], "digits": ["q_proj", "k_proj", "v_proj", "o_proj"]}
QUICK = ["--samples", "16", "--max-length", "64", "--warm-start-samples", "8", "--steps", "2", "--batch-size", "4"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes and ChatML's control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=CHATML
    )


def chat_line(task: str, index: int) -> str:
    question = "abcdefgh"[index % 8] * 3 if task == "letters" else str(index) * 3
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": question[:2]}]
    return json.dumps({"task": task, "messages": messages}) + "\n"


@pytest.fixture
def project(tiny_llama: Callable[..., Any], make_adapter: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder with adapters.yaml, a tiny base model, two adapters, and data for both."""
    model = tiny_llama(eos_token_id=257, bos_token_id=256)
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    for seed, (name, targets) in enumerate(ADAPTERS.items()):
        folder = make_adapter(tmp_path / name, model, 4, targets, seed=seed)
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = BASE
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        for split, count in (("train", 12), ("validation", 4)):
            path = tmp_path / "data" / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(chat_line(name, index) for index in range(count)), encoding="utf-8")
    content = {
        "base_model": {"name": BASE, "source": str(tmp_path / "base"), "dtype": "float32"},
        "adapters": [{"name": name, "source": name} for name in ADAPTERS],
    }
    (tmp_path / "adapters.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return tmp_path


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
    assert [adapter.name for adapter in artefact.adapters] == list(ADAPTERS)
    assert [adapter.source for adapter in artefact.adapters] == list(ADAPTERS)
    assert {f"mean/{key}" for key in artefact.rows} | {f"var/{key}" for key in artefact.rows} == set(
        artefact.background
    )
    assert artefact.training["data_chats"] == {"letters": 8, "digits": 8}
    assert TrainingConfig(**artefact.training["settings"]).steps == 2
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]
    evaluation = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert set(evaluation["policies"]) == {"base", "own_adapter", "uniform", "routed"}
    assert evaluation["chats"] == {"letters": 4, "digits": 4}
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
    for name in ADAPTERS:
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
