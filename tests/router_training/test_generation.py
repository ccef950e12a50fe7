"""Greedy answers against transformers' own generate, alone and in padded batches; draws against their probabilities."""

from collections.abc import Callable

import pytest
import torch

from router_training.encoding import TokenSequence
from router_training.generation import generate_answers, likeliest, nucleus
from router_training.roster import Roster
from server.routing.chat_frame import ChatFrame
from server.routing.plan_course import ENDLESS, NO_COURSE, AnswerTurns, PlanCourse, PlanSpan, Turn
from server.routing.policy import BASE_PLAN

Sequences = Callable[..., list[TokenSequence]]
NEW_TOKENS = 6


def test_base_answers_are_those_of_transformers(roster: Roster, make_sequences: Sequences) -> None:
    sequences = make_sequences(6)
    found = generate_answers(roster.routed, sequences, roster.base_plans(), {2}, NEW_TOKENS)
    for sequence, answer in zip(sequences, found, strict=True):
        prompt = torch.tensor([sequence.token_ids[: sequence.answer_start]])
        whole = roster.routed.model.generate(  # type: ignore[operator]
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        expected = whole[0, prompt.shape[1] :].tolist()
        assert answer == (expected[: expected.index(2)] if 2 in expected else expected)


def test_batching_changes_no_answer_under_any_plan(roster: Roster, make_sequences: Sequences) -> None:
    sequences = make_sequences(6)
    plans = roster.own_adapter_plans()
    together = generate_answers(roster.routed, sequences, plans, {2}, NEW_TOKENS)
    alone = [generate_answers(roster.routed, [s], plans, {2}, NEW_TOKENS)[0] for s in sequences]
    assert together == alone
    assert together != generate_answers(roster.routed, sequences, roster.base_plans(), {2}, NEW_TOKENS)


def test_an_answer_ends_before_its_end_token(roster: Roster, make_sequences: Sequences) -> None:
    (sequence,) = make_sequences(1)
    (answer,) = generate_answers(roster.routed, [sequence], roster.base_plans(), set(), NEW_TOKENS)
    assert len(answer) == NEW_TOKENS
    end = answer[3]
    (cut,) = generate_answers(roster.routed, [sequence], roster.base_plans(), {end}, NEW_TOKENS)
    assert cut == answer[: answer.index(end)]


def test_what_has_ended_leaves_the_batch_and_changes_no_other_answer(roster: Roster, make_sequences: Sequences) -> None:
    sequences = make_sequences(6)
    plans = roster.own_adapter_plans()
    endless = generate_answers(roster.routed, sequences, plans, set(), NEW_TOKENS)
    ends = {endless[0][1], endless[1][3], endless[2][0]}
    num_running = []

    def choose(logits: torch.Tensor) -> torch.Tensor:
        num_running.append(len(logits))
        return likeliest(logits)

    found = generate_answers(roster.routed, sequences, plans, ends, NEW_TOKENS, choose=choose)
    for answer, whole in zip(found, endless, strict=True):
        end = next((place for place, token in enumerate(whole) if token in ends), NEW_TOKENS)
        assert answer == whole[:end]
    lengths = [len(answer) for answer in found]
    assert len(set(lengths)) > 2
    assert num_running == [sum(length >= step for length in lengths) for step in range(len(num_running))]


def test_equal_prompts_are_read_once_and_answered_each(roster: Roster, make_sequences: Sequences) -> None:
    first, second = make_sequences(2)
    plans = roster.own_adapter_plans()
    alone = [generate_answers(roster.routed, [s], plans, set(), NEW_TOKENS)[0] for s in (first, second)]
    several = [first, second, first, first, second]
    found = generate_answers(roster.routed, several, plans, set(), NEW_TOKENS)
    assert found == [alone[0], alone[1], alone[0], alone[0], alone[1]]
    drawn = generate_answers(roster.routed, [first] * 8, plans, set(), NEW_TOKENS, choose=nucleus(3.0, 1.0, 0))
    assert len({tuple(answer) for answer in drawn}) > 1


def test_answers_follow_their_course_as_on_the_server(
    roster: Roster, make_sequences: Sequences, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here every token ends a line, so that the turn has the whole answer; an endless span has it too."""
    plans, sequences = roster.own_adapter_plans(), make_sequences(4)
    lines = ChatFrame((1,), 10**6, line_ends=tuple((token, 1) for token in range(320)))

    def answers(course_of: Callable[[int], PlanCourse]) -> list[list[int]]:
        monkeypatch.setattr(roster.routed.routers, "prompt_course", lambda _, tokens: course_of(len(tokens)))
        return generate_answers(roster.routed, sequences, plans, set(), NEW_TOKENS)

    plain = answers(lambda _: NO_COURSE)
    turned = answers(lambda _: PlanCourse(turns=AnswerTurns(lines, (Turn(1, BASE_PLAN),))))
    assert turned != plain
    own = {tuple(s.token_ids[: s.answer_start]): plans[s.label] for s in sequences}

    def spanned(_: object, tokens: tuple[int, ...]) -> PlanCourse:
        return PlanCourse((PlanSpan(len(tokens), own[tokens]), PlanSpan(ENDLESS, BASE_PLAN)))

    monkeypatch.setattr(roster.routed.routers, "prompt_course", spanned)
    assert generate_answers(roster.routed, sequences, plans, set(), NEW_TOKENS) == turned


@pytest.mark.parametrize(("top_p", "kept"), [(1.0, 4), (0.97, 4), (0.9, 3), (0.75, 2), (0.5, 1), (1e-9, 1)])
def test_draws_are_from_the_nucleus_in_proportion(top_p: float, kept: int) -> None:
    probabilities = torch.tensor([0.1, 0.55, 0.05, 0.3])
    order = probabilities.argsort(descending=True)[:kept]
    expected = torch.zeros(4)
    expected[order] = probabilities[order] / probabilities[order].sum()
    temperature = 2.0
    logits = (probabilities.log() * temperature).expand(20_000, -1)
    drawn = nucleus(temperature, top_p, seed=3)(logits)
    shares = torch.bincount(drawn, minlength=4) / len(logits)
    assert (shares[expected == 0] == 0).all()
    # Four standard deviations of a share among 20,000 draws.
    torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)


def test_draws_are_those_of_their_seed() -> None:
    logits = torch.randn(64, 320, generator=torch.Generator().manual_seed(0))

    def draw(seed: int) -> list[list[int]]:
        choose = nucleus(1.0, 0.9, seed)
        return [choose(logits).tolist() for _ in range(2)]

    first, again = draw(0)
    assert first != again
    assert draw(0) == [first, again] != draw(1)


@pytest.mark.parametrize("temperature", [1e-3, 1e-40, 1e-300])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    logits = torch.randn(8, 320, generator=torch.Generator().manual_seed(0)) * 10
    assert nucleus(temperature, 1.0, seed=0)(logits).equal(likeliest(logits))
