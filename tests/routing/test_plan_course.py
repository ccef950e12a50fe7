"""Whose turn it is in an answer to several tasks: line ends one by one, and a generated answer beside the same one in a
later prompt."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from server.routing.chat_frame import ChatFrame
from server.routing.plan_course import NO_COURSE, NO_TURNS, AnswerTurns, PlanCourse, PlanSpan, Turn, plan_runs
from server.routing.policy import BASE_PLAN, GatePlan, Policy, fixed_plan, routed_plan
from server.routing.prompt_course import prompt_course
from server.routing.prompt_gate import PromptGate, PromptGateSettings

LINE, EMPTY, DULL, END = 40, 41, 50, 99
FRAME = ChatFrame(header=(90, 91), end=END, answer=(END, 61), line_ends=((LINE, 1), (EMPTY, 2)))
DIGESTS = {1: "d1", 2: "d2", 3: "d3"}
ONE, TWO, THREE = (fixed_plan(Policy.PINNED, {slot: 1.0}, DIGESTS) for slot in DIGESTS)
A, B, C = 10, 20, 30
"""Tokens that speak for slots 1, 2 and 3."""
DOUBTFUL = 11
"""Speaks for slot 1, and nearly as much for slot 3."""
OWN = routed_plan({0: "base", **DIGESTS}, {slot: f"row {slot}" for slot in range(4)}, 1, "settings", 2)


def begun(turns: AnswerTurns, *tokens: int) -> list[GatePlan | None]:
    """Plan of the turn that each token begins or belongs to."""
    found = []
    for token in tokens:
        turns = turns.after(token)
        found.append(turns.begun)
    return found


def test_a_turn_begins_at_as_many_line_ends_as_the_answer_before_it_never_holds() -> None:
    one_line = AnswerTurns(FRAME, (Turn(1, TWO),))
    assert begun(one_line, DULL, LINE, DULL, LINE) == [None, TWO, None, None]
    many_lines = AnswerTurns(FRAME, (Turn(2, TWO),))
    assert begun(many_lines, LINE, DULL, LINE, DULL, EMPTY, DULL) == [None, None, None, None, TWO, None]
    assert begun(many_lines, LINE, LINE, DULL) == [None, TWO, None], "two tokens may make one empty line"


def test_line_ends_in_a_row_are_one_turn() -> None:
    turns = AnswerTurns(FRAME, (Turn(1, TWO), Turn(1, THREE)))
    assert begun(turns, LINE, LINE, EMPTY, DULL, LINE, DULL) == [TWO, TWO, TWO, None, THREE, None]


def test_no_turn_is_left_behind_the_answers_end() -> None:
    turns = AnswerTurns(FRAME, (Turn(1, TWO),)).after(END)
    assert turns == NO_TURNS
    assert begun(turns, LINE, EMPTY) == [None, None]


def test_an_ordinary_token_costs_no_new_object() -> None:
    course = PlanCourse((PlanSpan(3, ONE),), AnswerTurns(FRAME, (Turn(1, TWO),)))
    assert course.after(DULL, 7, OWN) is course
    assert NO_COURSE.after(LINE, 7, OWN) is NO_COURSE


def test_the_line_ends_that_begin_a_turn_are_its_own_stretch() -> None:
    course = PlanCourse((PlanSpan(3, ONE),), AnswerTurns(FRAME, (Turn(1, TWO),)))
    first = course.after(LINE, 5, OWN)
    assert first.spans == (PlanSpan(3, ONE), PlanSpan(5, OWN), PlanSpan(6, TWO))
    assert first.after(LINE, 6, OWN).spans == (PlanSpan(3, ONE), PlanSpan(5, OWN), PlanSpan(7, TWO))
    assert course.after(LINE, 3, OWN).spans == (PlanSpan(3, ONE), PlanSpan(4, TWO)), "right behind the prompt"
    assert [first.plan_at(position, OWN) for position in (2, 4, 5, 6)] == [ONE, OWN, TWO, OWN]


def make_gate() -> PromptGate:
    scores = torch.zeros(80, 4, dtype=torch.float16)
    scores[A, 1] = scores[B, 2] = scores[C, 3] = scores[0, 0] = scores[DOUBTFUL, 1] = 4.0
    scores[DOUBTFUL, 3] = 3.5
    return PromptGate(scores, FRAME, PromptGateSettings())


def read(tokens: list[int], ends: dict[int, int] = {1: 1, 2: 2, 3: 1}, **options: Any) -> PlanCourse:  # noqa: B006
    gate = make_gate()
    return prompt_course(
        gate, OWN, gate.columns({slot: slot for slot in range(4)}), DIGESTS, tokens, answer_ends=ends, **options
    )


def question(*tasks: int) -> list[int]:
    """A prompt that asks them, six tokens each, up to where its answer begins."""
    return [60, *FRAME.header, *(task for task in tasks for _ in range(6)), *FRAME.answer]


def owners(tokens: list[int], course: PlanCourse) -> list[str]:
    names = {OWN.fingerprint: "router", BASE_PLAN.fingerprint: "base", ONE.fingerprint: "1", TWO.fingerprint: "2"}
    runs = plan_runs(course.spans, OWN, 0, len(tokens))
    return [names.get(plan.fingerprint, "3") for plan, count in runs for _ in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_runs_are_those_of_the_tokens_one_by_one(seed: int) -> None:
    """Whatever stretch is asked for: its ends fall on those of spans, between them and behind the last."""
    chance = random.Random(seed)
    stops = sorted(chance.sample(range(1, 30), chance.randrange(8)))
    spans = [PlanSpan(stop, chance.choice([ONE, TWO, OWN])) for stop in stops]
    owners = [next((span.plan for span in spans if position < span.stop), OWN) for position in range(40)]
    for start in range(40):
        for stop in range(start + 1, 41):
            runs = plan_runs(spans, OWN, start, stop)
            assert [plan for plan, count in runs for _ in range(count)] == owners[start:stop]
            assert all(count > 0 for _, count in runs)


def test_tasks_wait_in_the_order_of_the_question() -> None:
    assert read(question(A, B, C)).turns == AnswerTurns(FRAME, (Turn(1, TWO), Turn(2, THREE)))
    assert read(question(B, 0, A)).turns.waiting == (Turn(2, ONE),), "the base model's stretch is no task"
    assert read(question(A)).turns == read(question(0)).turns == NO_TURNS
    assert read(question(A, B)[:-1]).turns == NO_TURNS, "no answer has begun"


def test_behind_an_answer_of_which_nothing_is_known_nobody_has_a_turn() -> None:
    assert read(question(B, A), {1: 1}).turns == NO_TURNS
    assert read(question(A, B, C), {1: 1}).turns.waiting == (Turn(1, TWO),)


def test_where_the_first_task_may_be_a_newcomers_nobody_has_a_turn() -> None:
    """As its header then is the router's. A newcomer behind a task that is another's for certain has its turn."""
    new = frozenset({3})
    assert read(question(DOUBTFUL, B), newcomers=new).turns == NO_TURNS
    assert read(question(DOUBTFUL, B)).turns.waiting == (Turn(1, TWO),)
    assert read(question(A, B, C), newcomers=new).turns == read(question(A, B, C)).turns
    assert read(question(C, A), newcomers=new).turns.waiting == (Turn(1, ONE),)


@pytest.mark.parametrize("seed", range(30))
def test_a_generated_answer_follows_what_it_follows_in_a_later_prompt(seed: int) -> None:
    """Else the prefix cache would not find it, and a continued answer would go on otherwise than it began."""
    generator = random.Random(seed)
    prompt = question(*generator.sample([A, B, C], 3))
    answer = generator.choices([DULL, A, LINE, EMPTY], k=generator.randrange(1, 20))
    course, tokens = read(prompt), list(prompt)
    for token in answer:
        course = course.after(token, len(tokens), OWN)
        tokens.append(token)
        assert read(tokens).turns == course.turns
        # Spans of the own plan may stand at the end or not.
        assert owners(tokens, read(tokens)) == owners(tokens, course)
    later = [*tokens, END, LINE, *FRAME.header, *[B] * 6, *FRAME.answer, DULL, LINE]
    expected = owners(tokens, course) + ["router"] * 2 + ["2"] * (len(FRAME.header) + 6 + len(FRAME.answer))
    assert owners(later, read(later)) == [*expected, "router", "router"], "the line end behind an answer is no turn"
    runs = plan_runs(read(later).spans, OWN, len(prompt), len(tokens))
    assert plan_runs(course.spans, OWN, len(prompt), len(tokens)) == runs, "as the prefix cache compares them"


def test_plans_of_turns_are_pinned_ones_of_the_digests() -> None:
    (turn,) = read(question(A, B)).turns.waiting
    assert turn.plan.fingerprint == TWO.fingerprint
    moved = replace(OWN, allowed_slots=(0, 1, 2))
    gate = make_gate()
    course = prompt_course(
        gate,
        moved,
        gate.columns({slot: slot for slot in range(3)}),
        {1: "d1", 2: "other"},
        question(A, B),
        answer_ends={1: 1},
    )
    assert course.turns.waiting[0].plan.fingerprint != TWO.fingerprint
