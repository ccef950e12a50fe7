"""Newcomers to a prompt gate, from adapters.yaml to the table in a document, on a tiny model."""

import json
from pathlib import Path

import pytest

from router_training import prompt_leave_one_out
from router_training.data import read_splits
from router_training.mixing import draw_question_mixes, encode_mix, question_settings
from router_training.prompt_leave_one_out import TABLE_END, TABLE_START, gather
from router_training.settings import TrainingConfig
from server.config import load_config
from server.model.loader import load_base_model
from tests.router_training.conftest import chat_line

pytestmark = pytest.mark.usefixtures("short_fits")


def arguments(project: Path, *more: str) -> list[str]:
    paths = ["--config", str(project / "adapters.yaml"), "--data", str(project / "data")]
    return [*paths, "--out", str(project / "out.json"), "--samples", "2", *more]


@pytest.fixture
def filled(project: Path) -> Path:
    """The project with enough chats."""
    for name in ("letters", "digits"):
        lines = "".join(chat_line(name, index) for index in range(90))
        (project / "data" / name / "train.jsonl").write_text(lines, encoding="utf-8")
    return project


def test_gates_are_fitted_on_the_mix_that_training_fits_them_on(filled: Path) -> None:
    """The router's is smaller, and its chats are shorter."""
    config = load_config(filled / "adapters.yaml")
    settings = TrainingConfig(prompt_gate=True, samples=2, max_length=8)
    material = gather(config, [filled / "data"], settings, rows=1)
    mixes = draw_question_mixes(read_splits([filled / "data"], list(material.tasks))["train"], settings)
    loaded = load_base_model(config.base_model, device="cpu", cache_folder=filled, root=config.root)
    labels = {task: label for label, task in enumerate(material.tasks)}
    whole = question_settings(settings)
    drawn = [encode_mix(mix, labels, loaded.tokenizer, loaded.eos_token_ids, whole) for mix in mixes]
    assert material.draws == drawn
    assert {len(sequences) for sequences in drawn} == {180}


def test_every_adapter_is_a_newcomer_once_and_the_table_lands_in_the_document(filled: Path) -> None:
    document = filled / "doc.md"
    document.write_text(f"before\n{TABLE_START}old\n{TABLE_END}after\n", encoding="utf-8")
    prompt_leave_one_out.main(arguments(filled, "--document", str(document)))
    whole = json.loads((filled / "out.json").read_text(encoding="utf-8"))
    assert whole["settings"]["prompt_gate"] is True
    record = whole["adapters"]
    assert set(record) == {"letters", "digits"}
    for name, other in (("letters", "digits"), ("digits", "letters")):
        case = record[name]
        assert case["without"][name] == {"own": 0, "others": 1, "router": 0}, "the only choice left is sure of all"
        assert case["without"][other]["own"] == 1
        assert set(case["examples"]) == {"4", "16", "64"}
        found = case["examples"]["64"]["tokens"]
        assert found[name]["own"] > case["without"][name]["own"]
        assert found[name]["others"] < 1
        for values in found.values():
            assert sum(values.values()) == pytest.approx(1)
    text = document.read_text(encoding="utf-8")
    assert "old" not in text
    share = 100 * record["letters"]["examples"]["64"]["tokens"]["letters"]["own"]
    assert f"{share:.0f} / " in text
