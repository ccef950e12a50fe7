"""Examples from requests and files: forms, limits, truncation."""

import json
from pathlib import Path

import pytest

from server.adapters.calibration import chosen_positions
from server.adapters.examples import MAX_EXAMPLES, MAX_TOKENS, encode_examples, read_examples
from server.errors import InvalidRequestError
from tests.adapters.calibrating import ByteRenderer


def test_prompts_and_chats_are_rendered_as_requests_are() -> None:
    chat = {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]}
    plain, whole = encode_examples(["ab", {"prompt": "ab"}, chat], ByteRenderer())  # the first two are one
    assert plain.token_ids == (300, 301, 302, 97, 98, 304, 303)
    assert plain.answer_start == len(plain.token_ids)
    assert whole.token_ids == (300, 301, 302, 97, 98, 304, 303, 99, 304)
    assert whole.answer_start == 7


def test_what_the_template_always_prints_is_no_evidence() -> None:
    first, _ = encode_examples(["abc", "def"], ByteRenderer())
    assert first.start == 3
    assert chosen_positions(first).tolist() == [False] * 3 + [True] * 5


def test_long_examples_keep_both_ends_of_the_prompt_and_half_for_the_answer() -> None:
    long = {"messages": [{"role": "user", "content": "p" * 500}, {"role": "assistant", "content": "a" * 500}]}
    example, prompt = encode_examples([long, "q" * 500], ByteRenderer())
    assert len(example.token_ids) == len(prompt.token_ids) == MAX_TOKENS
    assert example.answer_start == MAX_TOKENS // 2
    assert example.token_ids[:3] == (300, 301, 302)
    assert example.token_ids[example.answer_start - 2 : example.answer_start + 1] == (304, 303, 97)


@pytest.mark.parametrize("count", [0, 1, MAX_EXAMPLES + 1])
def test_too_few_or_too_many_are_refused(count: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"{count} examples; give 2 to 64"):
        encode_examples(["x"] * count, ByteRenderer())


def test_what_is_given_twice_counts_once_and_one_is_too_few() -> None:
    """Two halves of the examples judge each other: equal ones would agree whatever they are."""
    first, second = encode_examples(["x", "y", {"prompt": "x"}, "y"], ByteRenderer())
    assert first != second
    with pytest.raises(InvalidRequestError, match="all 3 examples are the same; give 2 to 64 different ones") as caught:
        encode_examples(["x", {"prompt": "x"}, "x"], ByteRenderer())
    assert caught.value.code == "invalid_examples"


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(InvalidRequestError, match=r"examples\[0\] is an empty prompt; examples\[2\] must be"):
        encode_examples(["", "fine", []], ByteRenderer())


def test_a_file_holds_one_example_a_line(tmp_path: Path) -> None:
    assert read_examples(tmp_path) is None
    (tmp_path / "examples.jsonl").write_text('"a"\n\n' + json.dumps({"prompt": "line\u2028separator"}) + "\n")
    assert read_examples(tmp_path) == ["a", {"prompt": "line\u2028separator"}]


def test_a_file_that_is_no_text_or_too_long_is_refused(tmp_path: Path) -> None:
    (tmp_path / "examples.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRequestError, match="cannot be used"):
        read_examples(tmp_path)
    (tmp_path / "examples.jsonl").write_bytes(b'"x"\n' * 2_000_000)
    with pytest.raises(InvalidRequestError, match="more than"):
        read_examples(tmp_path)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text('"a"\n"b"\n')
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/examples.jsonl").symlink_to(tmp_path / "secret")
    assert read_examples(tmp_path / "folder") is None


def test_a_link_counts_inside_the_folder_that_is_named_only(tmp_path: Path) -> None:
    """As in the Hub's cache, whose snapshots link into its blobs."""
    cache, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    for folder in (cache / "blobs", cache / "snapshot", elsewhere):
        folder.mkdir(parents=True)
    for blob in (cache / "blobs/x", elsewhere / "x"):
        blob.write_text('"a"\n"b"\n')
    link = cache / "snapshot/examples.jsonl"
    link.symlink_to("../blobs/x")
    assert read_examples(link.parent) is None
    assert read_examples(link.parent, cache) == ["a", "b"]
    link.unlink()
    link.symlink_to(elsewhere / "x")
    assert read_examples(link.parent, cache) is None


def test_tokens_that_the_model_does_not_know_are_refused_by_index() -> None:
    """Some tokenizers have more tokens, a padding token mostly, than the model has embeddings."""
    with pytest.raises(InvalidRequestError, match=r"examples\[0\] has token 304 of the tokenizer, .* ids below 304"):
        encode_examples(["x", "y"], ByteRenderer(), vocab_size=304)
    assert encode_examples(["x", "y"], ByteRenderer(), vocab_size=305)
