"""Turns a stream of token ids into text that may be shown at once, and finds stop strings in it.

Whatever the split into pushes, the concatenated text is the decode of all tokens, cut at the stop string: partial
characters and beginnings of stop strings are held back until they are decided. Cost per token does not grow with the
number of tokens before it.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Protocol

CONTEXT_TOKENS = 8
"""Tokens of a context that are looked at; more than a character ever has."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What decoders put in place of bytes that are no UTF-8."""


class TokenDecoder(Protocol):
    """What the detokenizer needs of a tokenizer."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` drops."""

    @property
    def is_byte_level(self) -> bool:
        """Whether decoding is nothing but joining the tokens' bytes and reading them as UTF-8."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of several tokens."""


@dataclass(frozen=True)
class TextDelta:
    """What one push produced."""

    text: str
    """New text that no later token can change or take back."""
    stopped: str | None
    """The stop string found, if any; pushes after it are ignored."""
    num_tokens: int
    """Tokens consumed by this push, up to and including the one that completed the stop string."""


class IncrementalDetokenizer:
    """Text of one sequence. Not thread-safe: one per sample.

    A stop string matches where it is first completed; of two that end at the same character, the longer one. One that
    is completed within the first `min_tokens` tokens does not count (as in vLLM). The stop string itself is part of the
    text only with `include_stop`.
    """

    def __init__(
        self,
        tokenizer: TokenDecoder,
        *,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        context: Sequence[int] = (),
    ) -> None:
        """`context`: the tokens before, if the text goes on with theirs. A SentencePiece vocabulary has the space
        before a word in the word's token, and drops it where a text begins."""
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._characters = _ByteDecoder(tokenizer) if tokenizer.is_byte_level else _WindowDecoder(tokenizer, context)
        self._matchers = tuple(_StopMatcher(text) for text in dict.fromkeys(stop) if text)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""  # text that may turn out to be the beginning of a stop string
        self._stopped: str | None = None

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Take the next tokens and return the text they settle."""
        if self._stopped is not None:
            return TextDelta("", None, 0)
        settled = []
        for index, token_id in enumerate(token_ids):
            self._num_tokens += 1
            if token_id not in self._skipped:
                settled.append(self._scan(self._characters.push(token_id)))
                if self._stopped is not None:
                    return TextDelta("".join(settled), self._stopped, index + 1)
        return TextDelta("".join(settled), None, len(token_ids))

    def finish(self) -> TextDelta:
        """Return what is still held back: the sequence is over. Bytes of an unfinished character become U+FFFD."""
        if self._stopped is not None:
            return TextDelta("", None, 0)
        text = self._scan(self._characters.finish())
        if self._stopped is None:
            text, self._held = text + self._held, ""
        return TextDelta(text, self._stopped, 0)

    def _scan(self, text: str) -> str:
        """Run the stop matchers over new text; returns what can be shown, keeps the rest in `_held`."""
        if not self._matchers:
            return text
        may_stop = self._num_tokens > self._min_tokens or self._min_tokens == 0
        pending = self._held + text
        for position, character in enumerate(text, start=len(self._held) + 1):
            found = [matcher.stop for matcher in self._matchers if matcher.advance(character)]
            if found and may_stop:
                self._stopped = max(found, key=len)
                self._held = ""
                return pending[: position if self._include_stop else position - len(self._stopped)]
        num_held = max(matcher.num_matched for matcher in self._matchers)
        shown = len(pending) - num_held
        self._held = pending[shown:]
        return pending[:shown]


class _StopMatcher:
    """Finds one string in a stream of characters, each looked at once (Knuth, Morris and Pratt, 1977)."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        """Length of the longest beginning of `stop` that the stream so far ends with; less than all of it."""
        self._fallback = [0] * (len(stop) + 1)
        for end in range(1, len(stop)):
            self._fallback[end + 1] = self._extend(self._fallback[end], stop[end])

    def advance(self, character: str) -> bool:
        """Take one character; whether it completes the stop string."""
        self.num_matched = self._extend(self.num_matched, character)
        if self.num_matched < len(self.stop):
            return False
        self.num_matched = self._fallback[self.num_matched]
        return True

    def _extend(self, num_matched: int, character: str) -> int:
        while num_matched and self.stop[num_matched] != character:
            num_matched = self._fallback[num_matched]
        return num_matched + 1 if self.stop[num_matched] == character else 0


class _ByteDecoder:
    """Byte-level BPE: exact, and each byte is looked at once."""

    def __init__(self, tokenizer: TokenDecoder) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDecoder:
    """Other tokenizers (SentencePiece and kin): decode a window of recent tokens, since a token's text can depend on
    its left neighbours (leading spaces, byte fallback). The window moves on whenever it ends with a whole character.

    A run of byte tokens that turns invalid after some of it was shown keeps what was shown, where decoding all at once
    would replace the whole run.
    """

    def __init__(self, tokenizer: TokenDecoder, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = self._end_of(context)
        self._num_shown = len(self._window)  # leading tokens of the window whose text is out

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._new_text()
        if text.endswith(REPLACEMENT):
            return ""
        if text:
            del self._window[: self._num_shown]
            self._num_shown = len(self._window)
        return text

    def finish(self) -> str:
        text = self._new_text()
        self._num_shown = len(self._window)
        return text

    def _end_of(self, context: Sequence[int]) -> list[int]:
        """Its last tokens behind any special one, if they end with a whole character."""
        words = takewhile(lambda token: token not in self._tokenizer.special_ids, reversed(context))
        end = list(islice(words, CONTEXT_TOKENS))[::-1]
        is_whole = not self._tokenizer.decode(end, skip_special_tokens=False).endswith(REPLACEMENT)
        return end if is_whole else []

    def _new_text(self) -> str:
        # Special tokens were dropped before, if they are to be dropped.
        shown = self._tokenizer.decode(self._window[: self._num_shown], skip_special_tokens=False)
        return self._tokenizer.decode(self._window, skip_special_tokens=False)[len(shown) :]
