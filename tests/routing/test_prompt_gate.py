"""The prompt gate: smoothing against enumeration, where a question stands, and which tokens go to whom."""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from server.routing.chat_frame import ChatFrame
from server.routing.plan_course import ENDLESS, NO_TURNS, PlanSpan, clipped, plan_runs
from server.routing.policy import BASE_PLAN, BASE_SLOT, GatePlan, Policy, routed_plan
from server.routing.prompt_course import prompt_course
from server.routing.prompt_gate import PromptGate, PromptGateSettings, mixtures_of

FRAME = ChatFrame(header=(90, 91, 90), end=99, answer=(99, 61, 62))
DIGESTS = {1: "d1", 2: "d2"}
INDICES = {0: 0, 1: 1, 2: 2}
A, B, BASE, DULL = 10, 20, 0, 50
"""Tokens that speak for slot 1, slot 2, the base model, and nobody."""


def prompt_spans(*arguments: Any, **options: Any) -> tuple[PlanSpan, ...]:
    """Of a prompt in which no turn is due."""
    course = prompt_course(*arguments, **options)
    assert course.turns == NO_TURNS
    return course.spans


def make_gate(**settings: float) -> PromptGate:
    scores = torch.zeros(80, 3, dtype=torch.float16)
    scores[A, 1] = scores[B, 2] = scores[BASE, 0] = 4.0
    return PromptGate(scores, FRAME, replace(PromptGateSettings(), **settings))  # type: ignore[arg-type]


def make_plan(allowed: dict[int, str] = {0: "base", **DIGESTS}) -> GatePlan:  # noqa: B006  never changed
    return routed_plan(allowed, {slot: f"row {slot}" for slot in allowed}, 1, "settings", 2)


def prompt(question: list[int], opening: int = 5) -> list[int]:
    return [60] * (opening - 3) + list(FRAME.header) + question + [99, 61, 62]


def choices(question: list[int], *, opening: int = 5, gate: PromptGate | None = None) -> list[str]:
    """Who each token of the prompt up to the question's end goes to."""
    plan = make_plan()
    gate = gate or make_gate()
    spans = prompt_spans(gate, plan, gate.columns(INDICES), DIGESTS, prompt(question, opening))
    found = []
    for own, count in plan_runs(spans, plan, 0, opening + len(question)):
        name = "router" if own is plan else "base" if own is BASE_PLAN else DIGESTS[own.slots[0]]
        found += [name] * count
    return found


def test_a_newcomer_takes_over_where_a_line_begins() -> None:
    gate = replace(make_gate(), frame=replace(FRAME, line_ends=((DULL, 1),)))
    columns = [gate.scores[:, slot] for slot in (0, 1, 2)]
    cut = [A] * 6 + [B] * 5 + [A] * 6
    assert gate.decide(cut, columns).choices == [1] * 6 + [2] * 5 + [1] * 6
    assert gate.decide(cut, columns, newcomers=[2]).choices == [1] * 17, "not within another's line"
    lines = [A] * 6 + [DULL] + [B] * 5 + [DULL] + [A] * 6
    assert gate.decide(lines, columns, newcomers=[2]).choices == [1] * 7 + [2] * 6 + [1] * 6


def test_a_second_task_is_found_sooner_where_a_line_begins() -> None:
    frame = replace(FRAME, line_ends=((DULL, 1),))
    gate = replace(make_gate(), frame=frame)
    weak = {slot: column * 0.5 for slot, column in gate.columns(INDICES).items()}
    question = [A] * 4 + [DULL] + [B] * 3
    for own_gate, found in ((gate, [1] * 5 + [2] * 3), (replace(gate, frame=FRAME), [1] * 8)):
        assert own_gate.decide(question, [weak[slot] for slot in INDICES]).choices == found


@pytest.mark.parametrize("make", [list, tuple])
def test_the_first_question_is_found_between_header_and_end(make: type) -> None:
    tokens = [90, 91, 60, 90, 91, 90, 91, 7, 8, 99, 5, 90, 91, 90, 1, 99]
    assert FRAME.question(make(tokens)) == (6, 9), "half a header does not count, and the first whole one does"


@pytest.mark.parametrize(
    "tokens",
    [[], [1, 2, 3], [90, 91, 90], [90, 91, 90, 99], [90, 91, 90, 5, 6], [99, 90, 91]],
    ids=["nothing", "no header", "header at the end", "empty question", "no end", "cut header"],
)
def test_a_prompt_without_a_question_is_left_to_the_router(tokens: list[int]) -> None:
    assert FRAME.question(tokens) is None
    assert prompt_spans(make_gate(), make_plan(), make_gate().columns(INDICES), DIGESTS, tokens) == ()


def test_clear_stretches_go_to_one_adapter_and_the_opening_follows_the_first() -> None:
    assert choices([DULL, A, A, DULL, A]) == ["d1"] * 10


def test_a_question_may_change_its_task() -> None:
    assert choices([A] * 6 + [B] * 6) == ["d1"] * 11 + ["d2"] * 6


def test_later_questions_are_decided_by_themselves_and_change_nothing_before_them() -> None:
    """So that a conversation finds its earlier turns in the prefix cache. Answers themselves are the router's."""
    plan, gate = make_plan(), make_gate()
    first = prompt([A] * 4 + [B] * 4)
    answered = [*first, A, A, 99, 61]
    longer = [*answered, *FRAME.header, *[B] * 9, 99, 61, 62]
    longest = [*longer, B, 99, *FRAME.header, DULL, DULL, 99, 61, 62, B, 99, *FRAME.header, A, A, 99, 61]

    def owners(tokens: list[int]) -> list[str]:
        spans = prompt_spans(gate, plan, gate.columns(INDICES), DIGESTS, tokens)
        runs = plan_runs(spans, plan, 0, len(tokens))
        return ["router" if own is plan else DIGESTS[own.slots[0]] for own, count in runs for _ in range(count)]

    expected = ["d1"] * 9 + ["d2"] * 4 + ["d1"] * 3
    assert owners(first) == expected
    expected += ["router"] * 4 + ["d2"] * 15
    assert owners(longer) == expected
    assert owners(longest) == expected + ["router"] * 12 + ["d1"] * 5 + ["router"] * 2


def test_every_question_is_found_and_one_without_an_end_is_none() -> None:
    tokens = [*prompt([7, 8]), *FRAME.header, 99, *FRAME.header, 5, 99, *FRAME.header, 6]
    assert list(FRAME.user_messages(tokens)) == [(5, 7), (13, 13), (17, 18)]
    assert list(FRAME.user_messages(tuple(tokens[:8]))) == [(5, 7)]


def test_behind_an_empty_first_question_a_later_one_leads_nothing_but_its_own_header() -> None:
    gate, plan = make_gate(), make_plan()
    tokens = [*prompt([]), *FRAME.header, A, A, 99]
    runs = plan_runs(prompt_spans(gate, plan, gate.columns(INDICES), DIGESTS, tokens), plan, 0, len(tokens))
    assert [(None if own is plan else own.slots[0], count) for own, count in runs] == [(None, 8), (1, 5), (None, 1)]


def test_of_each_question_so_many_tokens_are_read() -> None:
    gate, plan = make_gate(max_question_tokens=3), make_plan()
    tokens = [*prompt([A] * 5), *FRAME.header, *[B] * 5, 99]
    runs = plan_runs(prompt_spans(gate, plan, gate.columns(INDICES), DIGESTS, tokens), plan, 0, len(tokens))
    assert [(None if own is plan else own.slots[0], count) for own, count in runs] == [
        (1, 8), (None, 2), (1, 3), (2, 6), (None, 3),
    ]  # fmt: skip


def test_of_two_choices_a_half_is_a_toss_up() -> None:
    """A pool of two would else leave nothing to the router."""
    scores = torch.tensor([[0.0, 0.0], [0.7, 0.3], [0.9, 0.1]]).clamp_min(1e-9).log()
    scores[0] = 0.0
    gate = PromptGate(scores, FRAME, PromptGateSettings(confidence=0.5))
    assert [gate.decide([token], scores.unbind(dim=1)).choices for token in (0, 1, 2)] == [[None], [None], [0]]
    sure = PromptGate(scores, FRAME, PromptGateSettings(confidence=0.95))
    assert sure.decide([2], scores.unbind(dim=1)).choices == [None]


def test_a_choice_needs_three_times_the_odds_of_chance() -> None:
    scores = torch.tensor([[0.59, 0.21, 0.2], [0.61, 0.2, 0.19]]).log()
    gate = PromptGate(scores, FRAME, PromptGateSettings(confidence=0.5, base_lead=1.0))
    for base in (None, 0):  # what leads is not surer for it
        found = [gate.decide([token], scores.unbind(dim=1), base=base).choices for token in (0, 1)]
        assert found == [[None], [0]], "odds of 3 / 2 among three"


def test_rough_scores_of_newcomers_must_be_surer() -> None:
    """And whatever may be theirs; what they have no part in is decided as without them."""
    columns = torch.tensor([[0.6, 0.2, 0.2], [0.8, 0.1, 0.1], [0.6, 0.38, 0.02]]).log().unbind(dim=1)
    gate = PromptGate(torch.zeros(3, 3), FRAME, PromptGateSettings(confidence=0.5))
    assert [gate.decide([token], columns).choices for token in (0, 1, 2)] == [[0], [0], [0]]
    assert [gate.decide([token], columns, newcomers=[2]).choices for token in (0, 1, 2)] == [[None], [0], [0]]
    assert [gate.decide([token], columns, newcomers=[0]).choices for token in (0, 1, 2)] == [[None], [0], [None]]
    assert gate.decide([0], columns, newcomers=[1, 2]).choices == [None]


def test_a_newcomer_that_has_a_question_for_certain_answers_it_alone() -> None:
    """Up to the next question; whatever is generated behind the last one too."""
    new, tokens = frozenset({2}), prompt([B] * 8)
    assert owners(tokens) == [2] * 16
    gate, plan = make_gate(), make_plan()

    def spans(tokens: list[int], newcomers: frozenset[int] = new) -> tuple[PlanSpan, ...]:
        return prompt_spans(gate, plan, gate.columns(INDICES), DIGESTS, tokens, newcomers=newcomers)

    assert [(span.stop, span.plan.slots) for span in spans(tokens)] == [(ENDLESS, (2,))]
    assert spans(tokens, frozenset()) == (PlanSpan(16, spans(tokens)[0].plan),), "a trained choice does not"
    later = [*tokens, DULL, DULL, 99, 63, *FRAME.header, A, A, A, A, 99, 61, 62]
    assert owners(later, newcomers=new) == [2] * 20 + [1] * 10, "what it answered is as it was generated"
    again = [*later, *FRAME.header, *[B] * 8, 99, 61, 62]
    assert [(span.stop, span.plan.slots) for span in spans(again)] == [(20, (2,)), (30, (1,)), (ENDLESS, (2,))]
    assert owners([*tokens, DULL, *FRAME.header, 99, 61, 62, DULL], newcomers=new) == [2] * 17 + [None] * 7
    assert [span.stop for span in spans(prompt([B, B, B, DULL, A, A]))][-1] < ENDLESS, "it has not all of it"
    assert gate.decide([B] * 8, list(gate.columns(INDICES).values()), newcomers=[2]).answers == 2
    weak = [column * 0.3 for column in gate.columns(INDICES).values()]
    assert gate.decide([B] * 2, weak, newcomers=[2]).answers is None


def test_where_a_question_may_be_a_newcomers_a_trained_choice_does_not_begin_the_answer() -> None:
    """A newcomer's questions that the gate gives to others are made good in the answer, which its row can still win."""
    gate, plan = make_gate(), make_plan()
    columns = gate.columns(INDICES)

    def header_of(new_score: float) -> tuple[int, ...]:
        columns[2] = columns[2].clone()
        columns[2][A] = new_score
        spans = prompt_spans(gate, plan, columns, DIGESTS, prompt([A] * 2), newcomers=frozenset({2}))
        return next(span.plan.slots for span in spans if span.stop >= 8) if spans[-1].stop > 7 else ()

    assert header_of(0.0) == header_of(2.0) == (1,), "of the latter the newcomer has less than two hundredths"
    assert header_of(2.5) == (), "and here nearly five"


def test_a_newcomer_has_no_part_in_the_answer_to_what_is_hardly_its_own() -> None:
    """Its row, of a few examples, takes tokens of nobody's answers; where it may be meant it keeps its chance."""
    gate, plan = make_gate(base_lead=0.0), make_plan()
    columns = gate.columns(INDICES)

    def course(question: list[int], tail: list[int] = [], **scores: float) -> tuple[PlanSpan, ...]:  # noqa: B006
        own = {0: columns[0].clone(), 1: columns[1], 2: columns[2].clone()}
        for slot, score in scores.items():
            own[int(slot[1:])][question[0]] = score
        tokens = [*prompt(question), *tail]
        return prompt_spans(gate, plan, own, DIGESTS, tokens, newcomers=frozenset({2}))

    sure, faint, likely = (course([BASE] * 2, s2=score) for score in (0.0, 1.5, 3.0))
    # The header is the base model's where no newcomer has a part; what is generated is the router's, without it.
    assert [(span.stop, span.plan.slots) for span in sure] == [(10, ()), (ENDLESS, (0, 1))]
    assert faint == sure
    assert [(span.stop, span.plan.slots) for span in likely] == [(7, ())], "it may be the newcomer's"
    left = sure[-1].plan
    assert left.policy is Policy.ROUTED
    assert left.fingerprint not in (plan.fingerprint, make_plan({0: "base", 1: "d1"}).fingerprint)
    assert (left.top_k, left.router_generation) == (plan.top_k, plan.router_generation)
    assert all(span.stop < ENDLESS for span in course([A] * 2)), "a trained choice's answers are as ever"
    later = course([BASE] * 2, [DULL, 99, 63, *FRAME.header, B, B, B, B, 99, 61, 62])
    assert later[:2] == (sure[0], PlanSpan(13, left)), "up to the next question"
    assert later[-1].plan.slots == (2,)
    without_newcomers = prompt_spans(gate, plan, columns, DIGESTS, prompt([BASE] * 2))
    assert without_newcomers == sure[:1]


def test_spans_are_clipped_to_what_they_concern() -> None:
    spans = (PlanSpan(3, BASE_PLAN), PlanSpan(ENDLESS, make_plan()))
    assert clipped(spans, 5) == (PlanSpan(3, BASE_PLAN), PlanSpan(5, make_plan()))
    assert clipped(spans, 3) == clipped(spans[:1], 9) == (PlanSpan(3, BASE_PLAN),)
    assert clipped(spans, 2) == (PlanSpan(2, BASE_PLAN),)


def test_the_base_model_leads_before_a_question_begins() -> None:
    gate = make_gate(base_lead=3.0)
    columns = [gate.scores[:, 1] * 0.5, gate.scores[:, 0]]  # two nats for the adapter
    assert gate.decide([A], columns).choices == [0]
    assert gate.decide([A], columns, base=1).choices == [None], "of two choices one must be surer"
    assert gate.decide([A] * 3, columns, base=1).choices == [0] * 3, "once, not at every token"
    posterior = gate.posterior([A], columns, base=1).tokens
    np.testing.assert_allclose(posterior[0, 1] / posterior[0, 0], math.exp(3.0 - 2.0), rtol=1e-6)
    dull_later = [*prompt([A] * 4), *FRAME.header, DULL, DULL, 99]
    assert owners(dull_later, gate=gate)[-3:] == [None] * 3, "to lead is not to be sure, in a small pool neither"
    leading_nobody = make_gate(base_lead=0.0).posterior([A], columns, base=1).tokens
    assert leading_nobody.tolist() == gate.posterior([A], columns).tokens.tolist()


def test_what_no_choice_is_sure_of_is_left_to_newcomers_it_may_be_of() -> None:
    columns = torch.tensor([[0.4, 0.4, 0.09, 0.11], [0.45, 0.46, 0.03, 0.06], [0.3, 0.0, 0.0, 0.7]]).clamp_min(1e-9)
    gate, scores = PromptGate(torch.zeros(3, 4), FRAME), columns.log().unbind(dim=1)

    def given(token: int, **options: Any) -> list[int | None]:
        return gate.decide([token], scores, base=1, base_takes_rest=True, **options).choices

    gate = replace(gate, settings=replace(gate.settings, confidence=0.9, base_lead=0.0))
    assert given(0) == given(1) == [1]
    assert given(0, newcomers=[3]) == [None]
    assert given(1, newcomers=[3]) == [1]
    assert given(0, newcomers=[2, 3]) == given(2, newcomers=[3]) == [None]
    assert gate.decide([1], scores, newcomers=[3]).choices == [None]


def test_what_speaks_for_the_base_model_gets_no_adapter() -> None:
    assert choices([BASE, BASE, BASE]) == ["base"] * 8


def owners(
    tokens: list[int], allowed: tuple[int, ...] = (0, 1, 2), *, gate: PromptGate | None = None, **options: Any
) -> list[int | None]:
    """The slot that each token of a prompt goes to; None where it is the router's."""
    gate = gate or make_gate()
    plan = make_plan({slot: f"d{slot}" for slot in allowed})
    spans = prompt_spans(gate, plan, gate.columns(INDICES), DIGESTS, tokens, **options)
    runs = plan_runs(spans, plan, 0, len(tokens))
    return [
        None if own is plan else own.slots[0] if own.slots else BASE_SLOT for own, count in runs for _ in range(count)
    ]


def test_a_first_question_that_says_nothing_is_the_base_models() -> None:
    """Nobody's, most likely; the answer, its header included, stays the router's."""
    dull = prompt([DULL] * 4)
    assert owners(dull) == [BASE_SLOT] * 9 + [None] * 3
    assert owners(dull, newcomers=frozenset({2})) == [None] * 12, "it may be a newcomer's"
    assert owners(dull, newcomers=frozenset({99})) == [BASE_SLOT] * 9 + [None] * 3, "who is not in the pool"
    assert owners(dull, (1, 2)) == [None] * 12, "the base model is no choice"
    assert owners([*prompt([A] * 4), *FRAME.header, DULL, DULL, 99]) == [1] * 12 + [None] * 6, "it has a conversation"
    assert owners([*prompt([]), *FRAME.header, DULL, DULL, 99]) == [None] * 14


def test_beside_clear_stretches_what_says_nothing_is_left_to_the_router() -> None:
    found = choices([A] * 4 + [DULL] * 9 + [B] * 4, gate=make_gate(switch=0.2))
    assert found[:9] == ["d1"] * 9
    assert found[13] == "router"
    assert found[-4:] == ["d2"] * 4


def test_the_answers_header_follows_the_first_adapter() -> None:
    """Of two tasks in one question the first is answered first, and the base model's stretch may be a greeting."""
    assert owners(prompt([A] * 6 + [B] * 6)) == [1] * 11 + [2] * 6 + [1] * 3
    assert owners(prompt([BASE] * 6 + [B] * 6)) == [BASE_SLOT] * 11 + [2] * 9
    assert owners(prompt([B] * 6 + [BASE] * 6)) == [2] * 11 + [BASE_SLOT] * 6 + [2] * 3
    assert owners(prompt([BASE] * 6)) == [BASE_SLOT] * 14, "and what is nobody's for certain is answered as such"
    assert owners([*prompt([A] * 4)[:-1], 63]) == [1] * 9 + [None] * 3, "another header"
    assert owners(prompt([A] * 4)[:-1]) == [1] * 9 + [None] * 2, "half a header"
    gate = make_gate(max_question_tokens=2)
    spans = prompt_spans(gate, make_plan(), gate.columns(INDICES), DIGESTS, prompt([A] * 4))
    assert [(span.stop, span.plan.slots) for span in spans] == [(7, (1,)), (9, (0, 1, 2)), (12, (1,))]


def test_where_it_is_not_sure_the_likeliest_act_by_their_shares() -> None:
    posterior = np.array([[0.0, 0.6, 0.4], [0.85, 0.1, 0.05], [0.6, 0.38, 0.02], [0.1, 0.79, 0.11], [1 / 3] * 3])
    assert mixtures_of(posterior, 2) == [
        ((1, 0.625), (2, 0.375)),
        ((0, 1.0),),
        ((0, 0.625), (1, 0.375)),
        ((1, 1.0),),
        ((0, 0.5), (1, 0.5)),
    ]
    assert mixtures_of(posterior, 2, base=1)[:3] == [((1, 1.0),), ((0, 1.0),), ((0, 1.0),)], "it is no adapter"
    assert mixtures_of(posterior, 3)[4] == ((0, 0.5), (1, 0.25), (2, 0.25))


@pytest.mark.parametrize("most", [1, 2, 3, 9])
def test_weights_of_a_mixture_are_a_routers(most: int) -> None:
    """At most k, none negative, and of all together one."""
    posterior = np.random.default_rng(5).dirichlet([0.5] * 9, size=300)
    for base in (None, 4):
        for mixture, row in zip(mixtures_of(posterior, most, base), posterior, strict=True):
            weights = dict(mixture)
            assert len(weights) <= most
            assert min(weights.values()) > 0
            assert sum(weights.values()) == 1.0
            assert weights[int(row.argmax())] == max(weights.values())
            assert base not in weights or mixture == ((base, 1.0),)


def weights_along(tokens: list[int], **settings: float) -> list[dict[int, float] | None]:
    """What acts on each token of a prompt; None where the router decides."""
    gate, plan = make_gate(**settings), make_plan()
    weak = {slot: column * 0.2 for slot, column in gate.columns(INDICES).items()}
    spans = prompt_spans(gate, plan, weak, DIGESTS, tokens)
    return [
        None if own is plan else dict(own.weights)
        for own, n in plan_runs(spans, plan, 0, len(tokens))
        for _ in range(n)
    ]


def test_an_unsure_question_and_its_header_follow_a_mixture() -> None:
    """0.8 nats a token: of three for one choice and two for another; the base model's part is no adapter's."""
    mixture = {1: 0.75, 2: 0.25}
    assert weights_along(prompt([A, A, A, B, B]), base_lead=0.0) == [mixture] * 13
    assert weights_along(prompt([BASE, BASE, BASE, A, A]), base_lead=0.0) == [{}] * 13
    assert weights_along(prompt([A, A, A, BASE, BASE]), base_lead=0.0) == [{1: 1.0}] * 13
    assert weights_along(prompt([A, A, A, A]), base_lead=0.0) == [{1: 1.0}] * 12, "it is sure"


def test_equal_mixtures_are_one_plan() -> None:
    """A batch has a row of gates per plan, and the prefix cache compares them."""
    gate, plan = make_gate(base_lead=0.0), make_plan()
    weak = {slot: column * 0.2 for slot, column in gate.columns(INDICES).items()}
    spans = prompt_spans(gate, plan, weak, DIGESTS, prompt([A, A, A, B, B]))
    assert [(span.stop, span.plan.policy) for span in spans] == [(13, Policy.WEIGHTED)]
    spans = prompt_spans(gate, replace(plan, top_k=1), weak, DIGESTS, prompt([A, A, A, B, B]))
    assert [(span.stop, span.plan.weights) for span in spans] == [(13, ((1, 1.0),))], "the request's k"


def test_the_header_follows_who_is_likely_first_and_not_who_is_sure_later() -> None:
    """A first task too short to be sure of, and a clear second one: the answer begins with the first task's."""
    gate = make_gate(base_lead=0.0, switch=0.05, switch_at_lines=0.05)
    columns = list(gate.columns(INDICES).values())
    reading = gate.decide([A] + [DULL] * 3 + [B] * 8, [columns[0], columns[1] * 0.6, columns[2]])
    assert reading.choices[0] is None
    assert set(reading.choices) == {None, 2}
    assert reading.first is not None
    assert dict(reading.first) == {1: 0.625, 2: 0.375}
    assert gate.decide([DULL], columns).first is None, "nothing is sure"


def test_a_gate_that_knows_no_header_leaves_answers_to_the_router() -> None:
    record = make_gate().record()
    for later in ("answer", "line_ends", "answer_ends", "switch_at_lines", "base_lead"):
        del record[later]
    earlier = PromptGate.from_record(record, make_gate().scores)
    assert earlier.settings.base_lead == 0
    spans = prompt_spans(earlier, make_plan(), earlier.columns(INDICES), DIGESTS, prompt([A] * 4))
    assert [(span.stop, span.plan.slots) for span in spans] == [(9, (1,))]
    assert earlier.fingerprint != make_gate().fingerprint


def test_a_gate_of_fewer_choices_keeps_what_is_theirs() -> None:
    gate = replace(make_gate(), answer_ends=(0, 1, 2))
    smaller = gate.restricted([0, 2])
    assert smaller.answer_ends == (0, 2)
    assert torch.equal(smaller.scores, gate.scores[:, [0, 2]])
    assert (smaller.frame, smaller.settings, smaller.statistics) == (gate.frame, gate.settings, None)
    assert make_gate().restricted([1]).answer_ends == ()


def test_a_long_opening_is_left_to_the_router() -> None:
    assert choices([A, A, A], opening=64)[0] == "d1"
    assert choices([A, A, A], opening=65) == ["router"] * 65 + ["d1"] * 3


def test_only_so_many_tokens_of_a_question_are_read() -> None:
    assert choices([A] * 6, gate=make_gate(max_question_tokens=4)) == ["d1"] * 9 + ["router"] * 2


def test_ids_beyond_the_table_say_nothing() -> None:
    assert choices([A, A, 10**6, A]) == ["d1"] * 9


def test_an_allowed_slot_without_scores_silences_the_gate() -> None:
    plan = make_plan({0: "base", **DIGESTS, 3: "newcomer"})
    assert prompt_spans(make_gate(), plan, make_gate().columns(INDICES), DIGESTS, prompt([A] * 5)) == ()


def test_a_slot_outside_the_pool_gets_nothing() -> None:
    plan = make_plan({0: "base", 2: "d2"})
    spans = prompt_spans(make_gate(), plan, make_gate().columns(INDICES), DIGESTS, prompt([A] * 5))
    assert all(1 not in span.plan.slots for span in spans)


def test_spans_of_equal_gates_have_equal_fingerprints_in_any_slot() -> None:
    spans = prompt_spans(make_gate(), make_plan(), make_gate().columns(INDICES), DIGESTS, prompt([A] * 5))
    elsewhere = routed_plan({4: "d1"}, {4: "row"}, 1, "settings", 2)
    moved = prompt_spans(make_gate(), elsewhere, make_gate().columns({4: 1}), {4: "d1"}, prompt([A] * 5))
    assert spans[0].plan.fingerprint == moved[0].plan.fingerprint
    assert moved[0].plan.policy is Policy.PINNED


def test_runs_cover_every_token_once() -> None:
    plan, other = make_plan(), BASE_PLAN
    spans = (PlanSpan(3, other), PlanSpan(5, plan), PlanSpan(8, other))
    whole = [own for own, count in plan_runs(spans, plan, 0, 12) for _ in range(count)]
    assert whole == [other] * 3 + [plan] * 2 + [other] * 3 + [plan] * 4
    for start, stop in itertools.combinations(range(13), 2):
        assert [own for own, count in plan_runs(spans, plan, start, stop) for _ in range(count)] == whole[start:stop]
    assert plan_runs((), plan, 2, 5) == [(plan, 3)]


def test_a_gate_without_a_header_is_refused() -> None:
    record = make_gate().record()
    changes: list[dict[str, Any]] = [{"header": []}, {"switch": 0.0}, {"confidence": 1.5}, {"unknown": 1}]
    changes += [{"answer": [61, 99]}, {"answer": 3}, {"switch_at_lines": 1.0}, {"line_ends": [3]}]
    changes += [{"base_lead": -1.0}, {"base_lead": math.inf}]
    changes += [{"answer_ends": [1, 1, -1]}, {"answer_ends": 1}]
    changes += [{"max_question_tokens": 0}, {"max_question_tokens": 2.5}, {"max_opening_tokens": -1}]
    for broken in changes:
        with pytest.raises((ValueError, TypeError)):
            PromptGate.from_record({**record, **broken}, make_gate().scores)
    assert PromptGate.from_record(record, make_gate().scores).record() == record
    told = replace(make_gate(), frame=replace(FRAME, line_ends=((40, 1), (41, 2))), answer_ends=(0, 1, 2))
    again = PromptGate.from_record(told.record(), told.scores)
    assert (again.frame, again.answer_ends) == (told.frame, told.answer_ends)
    assert len({told.fingerprint, make_gate().fingerprint, replace(told, answer_ends=()).fingerprint}) == 3
