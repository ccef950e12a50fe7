"""Rendered chats, answer masks, truncation and batches."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from router_training.data import Chat, TrainingDataError
from router_training.encoding import (
    IGNORED,
    TokenSequence,
    batches_by_length,
    collate,
    encode_chats,
    truncate,
)
from server.errors import InvalidRequestError

END, START, NEWLINE = 300, 301, 302


class ByteRenderer:
    """A chat template over bytes: START content END NEWLINE per message."""

    def render_chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        tokens: list[int] = []
        for message in messages:
            tokens += [START, *message["content"].encode(), END, NEWLINE]
        return [*tokens, START] if add_generation_prompt else tokens


class MergingRenderer(ByteRenderer):
    """A template whose generation prompt is not how the answer begins."""

    def render_chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        tokens = super().render_chat(messages, add_generation_prompt=add_generation_prompt)
        return [*tokens, 7] if add_generation_prompt else tokens


class RefusingRenderer(ByteRenderer):
    """A template that takes no system message, as some do."""

    def render_chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        if messages[0]["role"] == "system":
            raise InvalidRequestError("the chat template refuses these messages: no system role")
        return super().render_chat(messages, add_generation_prompt=add_generation_prompt)


def chat(question: str, answer: str, origin: str = "data.jsonl:1") -> Chat:
    return Chat("b", ({"role": "user", "content": question}, {"role": "assistant", "content": answer}), origin)


def test_answer_is_what_follows_the_prompt_up_to_its_end_of_turn() -> None:
    (sequence,) = encode_chats([chat("hi", "yo")], {"a": 0, "b": 1}, ByteRenderer(), {END})
    assert sequence.token_ids == (START, *b"hi", END, NEWLINE, START, *b"yo", END)
    assert sequence.token_ids[sequence.answer_start :] == (*b"yo", END)
    assert sequence.num_answer_tokens == 3
    assert sequence.label == 1


def test_chats_that_the_template_refuses_are_all_named() -> None:
    system = {"role": "system", "content": "be brief"}
    refused = [
        replace(one, messages=(system, *one.messages)) for one in (chat("hi", "yo", "x:1"), chat("hi", "yo", "x:3"))
    ]
    with pytest.raises(TrainingDataError) as caught:
        encode_chats([refused[0], chat("a", "b"), refused[1]], {"b": 1}, RefusingRenderer(), {END})
    assert [problem.split(": ")[0] for problem in caught.value.problems] == ["x:1", "x:3"]
    assert "no system role" in caught.value.problems[0]


def test_chats_whose_answer_does_not_follow_the_prompt_are_all_refused_by_line() -> None:
    chats = [chat("hi", "yo", "data.jsonl:4"), chat("hi", "yo", "data.jsonl:9")]
    with pytest.raises(TrainingDataError) as caught:
        encode_chats(chats, {"b": 0}, MergingRenderer(), {END})
    assert [problem.split(": ")[0] for problem in caught.value.problems] == ["data.jsonl:4", "data.jsonl:9"]


def test_chats_over_the_limit_are_all_refused_by_line_or_cut_on_demand() -> None:
    chats = [chat("hi", "yo"), chat("hello there", "yo", "data.jsonl:4711"), chat("hi", "hello there", "data.jsonl:9")]
    with pytest.raises(TrainingDataError) as caught:
        encode_chats(chats, {"b": 1}, ByteRenderer(), {END}, max_length=12, too_long="refuse")
    assert caught.value.problems == (
        "data.jsonl:4711: 18 tokens, and the longest allowed is 12",
        "data.jsonl:9: 18 tokens, and the longest allowed is 12",
    )
    cut = encode_chats(chats, {"b": 1}, ByteRenderer(), {END}, max_length=12, too_long="cut")
    assert [len(sequence) for sequence in cut] == [9, 12, 12]


@pytest.mark.parametrize(
    ("prompt_length", "answer_length", "expected"),
    [(6, 4, (6, 4)), (6, 6, (5, 5)), (20, 2, (8, 2)), (20, 20, (5, 5)), (3, 20, (3, 7))],
)
def test_truncation_keeps_half_for_the_answer_and_cuts_the_middle_of_the_prompt(
    prompt_length: int, answer_length: int, expected: tuple[int, int]
) -> None:
    prompt, answer = list(range(prompt_length)), list(range(100, 100 + answer_length))
    cut_prompt, cut_answer = truncate(prompt, answer, 10)
    assert (len(cut_prompt), len(cut_answer)) == expected
    assert cut_answer == answer[: expected[1]]
    head = expected[0] // 2 if expected[0] < prompt_length else expected[0]
    assert cut_prompt == prompt[:head] + prompt[prompt_length - (expected[0] - head) :]


def test_targets_are_the_answer_tokens_seen_from_one_position_before() -> None:
    batch = collate([TokenSequence((1, 2, 3, 4, 5), 3, 0), TokenSequence((6, 7), 1, 2)])
    assert batch.token_ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]
    assert batch.targets.tolist() == [[IGNORED, IGNORED, 4, 5, IGNORED], [7, *[IGNORED] * 4]]
    assert batch.answer_positions.nonzero().flatten().tolist() == [2, 3, 5]
    assert batch.token_labels.tolist() == [0] * 5 + [2] * 5
    assert batch.lengths.tolist() == [5, 2]


def test_labels_change_where_a_sequence_says_and_unscored_tokens_are_no_targets() -> None:
    batch = collate([TokenSequence((1, 2, 3, 4, 5), 2, 3, label_changes=((3, 1),), unscored=(3,))])
    assert batch.labels.tolist() == [[3, 3, 3, 1, 1]]
    assert batch.targets.tolist() == [[IGNORED, 3, IGNORED, 5, IGNORED]]
    assert TokenSequence((1, 2, 3, 4, 5), 2, 3, unscored=(3,)).num_answer_tokens == 2


def test_answer_labels_are_those_of_the_positions_that_predict() -> None:
    sequences = [
        TokenSequence((1, 2, 3, 4, 5, 6, 7), 2, 3, label_changes=((3, 1), (5, 2)), unscored=(3,)),
        TokenSequence((1, 2, 3), 1, 2),
    ]
    batch = collate(sequences)
    expected = batch.token_labels[batch.answer_positions].tolist()
    assert [label for sequence in sequences for label in sequence.answer_labels] == expected == [3, 1, 1, 2, 2, 2]


def test_batches_by_length_hold_every_sequence_once_within_the_token_limit() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 40, (50,), generator=generator).tolist()
    sequences = [TokenSequence(tuple(range(length)), 1, 0) for length in lengths]
    groups = list(batches_by_length(sequences, 64))
    assert sorted(index for group in groups for index in group) == list(range(50))
    assert all(len(group) * max(lengths[i] for i in group) <= 64 or len(group) == 1 for group in groups)
