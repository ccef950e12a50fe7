"""What a chat template puts around the words of a chat, in token ids: where questions stand, and where lines end."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class ChatFrame:
    """Where the questions stand in a rendered chat, in token ids."""

    header: tuple[int, ...]
    """What the chat template puts right before a user's words."""
    end: int
    """The first token after them."""
    answer: tuple[int, ...] = ()
    """What the template puts between them and the answer, `end` included; none in artefacts of earlier trainers."""
    line_ends: tuple[tuple[int, int], ...] = ()
    """(token, line ends that it ends with) of all tokens that end with any; none in earlier artefacts."""

    @cached_property
    def newlines(self) -> Mapping[int, int]:
        """token -> line ends in it."""
        return dict(self.line_ends)

    def question(self, token_ids: Sequence[int]) -> tuple[int, int] | None:
        """(first token, token behind the last) of the first user message; None where there is none or it is empty."""
        found = next(self.user_messages(token_ids), None)
        return found if found is not None and found[0] < found[1] else None

    def is_answered(self, token_ids: Sequence[int], stop: int) -> bool:
        """Whether the answer's header is what follows the user message that ends at `stop`."""
        return bool(self.answer) and tuple(token_ids[stop : stop + len(self.answer)]) == self.answer

    def user_messages(self, token_ids: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(first token, token behind the last) of every user message in order, equal where it is empty."""
        width, position = len(self.header), 0
        try:
            while True:
                position = token_ids.index(self.header[0], position)
                if tuple(token_ids[position : position + width]) != self.header:
                    position += 1
                    continue
                start = position + width
                position = token_ids.index(self.end, start)
                yield start, position
        except ValueError:  # no further one, or one without an end
            return
