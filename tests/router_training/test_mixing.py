"""The training mix: shares, composites with their seams, new framings."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_training.composites import SEPARATOR, CompositeChat, Kind, encode_composite, pair_up
from router_training.data import Chat, TrainingDataError
from router_training.encoding import TokenSequence, collate
from router_training.mixing import (
    QUESTION_MIXES,
    QUESTION_TOKENS,
    Mix,
    check_longest,
    draw_mix,
    draw_question_mixes,
    encode_mix,
    interleave,
    question_facts,
    question_settings,
)
from router_training.rephrasing import REASONS, rephrase_some
from router_training.router_inputs import chosen_positions
from router_training.settings import TrainingConfig
from server.errors import ConfigError
from tests.router_training.test_encoding import END, START, ByteRenderer, RefusingRenderer


def chat(task: str, question: str, answer: str, origin: str = "data:1") -> Chat:
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Chat(task, messages, origin)


def chats(count: int) -> dict[str, list[Chat]]:
    return {task: [chat(task, f"{task} {n}?", f"{n}", f"{task}:{n}") for n in range(count)] for task in "abc"}


LABELS = {"base": 0, "a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize("kind", ["conversation", "answer"])
def test_each_scored_token_of_a_composite_belongs_to_the_adapter_of_its_answer(kind: Kind) -> None:
    composite = CompositeChat(kind, chat("a", "AAAA", "xx"), chat("b", "BBBB", "yyy"))
    sequence = encode_composite(composite, LABELS, ByteRenderer(), {END})
    batch = collate([sequence])
    scored = batch.answer_positions
    targets = batch.targets.flatten()[scored].tolist()
    labels = batch.token_labels[scored].tolist()
    first = [*b"xx", END] if kind == "conversation" else [*b"xx"]
    assert targets == [*first, *b"yyy", END]
    assert labels == [1] * len(first) + [2] * 4
    # Question tokens belong to their own task.
    by_token = dict(zip(sequence.token_ids, batch.token_labels.tolist(), strict=False))
    assert by_token[ord("A")] == 1
    assert by_token[ord("B")] == 2
    assert sequence.num_answer_tokens == len(targets)


def test_pairs_join_two_tasks_and_follow_from_the_seed() -> None:
    pairs = pair_up(chats(5), 12, seed=1)
    assert all(pair.first.task != pair.second.task for pair in pairs)
    assert Counter(pair.first.task for pair in pairs) == {"a": 4, "b": 4, "c": 4}
    assert Counter(pair.kind for pair in pairs) == {"conversation": 6, "answer": 6}
    assert pairs == pair_up(chats(5), 12, seed=1)
    assert pairs != pair_up(chats(5), 12, seed=2)


def test_the_base_models_chats_are_joined_in_conversations_alone() -> None:
    rows = {**chats(5), "base": chats(5)["a"]}
    pairs = pair_up({task: [replace(c, task=task) for c in own] for task, own in rows.items()}, 64, seed=1)
    with_base = Counter(pair.kind for pair in pairs if "base" in (pair.first.task, pair.second.task))
    assert with_base["conversation"] > 16
    assert with_base["answer"] == 0
    assert sum(pair.kind == "answer" for pair in pairs) == 24
    few = {task: [replace(c, task=task) for c in rows[task]] for task in ("a", "base")}
    assert {pair.kind for pair in pair_up(few, 4, seed=1)} == {"conversation"}


def test_pairs_need_two_tasks_with_single_questions() -> None:
    with pytest.raises(ConfigError, match="at least two tasks"):
        pair_up({"a": chats(2)["a"], "b": []}, 3, seed=0)


def test_a_mix_has_the_shares_it_was_asked_for_and_one_digest_per_content() -> None:
    config = TrainingConfig(samples=40, composite_fraction=0.25, rephrase_fraction=0.5, max_length=200)
    mix = draw_mix(chats(20), config)
    assert (len(mix.chats), len(mix.composites)) == (30, 10)
    assert sum(mix.count(task) for task in "abc") == 30
    plain = draw_mix(chats(20), config.model_copy(update={"rephrase_fraction": 0.0}))
    changed = sum(left.messages != right.messages for left, right in zip(mix.chats, plain.chats, strict=True))
    assert 8 <= changed <= 15  # of 15 chosen, some draw no change at all
    assert mix.digest == draw_mix(chats(20), config).digest
    assert mix.digest != plain.digest
    sequences = encode_mix(mix, LABELS, ByteRenderer(), {END}, config)
    assert sum(bool(sequence.label_changes) for sequence in sequences) == 10
    short = encode_mix(
        mix, LABELS, ByteRenderer(), {END}, config.model_copy(update={"max_length": 8, "too_long": "cut"})
    )
    assert len(short) == 30  # no composite fits
    longest = max(len(s) for s in encode_mix(plain, LABELS, ByteRenderer(), {END}, config) if not s.label_changes)
    lengths = [len(encode_composite(pair, LABELS, ByteRenderer(), {END})) for pair in plain.composites]
    assert min(lengths) > longest
    strict = config.model_copy(update={"max_length": longest})
    assert len(encode_mix(plain, LABELS, ByteRenderer(), {END}, strict)) == 30, "none may be cut"
    wide = [replace(pair, first=chat("a", "A" * 90, "B" * 90)) for pair in plain.composites]
    cut = config.model_copy(update={"max_length": 100, "too_long": "cut"})
    joined = [
        s for s in encode_mix(Mix(plain.chats, tuple(wide)), LABELS, ByteRenderer(), {END}, cut) if s.label_changes
    ]
    assert [len(sequence) <= 100 for sequence in joined] == [True] * 10


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 40))
def test_a_question_mix_is_as_large_as_allowed_and_repeats_no_chat_of_the_largest_task(
    counts: list[int], allowed: int
) -> None:
    rows = {task: chats(count)[task] for task, count in zip("abc", counts, strict=False)}
    config = TrainingConfig(samples=1000, prompt_gate=True, prompt_gate_samples=allowed)
    mix, *_ = draw_question_mixes(rows, config)
    assert len(mix) == min(allowed, len(counts) * max(counts))
    drawn = Counter(chat.origin for chat in mix.chats)
    for task, own in rows.items():
        assert max(drawn[chat.origin] for chat in own) <= -(-max(counts) // len(own)), task


def test_a_question_mix_has_composites_and_new_framings_as_any_mix() -> None:
    config = TrainingConfig(prompt_gate=True, prompt_gate_samples=40, composite_fraction=0.25, rephrase_fraction=0.5)
    drawn = [draw_mix(chats(20), config.model_copy(update={"samples": 40, "seed": seed})) for seed in range(12)]
    assert list(draw_question_mixes(chats(20), config)) == drawn[:QUESTION_MIXES]
    again = config.model_copy(update={"seed": 1})
    assert list(draw_question_mixes(chats(20), again)) == drawn[QUESTION_MIXES : 2 * QUESTION_MIXES], "all of its own"
    assert len({mix.digest for mix in drawn}) == 12


def test_question_facts_tell_every_mix() -> None:
    config = TrainingConfig(prompt_gate=True, prompt_gate_samples=40, rephrase_fraction=0.5)
    mixes = draw_question_mixes(chats(20), config)
    facts = question_facts(mixes)
    assert (facts["question_chats"], facts["question_mixes"]) == (40, QUESTION_MIXES)
    other = question_facts([*mixes[:-1], mixes[0]])
    assert other["question_sha256"] != facts["question_sha256"]
    assert question_facts(()) == {}


def test_without_a_prompt_gate_there_is_no_question_mix() -> None:
    assert draw_question_mixes(chats(3), TrainingConfig()) == ()


def test_questions_are_read_beyond_what_the_router_is_trained_on() -> None:
    rows = {"a": [chat("a", "q" * length, "answer") for length in (100, 10_000)]}
    config = TrainingConfig(prompt_gate=True, max_length=50, too_long="refuse")
    mix, *_ = draw_question_mixes(rows, config)
    lengths = sorted(map(len, encode_mix(mix, LABELS, ByteRenderer(), {END}, question_settings(config))))
    assert 100 < lengths[0] < lengths[1] == QUESTION_TOKENS


def test_a_frame_makes_no_chat_too_long() -> None:
    """The data has been checked; a seed must not decide whether it is good."""
    config = TrainingConfig(samples=30, rephrase_fraction=1.0, max_length=20, too_long="refuse")
    mix = draw_mix(chats(20), config)
    lengths = list(map(len, encode_mix(mix, LABELS, ByteRenderer(), {END}, config)))
    assert len(lengths) == 30
    assert max(lengths) == 20


def test_a_frame_has_no_system_message_where_the_template_takes_none() -> None:
    config = TrainingConfig(samples=30, rephrase_fraction=1.0)
    mix = draw_mix(chats(20), config)
    assert any(chat.messages[0]["role"] == "system" for chat in mix.chats)
    assert len(encode_mix(mix, LABELS, RefusingRenderer(), {END}, config)) == 30
    own = Chat("a", ({"role": "system", "content": "mine"}, *chat("a", "q", "r").messages), "data:7")
    with pytest.raises(TrainingDataError, match=r"data:7: .*no system role"):
        encode_mix(Mix((own,), ()), LABELS, RefusingRenderer(), {END}, config)


@given(st.integers(0, 30), st.integers(0, 10))
def test_interleaving_loses_nothing_and_keeps_both_orders(num_single: int, num_joined: int) -> None:
    single = [TokenSequence((n, n), 1, 1) for n in range(num_single)]
    joined = [TokenSequence((n, n), 1, 2) for n in range(num_joined)]
    result = interleave(single, joined)
    assert [s for s in result if s.label == 1] == single
    assert [s for s in result if s.label == 2] == joined


def test_interleaving_spreads_evenly() -> None:
    result = interleave([TokenSequence((0, 0), 1, 1)] * 9, [TokenSequence((0, 0), 1, 2)] * 3)
    assert [sequence.label for sequence in result].count(2) == 3
    assert all(2 in [sequence.label for sequence in result[start : start + 4]] for start in (0, 4, 8))


def test_rephrasing_keeps_the_question_its_answer_and_its_label() -> None:
    originals = [chat("a", f"first line {n}\nsecond line {n}", f"answer {n}") for n in range(200)]
    rephrased = rephrase_some(originals, 1.0, seed=4)
    for before, after in zip(originals, rephrased, strict=True):
        question = next(message["content"] for message in after.messages if message["role"] == "user")
        assert all(line in question for line in before.messages[0]["content"].split("\n"))
        assert after.messages[-1] == before.messages[-1]
        assert (after.task, after.origin) == (before.task, before.origin)
    assert len({message["content"] for chat in rephrased for message in chat.messages}) > 250
    assert rephrased == rephrase_some(originals, 1.0, seed=4)
    assert rephrased != rephrase_some(originals, 1.0, seed=5)


def test_frames_are_many_and_leave_braces_alone() -> None:
    """A gate that has seen few frames takes a story before a question for the question."""
    originals = [chat("a", "fill {0} and {} in {x}", "answer")] * 400
    framed = [message["content"] for c in rephrase_some(originals, 1.0, seed=1) for message in c.messages[-2:-1]]
    assert all("fill {0} and {} in {x}" in content for content in framed)
    assert len(set(framed)) > 200
    stories = sum(any(reason in content for reason in REASONS) for content in framed)
    wrapped = sum(any(content.count(mark) for mark in ("```", "<", "###", "INPUT", "***")) for content in framed)
    assert 50 < stories < 150
    assert 25 < wrapped < 150


def test_questions_of_many_lines_keep_their_order() -> None:
    lines = "Pick one.\nA. red\nB. blue"
    assert all(
        lines in message["content"]
        for rephrased in rephrase_some([chat("a", lines, "A")] * 50, 1.0, seed=0)
        for message in rephrased.messages
        if message["role"] == "user"
    )


def test_chats_longer_than_the_base_model_reads_are_refused_by_line() -> None:
    sequences = [TokenSequence((1,) * length, 1, 1) for length in (3, 9)]
    rows = [chat("a", "q", "r", "f.jsonl:1"), chat("a", "q", "r", "f.jsonl:4711")]
    check_longest(sequences, 9, rows)
    with pytest.raises(TrainingDataError, match=r"f\.jsonl:4711: 9 tokens, and the base model reads 8"):
        check_longest(sequences, 8, rows)


def test_the_separator_of_two_answers_is_nobodys() -> None:
    composite = CompositeChat("answer", chat("a", "AAAA", "xx"), chat("b", "BBBB", "yyy"))
    sequence = encode_composite(composite, LABELS, ByteRenderer(), {END})
    assert bytes(sequence.token_ids[position] for position in sequence.unscored) == SEPARATOR.encode()


PAIR = 310


class PairingRenderer(ByteRenderer):
    """Two line ends are one token at the end of a message or before a digit, as in SmolLM2, and two elsewhere."""

    def render_chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        tokens = super().render_chat(messages, add_generation_prompt=add_generation_prompt)
        for position in reversed(range(len(tokens) - 2)):
            behind = tokens[position + 2]
            if tokens[position : position + 2] == [10, 10] and (behind == END or chr(behind).isdigit()):
                tokens[position : position + 2] = [PAIR]
        return tokens


@pytest.mark.parametrize("second", ["yyy", "7", "A", "7A"])
def test_a_separator_is_nobodys_whatever_tokens_it_becomes(second: str) -> None:
    composite = CompositeChat("answer", chat("a", "AAAA", "xx"), chat("b", second * 2, second))
    sequence = encode_composite(composite, LABELS, PairingRenderer(), {END})
    separator = [PAIR] if second[0] == "7" else [10, 10]
    assert [sequence.token_ids[position] for position in sequence.unscored] == separator
    batch = collate([sequence])
    scored = batch.answer_positions
    assert batch.targets.flatten()[scored].tolist() == [*b"xx", *second.encode(), END]
    assert batch.token_labels[scored].tolist() == [1, 1] + [2] * (len(second) + 1)
    labels = batch.token_labels.tolist()
    start = 1 + 4 + len(separator)
    assert labels[:start] == [1] * start, "the first question, and what joins it to the second"
    assert labels[start : start + 2 * len(second)] == [2] * 2 * len(second)
    assert labels[start + 2 * len(second)] == 1, "the answer's header"


@pytest.mark.parametrize("kind", ["conversation", "answer"])
@pytest.mark.parametrize("max_length", [70, 80, 100, 129])
def test_a_cut_composite_keeps_its_seams(kind: Kind, max_length: int) -> None:
    first, second = chat("a", "A" * 40, "<" + "x" * 30 + ">"), chat("b", "[" + "B" * 6 + "]", "(" + "y" * 40)
    composite = CompositeChat(kind, first, second)
    whole = encode_composite(composite, LABELS, ByteRenderer(), {END})
    cut = encode_composite(composite, LABELS, ByteRenderer(), {END}, max_length=max_length)
    assert max_length - 3 <= len(cut) <= max_length < len(whole)
    batch = collate([cut])
    owners = [
        (chr(target), label)
        for target, label, is_scored in zip(
            batch.targets.flatten().tolist(), batch.token_labels.tolist(), batch.answer_positions.tolist(), strict=True
        )
        if is_scored and target < END
    ]
    counted = Counter(owners)
    num_x, num_y = counted["x", 1], counted["y", 2]
    assert owners == [("<", 1), *[("x", 1)] * num_x, (">", 1), ("(", 2), *[("y", 2)] * num_y]
    text = "".join(chr(token) if token < END else " " for token in cut.token_ids)
    assert "[BBBBBB]" in text, "short parts stay whole"
    assert text.index("A") < text.index("[") < text.index("(")
    kept_x = text.count("x")
    assert num_x == kept_x - (kept_x < 30), "what follows a cut counts for nobody"
    assert abs(text.count("A") - num_y) <= 2, "long parts are cut to one length"


def test_what_need_not_be_cut_or_cannot_is_told_by_its_length() -> None:
    composite = CompositeChat("answer", chat("a", "A" * 5, "x"), chat("b", "B", "y" * 5))
    whole = encode_composite(composite, LABELS, ByteRenderer(), {END})
    assert encode_composite(composite, LABELS, ByteRenderer(), {END}, max_length=len(whole)) == whole
    assert len(encode_composite(composite, LABELS, ByteRenderer(), {END}, max_length=8)) == len(whole)
    assert whole.token_ids[0] == START


def test_the_warm_start_sees_the_seams_of_composites() -> None:
    composite = CompositeChat("answer", chat("a", "A" * 40, "x" * 40), chat("b", "B" * 40, "y" * 40))
    sequence = encode_composite(composite, LABELS, ByteRenderer(), {END})
    chosen = chosen_positions([sequence], collate([sequence]), 3, 3)
    seams = [position for position, _ in sequence.label_changes]
    assert chosen[[*seams, sequence.answer_start - 1]].all()
    assert int(chosen.sum()) <= 3 + 3 + 4
