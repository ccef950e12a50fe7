"""How answers of each task end where others may follow: at a line end, at an empty line, or neither. Fits nothing."""

from collections.abc import Iterator, Sequence
from itertools import takewhile

from router_training.encoding import TokenSequence
from server.routing.chat_frame import ChatFrame

LINE_ENDS = (1, 2)
"""In a row: the end of a line, and an empty line."""


def answer_ends(
    frame: ChatFrame, sequences: Sequence[TokenSequence], *, first_slot: int, num_choices: int
) -> tuple[int, ...]:
    """`PromptGate.answer_ends`, counted in the answers of one task: one line end, or an empty line, is the end of an
    answer where answers hold at most one on average; else, or where a choice has no answers, 0."""
    answers = [0] * num_choices
    held = {least: [0] * num_choices for least in LINE_ENDS}
    for sequence in sequences:
        if not sequence.label_changes:
            choice = sequence.label - first_slot
            answers[choice] += 1
            for count in _line_ends(frame, sequence.token_ids[sequence.answer_start :]):
                for least in LINE_ENDS:
                    held[least][choice] += count >= least
    return tuple(
        next((least for least in LINE_ENDS if total and held[least][choice] <= total), 0)
        for choice, total in enumerate(answers)
    )


def _line_ends(frame: ChatFrame, answer: Sequence[int]) -> Iterator[int]:
    """How many there are in every row of them, up to the answer's end."""
    in_a_row = 0
    for token in takewhile(lambda token: token != frame.end, answer):
        if line_ends := frame.newlines.get(token, 0):
            in_a_row += line_ends
        elif in_a_row:
            yield in_a_row
            in_a_row = 0
    if in_a_row:
        yield in_a_row
