"""Columns for newcomers: the formula against numpy, who gets which tokens, and the canary's verdicts."""

import json
import random
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.routing import prompt_columns
from server.routing.chat_frame import ChatFrame
from server.routing.policy import BASE_ALIAS, GatePlan, Policy
from server.routing.prompt_columns import column_from_questions, judge_column, make_column, shares
from server.routing.prompt_course import prompt_course
from server.routing.prompt_gate import PromptGate
from server.routing.prompt_statistics import QuestionStatistics, summarise_questions
from server.routing.token_features import tilted

V = 40_000
"""Ids of most tokens stand for nothing, as in a real vocabulary."""
EMBEDDINGS = torch.randn(V, 8, generator=torch.Generator().manual_seed(0))
for _kind, _first in enumerate(range(0, 450, 50)):
    EMBEDDINGS[_first : _first + 50, _kind % 8] += 6.0
"""The words of a task are alike."""
NAMES = ("one", "two", "three")
FRAME = ChatFrame((396, 397), 398)
Floats = npt.NDArray[np.float64]


def questions(first: int, count: int, *, seed: int = 0, length: int = 12) -> list[list[int]]:
    """Half of the tokens are a task's own, 50 from `first` on; the others are everybody's, 300 to 349."""
    generator = random.Random(f"{first} {seed}")
    return [
        [generator.randrange(50) + (first if position % 2 else 300) for position in range(length)] for _ in range(count)
    ]


def trained(*, taught: int = 3) -> PromptGate:
    """A gate whose choices own the tokens 0 to 49, 50 to 99 and 100 to 149, with statistics of them."""
    scores = torch.zeros(V, 3)
    for choice in range(taught):
        scores[50 * choice : 50 * choice + 50, choice] = 3.0
    scores -= scores.mean(dim=1, keepdim=True)
    known = [(question, choice) for choice in range(3) for question in questions(50 * choice, 40)]
    return PromptGate(scores.half(), FRAME, statistics=summarise_questions(known, EMBEDDINGS, 3))


def statistics_of(gate: PromptGate) -> QuestionStatistics:
    assert gate.statistics is not None
    return gate.statistics


def column(gate: PromptGate, own: list[list[int]]) -> Tensor:
    return column_from_questions(own, gate, statistics_of(gate))


def rendered(own: list[list[int]]) -> list[list[int]]:
    return [[*FRAME.header, *question, FRAME.end, 1, 2] for question in own]


def test_the_column_is_the_log_mean_of_the_trained_ones_and_a_damped_log_ratio() -> None:
    """In float64 with numpy, but for the final rounding to float16; with what is like the examples, and without."""
    gate, own = trained(), [[200] * 12 + [7, V - 1], [200, 310]]
    statistics, scores = statistics_of(gate), gate.scores.double().numpy()
    assert statistics.features is not None
    ordinary = 0.6 * statistics.frequency.double().numpy() + 0.4 / V
    counts = np.bincount([*own[0], *own[1]], minlength=V).astype(np.float64)
    alike = tilted(torch.tensor(ordinary), statistics.features, torch.tensor(counts)).numpy()
    likely = 0.95 * ordinary + 0.05 * alike
    for prior, found in (
        (likely, column(gate, own)),
        (ordinary, column_from_questions(own, gate, replace(statistics, features=None))),
    ):
        _check_column(scores, counts, prior, ordinary, found)


def _check_column(scores: Floats, counts: Floats, prior: Floats, ordinary: Floats, found: Tensor) -> None:
    ratio = np.log((counts + 1500 * prior) / (16 + 1500) / ordinary)
    expected = np.log(np.exp(scores).mean(axis=1)) + 0.5 * np.minimum(ratio, 6)
    assert ratio.max() > 6, "the limit has something to do"
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-3, atol=1e-3)


def test_other_words_of_the_same_kind_are_the_newcomers_too() -> None:
    """Its examples had 10 of its 50 words: the embeddings say that the others are alike."""
    gate = trained()
    seen = [[200 + (index + position) % 10 for position in range(12)] for index in range(8)]
    unseen = [[220 + (index + position) % 30 for position in range(12)] for index in range(8)]
    assert shares(gate, column(gate, seen), unseen)[3] > 0.9
    without = column_from_questions(seen, gate, replace(statistics_of(gate), features=None))
    assert shares(gate, without, unseen)[3] == 0


def test_a_constant_per_token_in_the_trained_scores_changes_no_decision() -> None:
    """Scores mean something only in comparison; a column must not depend on how they were centred."""
    gate, own = trained(), questions(200, 8)
    shifted = replace(gate, scores=(gate.scores.float() + torch.linspace(-2, 2, V)[:, None]).half())
    for question in questions(200, 4, seed=1) + questions(50, 4, seed=1):
        before = gate.decide(question, [*gate.scores.unbind(dim=1), column(gate, own)]).choices
        assert shifted.decide(question, [*shifted.scores.unbind(dim=1), column(shifted, own)]).choices == before


def test_the_newcomers_questions_go_to_it_and_nobody_elses() -> None:
    gate = trained()
    own = column(gate, questions(200, 8))
    assert shares(gate, own, questions(200, 20, seed=1))[3] > 0.95
    for choice in range(3):
        foreign = questions(50 * choice, 20, seed=1)
        before, after = shares(gate, None, foreign), shares(gate, own, foreign)
        assert before[choice] == 1
        assert after[choice] > 0.97
        assert after[3] == 0


def test_tokens_that_say_nothing_leave_the_newcomer_no_better_than_the_others() -> None:
    """A question of words that neither the examples nor the training had."""
    gate = trained()
    assert shares(gate, column(gate, questions(200, 8)), [[360, 361, 362, 363]])[3] == 0


def test_ids_beyond_the_table_are_left_out() -> None:
    gate, own = trained(), questions(200, 4)
    assert torch.equal(column(gate, [*own, [V, V + 7, -1]]), column(gate, own))


def test_another_newcomer_changes_neither_column_nor_trained_decision() -> None:
    gate = trained()
    first, second = column(gate, questions(200, 8)), column(gate, questions(250, 8))
    plan = GatePlan(Policy.ROUTED, b"", allowed_slots=(1, 2, 3, 4))
    digests = {slot: f"d{slot}" for slot in range(6)}
    columns = {**gate.columns({1: 0, 2: 1, 3: 2}), 4: first}
    prompt = rendered(questions(200, 1, seed=3))[0]
    spans = prompt_course(gate, plan, columns, digests, prompt).spans
    assert [span.plan.slots for span in spans] == [(4,)]
    assert prompt_course(gate, plan, {**columns, 5: second}, digests, prompt).spans == spans, "it is not in the pool"
    both = replace(plan, allowed_slots=(1, 2, 3, 4, 5))
    assert [s.plan.slots for s in prompt_course(gate, both, {**columns, 5: second}, digests, prompt).spans] == [(4,)]


def test_a_sound_newcomer_passes() -> None:
    own, verdict = make_column(rendered(questions(200, 8)), trained(), NAMES)
    assert own is not None
    assert torch.equal(own, column(trained(), questions(200, 8)))
    facts = verdict.facts()
    assert facts["state"] == "passed"
    assert facts["reason"] is None
    assert facts["own_share"] > 0.5
    assert facts["own_lost_share"] == facts["most_taken_share"] == 0
    assert json.loads(json.dumps(facts)) == facts


def test_every_question_of_a_conversation_is_an_example() -> None:
    """And halves are of conversations: later questions may be unlike first ones."""
    gate, first, later = trained(), questions(200, 4), questions(150, 4, seed=2)
    prompts = [[*a, 3, *b] for a, b in zip(rendered(first), rendered(later), strict=True)]
    own, verdict = make_column(prompts, gate, NAMES)
    assert own is not None
    assert torch.equal(own, column(gate, [question for pair in zip(first, later, strict=True) for question in pair]))
    assert verdict.report is not None
    assert verdict.report.own_share > 0.5
    alone, verdict = make_column(prompts[:1], gate, NAMES)
    assert alone is None
    assert verdict.problems == ("1 of its examples have a question for the prompt gate; 2 are needed",)


def test_halves_of_the_examples_judge_each_other() -> None:
    """Every example of a kind of its own: a column knows its own examples, and tells nothing of others."""
    gate, own = trained(), [question for first in (150, 200) for question in questions(first, 1, length=40)]
    assert shares(gate, column(gate, own), own)[3] > 0.9
    report = judge_column(column(gate, own), [[question] for question in own], gate, statistics_of(gate), NAMES)
    assert report.own_share < 0.1


def test_a_newcomer_whose_questions_go_to_others_is_left_out() -> None:
    """They are the second choice's: half of each, and more than the newcomer's own words can outweigh."""
    own, verdict = make_column(rendered(questions(50, 2)), trained(), NAMES)
    assert own is None
    assert verdict.report is not None
    assert verdict.report.own_lost_share > prompt_columns.MAX_OWN_LOST
    facts = verdict.facts()
    assert facts["state"] == "refused"
    assert "of its own examples' question tokens to other adapters, more than 20 % allowed" in facts["reason"]


def test_what_goes_to_the_base_model_is_not_lost() -> None:
    """As above, but the second choice is the base model: the row decides about the answers."""
    gate = trained()
    own = questions(50, 2)
    names = [BASE_ALIAS if name == NAMES[1] else name for name in NAMES]
    report = judge_column(column(gate, own), [[question] for question in own], gate, statistics_of(gate), names)
    assert report.own_lost_share < prompt_columns.MAX_OWN_LOST
    assert report.own_share < 0.5


def test_a_newcomer_that_takes_a_trained_choices_questions_is_left_out() -> None:
    """The third choice has learnt nothing, so that nothing keeps its questions from a newcomer alike."""
    own, verdict = make_column(rendered(questions(100, 16, length=60)), trained(taught=2), NAMES)
    assert own is None
    assert verdict.report is not None
    assert verdict.report.most_taken == "three"
    assert (
        f"it would take {100 * verdict.report.most_taken_share:.1f} % of the question tokens of 'three', more than"
        in (verdict.facts()["reason"])
    )


def test_examples_without_questions_and_gates_without_statistics_are_told() -> None:
    gate = trained()
    own, verdict = make_column([[1, 2, 3], *rendered(questions(200, 1))], gate, NAMES)
    assert own is None
    assert verdict.problems == ("1 of its examples have a question for the prompt gate; 2 are needed",)
    own, verdict = make_column(rendered(questions(200, 8)), replace(gate, statistics=None), NAMES)
    assert own is None
    assert "lora-mixer-train background" in verdict.problems[0]
    assert verdict.report is None
