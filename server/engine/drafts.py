"""Guesses of what a sequence says next, read from what it has said and been asked: no model, no torch.

Much of what is generated stands in the text already: names, numbers, code, phrases. A step that computes one token can
compute a few more for almost nothing, since it reads all weights anyway; where the guesses are what the model would
have said, a step yields several tokens. This is prompt lookup decoding (Saxena, 2023; `prompt_lookup_num_tokens` in
transformers), with drafts whose length follows what was right before.
"""

from collections.abc import Sequence

NGRAM = 3
"""Tokens that must stand in the text already, in a row, for what follows them there to be a guess."""
SHORTEST = 2
"""Tokens of a draft after a wrong one."""
LONGEST_PAUSE = 16
"""Most tokens without a draft, after several in a row that were wrong from the first token."""


class Drafter:
    """Guesses for one sequence. Costs memory and time in proportion to its tokens, each looked at once."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}  # n-gram -> where what followed it last begins
        self._length = SHORTEST
        self._pause = 0
        self._num_waiting = 0

    @property
    def num_tokens(self) -> int:
        """Tokens it has been told."""
        return len(self._tokens)

    def tell(self, token_ids: Sequence[int]) -> None:
        """Learn the sequence's next tokens."""
        for token_id in token_ids:
            if len(self._tokens) >= NGRAM:
                self._follows[tuple(self._tokens[-NGRAM:])] = len(self._tokens)
            self._tokens.append(token_id)

    def draft(self, most: int) -> list[int]:
        """At most `most` tokens that may follow; often none."""
        if self._num_waiting > 0:
            self._num_waiting -= 1
            return []
        start = self._follows.get(tuple(self._tokens[-NGRAM:]))
        if start is None:
            return []
        wanted = min(most, self._length)
        drafts = self._tokens[start : start + wanted]
        while len(drafts) < wanted:  # a text that repeats itself goes on with what was just guessed
            drafts += drafts[: wanted - len(drafts)]
        return drafts

    def judge(self, num_drafted: int, num_right: int, most: int) -> None:
        """What became of the last draft, which was not empty: longer ones after a right one, fewer after wrong ones."""
        if num_right == num_drafted:
            self._length, self._pause = min(2 * self._length, most), 0
            return
        self._length = max(SHORTEST, num_right)
        self._pause = min(LONGEST_PAUSE, max(1, 2 * self._pause)) if num_right == 0 else 0
        self._num_waiting = self._pause
