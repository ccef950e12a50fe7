"""Where a chat template puts a user's words, and which tokens end lines, found by rendering. Fits nothing."""

from typing import Protocol

from router_training.encoding import ChatRenderer, around_words, common_length
from server.errors import ConfigError, InvalidRequestError
from server.routing.chat_frame import ChatFrame


class FrameTokenizer(ChatRenderer, Protocol):
    """What a frame needs of `server.model.tokenizer.ChatTokenizer`."""

    @property
    def vocab_size(self) -> int: ...

    def token_bytes(self, token_id: int) -> bytes: ...


def chat_frame(tokenizer: FrameTokenizer) -> ChatFrame:
    """What the chat template puts around a user's first words, whatever stands before them, and which tokens end lines.

    Raises ConfigError for a template whose user turns cannot be told apart by whole tokens.
    """

    try:
        openings, closings = zip(*(around_words(tokenizer, system) for system in (None, "A", "7")), strict=True)
    except InvalidRequestError as error:
        raise ConfigError(f"no prompt gate for this base model: {error.message}; train without it") from error
    header = openings[0]
    for opening in openings[1:]:
        header = header[len(header) - common_length(header[::-1], opening[::-1]) :]
    if not header or not closings[0]:
        raise ConfigError("no prompt gate for this base model: its chat template puts no tokens around a user's words")
    same = len(set(map(tuple, closings))) == 1
    counts = ((token, line_ends_behind(tokenizer.token_bytes(token))) for token in range(tokenizer.vocab_size))
    line_ends = tuple((token, count) for token, count in counts if count)
    return ChatFrame(tuple(header), closings[0][0], tuple(closings[0]) if same else (), line_ends)


def line_ends_behind(text: bytes) -> int:
    """Line ends in the white space that the text ends with: some tokenizers join them to the sign before."""
    return text[len(text.rstrip()) :].count(b"\n")
