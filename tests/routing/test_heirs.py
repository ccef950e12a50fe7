"""A next version of a trained adapter: whose row it gets, and what its canary asks."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from server.routing.background import Background, GateBackground, summarise_gate
from server.routing.chat_frame import ChatFrame
from server.routing.heirs import inherited_row, judge_heir, judge_heirs_column, predecessor_of
from server.routing.prompt_gate import PromptGate
from server.routing.prompt_statistics import summarise_questions
from server.routing.prototypes import judge, win_rate
from server.routing.router import ArtefactAdapter, RouterArtefact

D = 8
NAMES = ("one", "two", "three")
FRAME = ChatFrame((396, 397), 398)


def of_class(index: int, count: int, seed: int = 0) -> Tensor:
    inputs = torch.randn(count, D, generator=torch.Generator().manual_seed(10 * seed + index))
    inputs[:, index] += 6
    return inputs


def make_artefact(gate: PromptGate | None = None) -> RouterArtefact:
    return RouterArtefact(
        base_model="base",
        hidden_size=D,
        num_layers=1,
        granularity="layer",
        top_k=1,
        temperature=1.0,
        adapters=tuple(ArtefactAdapter(name, f"{name}'s digest") for name in NAMES),
        rows={"layer.0": 2 * torch.eye(3, D)},
        prompt_gate=gate,
    )


def make_gate() -> tuple[PromptGate, list[list[list[int]]]]:
    """Every choice has ten tokens of its own; and questions of each."""
    scores = torch.zeros(400, 3)
    for choice in range(3):
        scores[10 * choice : 10 * choice + 10, choice] = 6.0
    asked = [[[10 * choice + (start + step) % 10 for step in range(6)] for start in range(8)] for choice in range(3)]
    known = [(question, choice) for choice, questions in enumerate(asked) for question in questions]
    embeddings = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    return PromptGate(scores.half(), FRAME, statistics=summarise_questions(known, embeddings, 3)), asked


def background() -> Background:
    inputs = torch.cat([of_class(index, 40) for index in range(3)])
    gate = summarise_gate(inputs, torch.arange(120), make_artefact().rows["layer.0"], 1.0)
    return Background({"layer.0": gate}, torch.arange(3).repeat_interleave(40))


def rendered(questions: list[list[int]]) -> list[list[int]]:
    return [[*FRAME.header, *question, FRAME.end, 1, 2] for question in questions]


def test_a_predecessor_has_the_name_and_is_registered_no_more() -> None:
    artefact = make_artefact()
    assert predecessor_of(artefact, "two", {"new digest", "one's digest"}) == 1
    assert predecessor_of(artefact, "two", {"two's digest"}) is None, "under whatever name: it needs its row itself"
    assert predecessor_of(artefact, "four", set()) is None
    alone = replace(artefact, adapters=artefact.adapters[1:2], rows={"layer.0": torch.ones(1, D)})
    assert predecessor_of(alone, "two", set()) is None, "nobody is left to be told from"


def test_the_row_and_the_scores_are_the_trained_ones() -> None:
    gate, _ = make_gate()
    artefact = make_artefact(gate)
    row = inherited_row(artefact, 1)
    inputs = of_class(1, 5)
    assert torch.equal(row.columns["layer.0"].logits(inputs), torch.mv(inputs, artefact.rows["layer.0"][1]))
    assert row.prompt_column is not None
    assert torch.equal(row.prompt_column, gate.scores[:, 1])
    assert row.digest != artefact.row_digests()["two's digest"], "cached K/V of the old version is not the new one's"
    assert inherited_row(make_artefact(), 1).prompt_column is None


@pytest.mark.parametrize("index", [0, 1, 2])
def test_an_heir_of_the_same_task_passes_and_is_judged_as_if_the_old_version_were_gone(index: int) -> None:
    artefact, examples = make_artefact(), {"layer.0": of_class(index, 30, seed=1)}
    row = inherited_row(artefact, index)
    report = judge_heir(row, artefact, background(), index, examples)
    assert not report.problems
    kept = [place for place in range(3) if place != index]
    rows = {"layer.0": artefact.rows["layer.0"][kept]}
    whole = background()
    chosen = torch.cat([torch.arange(40 * place, 40 * place + 40) for place in kept])
    gate: GateBackground = replace(whole.gates["layer.0"], states=whole.gates["layer.0"].states[chosen])
    others = Background({"layer.0": gate}, torch.arange(2).repeat_interleave(40))
    names = [NAMES[place] for place in kept]
    expected = judge(row, rows, others, names, top_k=1, own_win_rate=win_rate(row, examples, rows))
    assert vars(report) == vars(expected)
    assert expected.own_win_rate is not None
    assert expected.own_win_rate > 0.9


def test_an_heir_of_another_task_is_refused_with_numbers() -> None:
    artefact = make_artefact()
    row = inherited_row(artefact, 1)
    report = judge_heir(row, artefact, background(), 1, {"layer.0": of_class(2, 30, seed=1)})
    assert report.problems[0].startswith("its gate row wins ")
    assert report.problems[0].endswith("% of its own examples' tokens, below 50 %")


def test_what_a_trained_row_takes_from_others_is_no_reason_to_refuse_it() -> None:
    artefact = make_artefact()
    greedy = replace(artefact, rows={"layer.0": artefact.rows["layer.0"].clone()})
    greedy.rows["layer.0"][1, 0] = 3.0
    report = judge_heir(inherited_row(greedy, 1), greedy, background(), 1, {"layer.0": of_class(1, 30, seed=1)})
    assert report.most_captured == "one"
    assert report.most_captured_share > 0.9
    assert not report.problems


def test_the_prompt_gate_must_know_the_questions_for_the_predecessors() -> None:
    gate, asked = make_gate()
    passed = judge_heirs_column(gate, 1, rendered(asked[1]), NAMES)
    assert not passed.problems
    assert passed.report is not None
    assert (passed.report.own_share, passed.report.own_lost_share, passed.report.most_taken_share) == (1, 0, 0)
    refused = judge_heirs_column(gate, 1, rendered(asked[2]), NAMES)
    assert refused.problems[0].startswith("the prompt gate knows 0 % of its examples' question tokens for its pred")
    assert "100 % of its own examples' question tokens to other adapters" in refused.problems[1]
    unknown = judge_heirs_column(gate, 1, rendered([[300, 301, 302]] * 4), NAMES)
    assert len(unknown.problems) == 1, "nobody's questions: nothing is lost, and yet they are not its predecessor's"
    without = judge_heirs_column(replace(gate, statistics=None), 1, rendered(asked[1]), NAMES)
    assert not without.problems
    assert judge_heirs_column(gate, 1, [[1, 2, 3]], NAMES).problems == (
        "none of its examples has a question for the prompt gate",
    )
