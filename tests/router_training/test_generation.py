"""Greedy answers against transformers' own generate, alone and in padded batches."""

from collections.abc import Callable

import torch

from router_training.encoding import TokenSequence
from router_training.generation import generate_answers
from router_training.roster import Roster

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
