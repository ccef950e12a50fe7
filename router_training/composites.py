"""Composite chats: two tasks in one conversation, or in one question and one answer, where the right adapter changes.

Each part keeps its label, so that the per-segment oracle is known. Encodes; samples nothing by itself.
"""

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from router_training.data import Chat
from router_training.encoding import ChatRenderer, TokenSequence, around_words, common_length, up_to_last
from router_training.settings import BASE_NAME
from server.errors import ConfigError

Kind = Literal["conversation", "answer"]
KINDS: tuple[Kind, ...] = ("conversation", "answer")
SEPARATOR = "\n\n"
FORM = "separators are nobody's, long parts are cut, seams are in the warm start, no base model in one answer"
"""What a composite is beside its chats; belongs to whatever is kept of training or measuring on some."""
LEAST_PART = 12
"""Tokens that a cut leaves of a question or an answer; a composite that would need less of them does not fit."""

Part = tuple[int, int]
"""(first token, token behind the last) of a question or an answer."""


@dataclass(frozen=True)
class CompositeChat:
    """`conversation`: two turns. `answer`: both questions in one message and both answers in one message."""

    kind: Kind
    first: Chat
    second: Chat


def pair_up(chats: Mapping[str, Sequence[Chat]], count: int, seed: int) -> list[CompositeChat]:
    """`count` composites of two chats of different tasks, kinds and tasks in turn, drawn with `seed`.

    Only chats of one question and one answer take part, and the base model's in conversations alone: in one question
    with a task they would be taken for what is said before it. Raises ConfigError where fewer than two tasks have some.
    """
    usable = {task: [chat for chat in rows if len(chat.messages) == 2] for task, rows in chats.items()}
    tasks = sorted(task for task, rows in usable.items() if rows)
    if len(tasks) < 2:
        raise ConfigError("composite chats need chats of one question and one answer, of at least two tasks")
    generator = random.Random(seed)
    composites = []
    for index in range(count):
        first = tasks[index % len(tasks)]
        kind = KINDS[index // len(tasks) % len(KINDS)]
        others = [task for task in tasks if task != first and not (kind == "answer" and task == BASE_NAME)]
        if not others or (kind == "answer" and first == BASE_NAME):
            kind, others = "conversation", [task for task in tasks if task != first]
        second = generator.choice(others)
        composites.append(CompositeChat(kind, generator.choice(usable[first]), generator.choice(usable[second])))
    return composites


def encode_composite(
    composite: CompositeChat,
    label_of_task: Mapping[str, int],
    tokenizer: ChatRenderer,
    eos_token_ids: Collection[int],
    *,
    max_length: int | None = None,
) -> TokenSequence:
    """Render as a request would be. Both answers count; separators and the second question do not.

    A position belongs to the adapter whose answer it predicts; question tokens belong to their own task. One of more
    than `max_length` tokens is cut as `shortened` says, as far as that goes.
    """
    labels = (label_of_task[composite.first.task], label_of_task[composite.second.task])
    if composite.kind == "conversation":
        sequence, parts = _encode_conversation(composite, labels, tokenizer, eos_token_ids)
    else:
        sequence, parts = _encode_answer(composite, labels, tokenizer)
    tokens = tuple(up_to_last(list(sequence.token_ids), eos_token_ids))
    whole = replace(sequence, token_ids=tokens)
    return whole if max_length is None else shortened(whole, parts, max_length)


def shortened(sequence: TokenSequence, parts: Sequence[Part], max_length: int) -> TokenSequence:
    """Of a sequence over `max_length` its longest parts cut to one length: the last part, an answer, loses its end, the
    others their middle, so that every seam stays. What follows a cut is no answer to what stands before it and does not
    count. Parts keep `LEAST_PART` tokens, so the result may be still too long."""
    if len(sequence) <= max_length:
        return sequence
    parts = [*parts[:-1], (parts[-1][0], len(sequence))]
    lengths = [stop - start for start, stop in parts]
    limit = max(lengths)
    while limit > LEAST_PART and len(sequence) - sum(max(0, length - limit) for length in lengths) > max_length:
        limit -= 1
    dropped, seams = set[int](), set[int]()
    for start, stop in parts:
        if stop - start <= limit:
            continue
        kept_behind = 0 if stop == len(sequence) else limit // 2
        dropped.update(range(start + limit - kept_behind, stop - kept_behind))
        if kept_behind and stop - kept_behind >= sequence.answer_start:
            seams.add(stop - kept_behind)
    kept = [position for position in range(len(sequence)) if position not in dropped]
    moved = {position: index for index, position in enumerate(kept)}
    return TokenSequence(
        tuple(sequence.token_ids[position] for position in kept),
        moved[sequence.answer_start],
        sequence.label,
        tuple((moved[position], label) for position, label in sequence.label_changes),
        tuple(sorted(moved[position] for position in {*sequence.unscored, *seams} if position in moved)),
    )


def _encode_conversation(
    composite: CompositeChat, labels: tuple[int, int], tokenizer: ChatRenderer, eos_token_ids: Collection[int]
) -> tuple[TokenSequence, list[Part]]:
    messages = [dict(message) for chat in (composite.first, composite.second) for message in chat.messages]

    def ask_again(content: str) -> list[int]:
        question = {"role": "user", "content": content}
        return tokenizer.render_chat([*messages[:2], question], add_generation_prompt=True)

    first_turn = tokenizer.render_chat(messages[:2], add_generation_prompt=False)
    whole = tokenizer.render_chat(messages, add_generation_prompt=False)
    turn = len(up_to_last(first_turn, eos_token_ids))
    starts = [common_length(tokenizer.render_chat(messages[:n], add_generation_prompt=True), whole) for n in (1, 3)]
    opening, closing = map(len, around_words(tokenizer))
    unscored = tuple(range(turn, starts[1]))
    sequence = TokenSequence(tuple(whole), starts[0], labels[0], ((turn, labels[1]),), unscored)
    second = (common_length(ask_again("A"), ask_again("7")), starts[1] - closing)
    return sequence, [(opening, starts[0] - closing), (starts[0], turn), second, (starts[1], len(whole))]


def _encode_answer(
    composite: CompositeChat, labels: tuple[int, int], tokenizer: ChatRenderer
) -> tuple[TokenSequence, list[Part]]:
    questions = [composite.first.messages[0]["content"], composite.second.messages[0]["content"]]
    answers = [composite.first.messages[1]["content"], composite.second.messages[1]["content"]]

    def ask(content: str) -> list[int]:
        return tokenizer.render_chat([{"role": "user", "content": content}], add_generation_prompt=True)

    def answer(content: str) -> list[int]:
        messages = [{"role": "user", "content": SEPARATOR.join(questions)}, {"role": "assistant", "content": content}]
        return tokenizer.render_chat(messages, add_generation_prompt=False)

    prompt, whole = ask(SEPARATOR.join(questions)), answer(SEPARATOR.join(answers))
    opening, closing = map(len, around_words(tokenizer))
    second_question = _start_of_last(ask, questions[1], prompt)
    question_end = len(prompt) - closing
    first_end = common_length(answer(answers[0]), whole)
    second_start = max(first_end, _start_of_last(answer, answers[1], whole))
    changes = ((second_question, labels[1]), (question_end, labels[0]), (second_start - 1, labels[1]))
    unscored = tuple(range(first_end, second_start))
    sequence = TokenSequence(tuple(whole), len(prompt), labels[0], changes, unscored)
    parts = [(opening, second_question), (second_question, question_end), (len(prompt), first_end)]
    return sequence, [*parts, (second_start, len(whole))]


def _start_of_last(render: Callable[[str], list[int]], text: str, whole: Sequence[int]) -> int:
    """Where `text`, the last in a message, begins in the tokens of `whole`: what stands there as where it stands alone.
    Found from behind, since a separator may be other tokens at the end of a message than before words, and before words
    than before digits (two line ends are one or two tokens in SmolLM2)."""
    alone = render(text)
    opening = common_length(render("A"), render("7"))
    return len(whole) - min(common_length(alone[::-1], whole[::-1]), len(alone) - opening)
