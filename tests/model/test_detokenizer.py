"""Streamed text adds up to the decode of all tokens, for any tokens, any split and any stop strings."""

from collections.abc import Sequence

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from server.model.tokenizer import ChatTokenizer, IncrementalDetokenizer

TEXTS = st.text(alphabet=st.sampled_from([*"ab <|>\n", "é", "日", "👩", "\u200d", "🚀", "\ufffd"]), max_size=40)


class Bytes:
    """A tokenizer whose token ids are bytes; 256 is a control token that reads `<end>`."""

    special_ids = frozenset({256})
    is_byte_level = True

    def token_bytes(self, token_id: int) -> bytes:
        return b"<end>" if token_id == 256 else bytes([token_id])

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        kept = (i for i in token_ids if not (skip_special_tokens and i in self.special_ids))
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", errors="replace")


class Words:
    """A tokenizer whose tokens are the given strings."""

    special_ids: frozenset[int] = frozenset()
    is_byte_level = True

    def __init__(self, *words: str) -> None:
        self.words = words
        self.ids = list(range(len(words)))

    def token_bytes(self, token_id: int) -> bytes:
        return self.words[token_id].encode()

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:  # noqa: ARG002
        return "".join(self.words[i] for i in token_ids)


def split_at(token_ids: Sequence[int], cuts: Sequence[int]) -> list[Sequence[int]]:
    """Consecutive parts whose lengths follow `cuts`, repeated for as long as tokens last."""
    parts: list[Sequence[int]] = []
    position = 0
    while position < len(token_ids):
        length = cuts[len(parts) % len(cuts)]
        parts.append(token_ids[position : position + length])
        position += length
    return parts


def stream(detokenizer: IncrementalDetokenizer, parts: Sequence[Sequence[int]]) -> tuple[str, str | None, int]:
    """(all text, stop string found, tokens consumed)."""
    deltas = [detokenizer.push(part) for part in parts]
    deltas.append(detokenizer.finish())
    stopped = [delta.stopped for delta in deltas if delta.stopped is not None]
    assert len(stopped) <= 1
    return "".join(d.text for d in deltas), stopped[0] if stopped else None, sum(d.num_tokens for d in deltas)


def expected_cut(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """Reference: try every end position in turn, longest stop first."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if stop and text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


@given(
    token_ids=st.lists(st.integers(0, 256), max_size=60),
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    skip=st.booleans(),
)
@example(token_ids=[0xF0, 0x9F, 0x9A, 256, 0x80, 0xF0, 0x9F], cuts=[1], skip=True)
@example(token_ids=[0xF0, 0x9F, 0x9A, 256, 0x80], cuts=[2], skip=False)
def test_any_bytes_in_any_split_stream_to_their_decode(token_ids: list[int], cuts: list[int], skip: bool) -> None:
    detokenizer = IncrementalDetokenizer(Bytes(), skip_special_tokens=skip)
    text, stopped, num_tokens = stream(detokenizer, split_at(token_ids, cuts))
    assert text == Bytes().decode(token_ids, skip)
    assert stopped is None
    assert num_tokens == len(token_ids)


@given(
    text=TEXTS,
    stops=st.lists(st.text(alphabet="ab <日🚀", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    include=st.booleans(),
)
@example(text="aab", stops=["ab"], cuts=[1], include=False)
@example(text="ab", stops=["b", "ab"], cuts=[2], include=True)
@example(text="abab<", stops=["abab ", "bab"], cuts=[1], include=False)
def test_the_first_stop_string_completed_cuts_the_text_in_any_split(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    token_ids = list(text.encode())
    detokenizer = IncrementalDetokenizer(Bytes(), stop=tuple(stops), include_stop=include)
    got, stopped, num_tokens = stream(detokenizer, split_at(token_ids, cuts))
    want, want_stopped = expected_cut(text, stops, include)
    assert (got, stopped) == (want, want_stopped)
    end = want + ("" if include or want_stopped is None else want_stopped)
    assert num_tokens == len(end.encode())


@given(text=TEXTS, cuts=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_real_tokens_of_the_demo_model_stream_to_their_decode(
    demo_tokenizer: ChatTokenizer, text: str, cuts: list[int]
) -> None:
    token_ids = demo_tokenizer.encode(text, add_special_tokens=False)
    got, _, _ = stream(IncrementalDetokenizer(demo_tokenizer), split_at(token_ids, cuts))
    assert got == demo_tokenizer.decode(token_ids)


@given(token_ids=st.lists(st.integers(0, 299), max_size=30), skip=st.booleans())
def test_random_ids_of_a_byte_level_vocabulary_stream_to_the_library_s_decode(
    byte_level: PreTrainedTokenizerFast, token_ids: list[int], skip: bool
) -> None:
    got, _, _ = stream(
        IncrementalDetokenizer(ChatTokenizer(byte_level), skip_special_tokens=skip), [[i] for i in token_ids]
    )
    assert got == byte_level.backend_tokenizer.decode(token_ids, skip_special_tokens=skip)


@given(text=st.text(alphabet=st.sampled_from([*"helo rat,.", "é", "日", "🚀"]), max_size=40), cut=st.integers(1, 4))
def test_text_of_a_sentencepiece_vocabulary_streams_to_the_library_s_decode(
    sentencepiece_like: PreTrainedTokenizerFast, text: str, cut: int
) -> None:
    tokenizer = ChatTokenizer(sentencepiece_like)
    assert not tokenizer.is_byte_level
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    got, _, _ = stream(IncrementalDetokenizer(tokenizer), split_at(token_ids, [cut]))
    assert got == tokenizer.decode(token_ids)


@given(
    text=st.text(alphabet=st.sampled_from([*"helo rat,.", "é", "日", "🚀"]), max_size=40),
    place=st.integers(0, 60),
    cut=st.integers(1, 4),
)
def test_text_that_goes_on_keeps_the_space_between(
    sentencepiece_like: PreTrainedTokenizerFast, text: str, place: int, cut: int
) -> None:
    """Prompt and completion together are what all tokens decode to."""
    tokenizer = ChatTokenizer(sentencepiece_like)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    prompt, rest = token_ids[:place], token_ids[place:]
    shown = tokenizer.decode(prompt)
    assume(not shown.endswith("\ufffd"))
    for context in (prompt, [1, *prompt]):
        got, _, _ = stream(IncrementalDetokenizer(tokenizer, context=context), split_at(rest, [cut]))
        assert shown + got == tokenizer.decode(token_ids)


def test_an_answer_begins_a_text_of_its_own(sentencepiece_like: PreTrainedTokenizerFast) -> None:
    tokenizer = ChatTokenizer(sentencepiece_like)
    (word,) = tokenizer.encode("he", add_special_tokens=False)
    for context, expected in (((), "he"), ((word,), " he"), ((word, 1), "he")):
        assert stream(IncrementalDetokenizer(tokenizer, context=context), [[word]])[0] == expected
    stopped = IncrementalDetokenizer(tokenizer, context=(word,), stop=(" h",))
    assert stopped.push([word]).stopped == " h"


def test_an_unfinished_character_is_held_until_it_is_whole() -> None:
    detokenizer = IncrementalDetokenizer(Bytes())
    rocket = "🚀".encode()
    assert [detokenizer.push([byte]).text for byte in rocket] == ["", "", "", "🚀"]


def test_an_unfinished_character_at_the_end_becomes_a_replacement_character() -> None:
    detokenizer = IncrementalDetokenizer(Bytes())
    assert detokenizer.push(list("é".encode()[:1])).text == ""
    assert detokenizer.finish().text == "\ufffd"


def test_text_that_may_begin_a_stop_string_is_held_and_released_when_it_does_not() -> None:
    words = Words("one", "\n", "\nUs", "ing")
    detokenizer = IncrementalDetokenizer(words, stop=("\n\nUser:",))
    assert [detokenizer.push([i]).text for i in words.ids] == ["one", "", "", "\n\nUsing"]


def test_a_held_beginning_is_released_when_the_sequence_ends() -> None:
    words = Words("yes", " ST")
    detokenizer = IncrementalDetokenizer(words, stop=(" STOP",))
    assert detokenizer.push(words.ids).text == "yes"
    assert detokenizer.finish().text == " ST"
    assert detokenizer.finish().text == ""


def test_a_stop_string_across_three_tokens_is_found_and_later_tokens_are_ignored() -> None:
    words = Words("a", "b S", "TO", "P c", "d")
    detokenizer = IncrementalDetokenizer(words, stop=("STOP",))
    delta = detokenizer.push(words.ids)
    assert (delta.text, delta.stopped, delta.num_tokens) == ("ab ", "STOP", 4)
    after = detokenizer.push([0])
    assert (after.text, after.stopped, after.num_tokens) == ("", None, 0)
    assert detokenizer.finish().text == ""


def test_a_stop_string_at_the_very_end_is_found() -> None:
    words = Words("a", "END")
    assert stream(IncrementalDetokenizer(words, stop=("END",)), [words.ids]) == ("a", "END", 2)


def test_include_stop_keeps_the_stop_string_and_nothing_after_it() -> None:
    words = Words("a", "b.c")
    assert stream(IncrementalDetokenizer(words, stop=(".",), include_stop=True), [words.ids]) == ("ab.", ".", 2)


def test_of_two_stop_strings_the_one_completed_first_wins_and_the_longer_one_on_a_tie() -> None:
    assert stream(IncrementalDetokenizer(Words("xabcd"), stop=("abcd", "bc")), [[0]]) == ("xa", "bc", 1)
    assert stream(IncrementalDetokenizer(Words("xabc"), stop=("c", "abc")), [[0]]) == ("x", "abc", 1)


@pytest.mark.parametrize(("min_tokens", "text"), [(0, ""), (1, ".a"), (2, ".a"), (3, ".a.b"), (9, ".a.b.")])
def test_a_stop_string_completed_within_min_tokens_does_not_count(min_tokens: int, text: str) -> None:
    words = Words(".", "a", ".", "b", ".")
    got, _, _ = stream(IncrementalDetokenizer(words, stop=(".",), min_tokens=min_tokens), [words.ids])
    assert got == text


def test_a_stop_string_that_begins_within_min_tokens_and_ends_after_counts() -> None:
    words = Words("aS", "T")
    assert stream(IncrementalDetokenizer(words, stop=("ST",), min_tokens=1), [words.ids]) == ("a", "ST", 2)


def test_control_tokens_are_dropped_only_when_asked() -> None:
    assert stream(IncrementalDetokenizer(Bytes()), [[97, 256]])[0] == "a"
    assert stream(IncrementalDetokenizer(Bytes(), skip_special_tokens=False), [[97, 256]])[0] == "a<end>"


def test_cost_per_token_does_not_grow_with_the_text() -> None:
    """Counts calls instead of seconds: one look-up of bytes per token, no decode of the past."""

    class Counting(Bytes):
        num_calls = 0

        def token_bytes(self, token_id: int) -> bytes:
            self.num_calls += 1
            return super().token_bytes(token_id)

        def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:  # noqa: ARG002
            raise AssertionError("byte-level text is never decoded again")

    tokenizer = Counting()
    detokenizer = IncrementalDetokenizer(tokenizer, stop=("zz",))
    for _ in range(1000):
        detokenizer.push([97])
    assert tokenizer.num_calls == 1000


def test_the_window_of_other_tokenizers_stays_short(sentencepiece_like: PreTrainedTokenizerFast) -> None:
    class Watching(ChatTokenizer):
        longest = 0

        def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            self.longest = max(self.longest, len(token_ids))
            return super().decode(token_ids, skip_special_tokens)

    tokenizer = Watching(sentencepiece_like)
    token_ids = tokenizer.encode("hello 🚀 tart " * 50, add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer)
    for token_id in token_ids:
        detokenizer.push([token_id])
    assert tokenizer.longest <= 6
