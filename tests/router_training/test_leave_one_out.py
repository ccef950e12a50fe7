"""The leave-one-out experiment from adapters.yaml to the table in a document, on a tiny model."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml

from router_training import leave_one_out
from router_training.data import TrainingDataError, read_splits
from router_training.run import load_with_progress
from server.config import load_config
from server.routing.router import load_artefact, save_artefact
from tests.router_training.conftest import chat_line
from tests.router_training.test_run import QUICK, run

pytestmark = pytest.mark.usefixtures("short_fits")


@pytest.fixture(params=[[], ["--prompt-gate"]], ids=["router", "router and prompt gate"])
def trained(project: Path, request: pytest.FixtureRequest) -> Path:
    """The project with enough chats and a trained router."""
    for name in ("letters", "digits"):
        lines = "".join(chat_line(name, index) for index in range(90))
        (project / "data" / name / "train.jsonl").write_text(lines, encoding="utf-8")
    assert (
        run(project, "train", "--out", str(project / "router"), "--validation-rows", "1", *request.param, *QUICK) == 0
    )
    config = project / "adapters.yaml"
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    config.write_text(yaml.safe_dump({**content, "router": "router"}), encoding="utf-8")
    return project


def arguments(project: Path, *more: str) -> list[str]:
    paths = ["--config", str(project / "adapters.yaml"), "--data", str(project / "data")]
    return [*paths, "--out", str(project / "out.json"), *more]


def test_every_adapter_is_left_out_and_the_table_lands_in_the_document(trained: Path) -> None:
    document = trained / "doc.md"
    document.write_text(f"before\n{leave_one_out.TABLE_START}old\n{leave_one_out.TABLE_END}after\n", encoding="utf-8")
    leave_one_out.main(arguments(trained, "--document", str(document)))
    record = json.loads((trained / "out.json").read_text(encoding="utf-8"))["adapters"]
    assert set(record) == {"letters", "digits"}
    for name, case in record.items():
        assert set(case["examples"]) == {"0", "4", "16", "64"}
        assert case["without_row"][name] != case["examples"]["64"]["nll"][name], "the hot row takes part"
        assert case["examples"]["0"]["own_win_rate"] is None
        verdicts = [case["examples"][count]["prompt_gate"] for count in ("0", "64")]
        if load_artefact(trained / "router").prompt_gate is None:
            assert verdicts == [None, None]
        else:
            assert verdicts[0]["state"] == "refused"
            assert 0 <= verdicts[1]["own_share"] <= 1
    text = document.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    letters = record["letters"]
    assert f"{letters['examples']['16']['nll']['letters'] / letters['pinned']:.2f}" in text


def test_the_server_side_of_a_held_out_adapter_keeps_the_other_columns(trained: Path) -> None:
    """Of two adapters one is left: the gate gives every question to it, until the newcomer's column takes part."""
    artefact = load_artefact(trained / "router")
    if artefact.prompt_gate is None:
        pytest.skip("this router has no prompt gate")
    smaller = leave_one_out.without_row(artefact, 0).prompt_gate
    assert smaller is not None
    assert torch.equal(smaller.scores, artefact.prompt_gate.scores[:, 1:])
    assert smaller.statistics is None, "they knew the adapter"


def test_a_newcomer_stands_beside_a_router_that_was_trained_with_it(trained: Path) -> None:
    """The router knows `digits` alone; what a router that knows both makes of the same chats is the last column."""
    roster = load_with_progress(load_config(trained / "adapters.yaml", {}))
    train = read_splits([trained / "data"], roster.names)["train"]
    label = roster.label_of_task["letters"]
    smaller = leave_one_out.HeldOut(roster, load_artefact(trained / "router"), label, train).artefact
    save_artefact(dataclasses.replace(smaller, top_k=1), trained / "smaller")
    content = yaml.safe_load((trained / "adapters.yaml").read_text(encoding="utf-8"))
    (trained / "adapters.yaml").write_text(yaml.safe_dump({**content, "router": "smaller"}), encoding="utf-8")
    leave_one_out.main(arguments(trained, "--only", "letters", "--retrained", str(trained / "router")))
    record = json.loads((trained / "out.json").read_text(encoding="utf-8"))
    case = record["adapters"]["letters"]
    assert case["trained_row"] is None, "a true newcomer"
    assert set(case["retrained"]) == {"letters", "digits"}
    assert case["retrained"]["letters"] != case["without_row"]["letters"]
    header, _, row = leave_one_out.table(record).splitlines()
    assert header.split("|")[-3].strip() == "retrained"
    assert row.split("|")[-3].strip() == f"{case['retrained']['letters'] / case['pinned']:.2f}"


@pytest.mark.parametrize("name", ["leave_one_out", "leave_one_out_prompt_gate", "leave_one_out_of_training"])
def test_the_document_shows_what_was_recorded(name: str) -> None:
    root = Path(__file__).parents[2]
    record = json.loads((root / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))
    assert leave_one_out.table(record) in (root / "docs/hot-routing.md").read_text(encoding="utf-8")


def test_too_few_chats_are_named(trained: Path) -> None:
    path = trained / "data/letters/train.jsonl"
    path.write_text("".join(chat_line("letters", index) for index in range(30)), encoding="utf-8")
    with pytest.raises(TrainingDataError, match="'letters' has too few training chats"):
        leave_one_out.main(arguments(trained, "--only", "letters"))
