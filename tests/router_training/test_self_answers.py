"""Off-domain chats: the base model's own words, in whole sentences, as data that the trainer reads."""

from pathlib import Path

import pytest
import torch
import yaml

from router_training.__main__ import main
from router_training.data import TrainingDataError, read_splits
from router_training.self_answers import read_prompts, whole_sentences
from server.config import load_config
from server.model.loader import load_base_model


def test_answers_are_the_base_models_greedy_ones_and_can_be_trained_on(project: Path) -> None:
    prompts = project / "prompts.txt"
    prompts.write_text("what is rain?\n\n  tell me more  \n", encoding="utf-8")
    out = project / "data" / "base" / "train.jsonl"
    command = ["answer", "--config", str(project / "adapters.yaml"), "--prompts", str(prompts), "--out", str(out)]
    assert main([*command, "--max-new-tokens", "8"]) == 0
    chats = read_splits([project / "data"], ["base"], ("train",))["train"]["base"]
    assert [chat.messages[0]["content"] for chat in chats] == ["what is rain?", "tell me more"]
    config = load_config(project / "adapters.yaml")
    loaded = load_base_model(config.base_model, device="cpu", cache_folder=project, root=config.root)
    for chat in chats:
        prompt = loaded.tokenizer.render_chat([dict(chat.messages[0])])
        whole = loaded.model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0)  # type: ignore[operator]
        answer = loaded.tokenizer.decode(whole[0, len(prompt) :].tolist()).strip()
        assert chat.messages[1]["content"] == whole_sentences(answer)


def test_the_base_model_answers_where_there_are_no_adapters_yet(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((project / "adapters.yaml").read_text(encoding="utf-8"))
    (project / "adapters.yaml").write_text(yaml.safe_dump({**config, "adapters": []}), encoding="utf-8")
    (project / "prompts.txt").write_text("what is rain?\n", encoding="utf-8")
    command = ["answer", "--config", str(project / "adapters.yaml"), "--prompts", str(project / "prompts.txt")]
    assert main([*command, "--max-new-tokens", "2", "--out", str(project)]) == 1
    assert "is a folder; name a file in it" in capsys.readouterr().err
    assert main([*command, "--max-new-tokens", "2", "--out", str(project / "answers.jsonl")]) == 0
    assert (project / "answers.jsonl").read_text(encoding="utf-8").count("\n") == 1


def test_an_answer_cut_short_ends_with_a_whole_sentence() -> None:
    assert whole_sentences("One. Two! Thr") == "One. Two!"
    assert whole_sentences("no end in sight") == "no end in sight"


@pytest.mark.parametrize("content", [None, b"", b" \n\n", b"\xff\xfe"])
def test_prompts_that_are_none_are_refused_by_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TrainingDataError, match=r"prompts\.txt"):
        read_prompts(path)


def test_the_demos_off_domain_chats_are_readable_and_apart() -> None:
    data = Path(__file__).resolve().parents[2] / "examples" / "demo" / "data"
    splits = read_splits([data], ["base"])
    questions = {split: {chat.messages[0]["content"] for chat in rows["base"]} for split, rows in splits.items()}
    assert len(questions["train"]) == 2000
    assert len(questions["validation"]) == 120
    assert not questions["train"] & questions["validation"]
