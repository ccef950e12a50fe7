"""What is hidden from a template, and that all of it comes back."""

from hypothesis import given
from hypothesis import strategies as st

from server.model.hidden_text import ControlTexts, HiddenText

CONTROL = ControlTexts(["<s>", "<s>x", "<|end|>", "<|end"])
TEXT = st.lists(st.sampled_from(["<", "s", ">", "x", "|", "end", "a", "\ue000", "<s>x", "<|end|>"])).map("".join)


@given(texts=st.lists(TEXT, max_size=4))
def test_what_is_hidden_comes_back_and_no_control_text_is_left_to_see(texts: list[str]) -> None:
    hidden = HiddenText(CONTROL, [{"content": text, "parts": [{"text": text}]} for text in texts])
    for text, message in zip(texts, hidden.messages, strict=True):
        assert message["parts"][0]["text"] == message["content"]
        assert hidden.reveal(message["content"]) == text
        assert not any(control in message["content"] for control in ("<s>", "<|end"))
    joined = "".join(message["content"] for message in hidden.messages)
    assert not any(control in joined for control in ("<s>", "<|end"))


def test_the_longest_control_text_is_hidden_whole() -> None:
    (message,) = HiddenText(CONTROL, [{"content": "a<s>xa<|end|>a"}]).messages
    assert len(message["content"]) == 5


def test_nothing_is_hidden_where_nothing_is_dangerous() -> None:
    messages = [{"role": "user", "content": "2 < 3 and \ue000", "n": 1, "none": None}]
    hidden = HiddenText(CONTROL, messages)
    assert not hidden
    assert hidden.messages == messages


def test_a_tokenizer_without_control_tokens_hides_nothing() -> None:
    assert not HiddenText(ControlTexts([]), [{"content": "<s>"}])


def test_many_control_texts_cost_no_more_per_character_than_one() -> None:
    """A pattern of one branch per text would try all of them at every `<`."""
    reserved = ControlTexts([f"<|reserved_{index}|>" for index in range(300)])
    assert reserved.whole is not None
    assert reserved.whole.pattern.count("<") == 1
