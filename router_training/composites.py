"""Composite chats: two tasks in one conversation, or in one question and one answer, where the right adapter changes.

Each part keeps its label, so that the per-segment oracle is known. Encodes; samples nothing by itself.
"""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from router_training.data import Chat
from router_training.encoding import ChatRenderer, TokenSequence, up_to_last

Kind = Literal["conversation", "answer"]
KINDS: tuple[Kind, ...] = ("conversation", "answer")
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class CompositeChat:
    """`conversation`: two turns. `answer`: both questions in one message and both answers in one message."""

    kind: Kind
    first: Chat
    second: Chat


def pair_up(chats: Mapping[str, Sequence[Chat]], count: int, seed: int) -> list[CompositeChat]:
    """`count` composites of two chats of different tasks, kinds and tasks in turn, drawn with `seed`.

    Only chats of one question and one answer take part. Raises ValueError where fewer than two tasks have some.
    """
    usable = {task: [chat for chat in rows if len(chat.messages) == 2] for task, rows in chats.items()}
    tasks = sorted(task for task, rows in usable.items() if rows)
    if len(tasks) < 2:
        raise ValueError("composite chats need single-question chats of at least two tasks")
    generator = random.Random(seed)
    composites = []
    for index in range(count):
        first = tasks[index % len(tasks)]
        second = generator.choice([task for task in tasks if task != first])
        kind = KINDS[index // len(tasks) % len(KINDS)]
        composites.append(CompositeChat(kind, generator.choice(usable[first]), generator.choice(usable[second])))
    return composites


def encode_composite(
    composite: CompositeChat,
    label_of_task: Mapping[str, int],
    tokenizer: ChatRenderer,
    eos_token_ids: Collection[int],
) -> TokenSequence:
    """Render as a request would be. Both answers count; separators and the second question do not.

    A position belongs to the adapter whose answer it predicts; question tokens belong to their own task.
    """
    labels = (label_of_task[composite.first.task], label_of_task[composite.second.task])
    if composite.kind == "conversation":
        sequence = _encode_conversation(composite, labels, tokenizer, eos_token_ids)
    else:
        sequence = _encode_answer(composite, labels, tokenizer)
    tokens = tuple(up_to_last(list(sequence.token_ids), eos_token_ids))
    return replace(sequence, token_ids=tokens)


def _encode_conversation(
    composite: CompositeChat, labels: tuple[int, int], tokenizer: ChatRenderer, eos_token_ids: Collection[int]
) -> TokenSequence:
    messages = [dict(message) for chat in (composite.first, composite.second) for message in chat.messages]
    first_prompt = tokenizer.render_chat(messages[:1], add_generation_prompt=True)
    first_turn = tokenizer.render_chat(messages[:2], add_generation_prompt=False)
    second_prompt = tokenizer.render_chat(messages[:3], add_generation_prompt=True)
    whole = tokenizer.render_chat(messages, add_generation_prompt=False)
    turn = len(up_to_last(first_turn, eos_token_ids))
    unscored = tuple(range(turn, common_length(second_prompt, whole)))
    return TokenSequence(tuple(whole), common_length(first_prompt, whole), labels[0], ((turn, labels[1]),), unscored)


def _encode_answer(composite: CompositeChat, labels: tuple[int, int], tokenizer: ChatRenderer) -> TokenSequence:
    questions = [composite.first.messages[0]["content"], composite.second.messages[0]["content"]]
    answers = [composite.first.messages[1]["content"], composite.second.messages[1]["content"]]
    question = {"role": "user", "content": SEPARATOR.join(questions)}

    def render(*contents: str) -> list[int]:
        answer = {"role": "assistant", "content": "".join(contents)}
        return tokenizer.render_chat([question, answer], add_generation_prompt=False)

    prompt = tokenizer.render_chat([question], add_generation_prompt=True)
    whole = render(answers[0], SEPARATOR, answers[1])
    first_only = tokenizer.render_chat([{**question, "content": questions[0] + SEPARATOR}], add_generation_prompt=True)
    second_question = common_length(first_only, prompt)
    question_end = common_length(
        tokenizer.render_chat([{**question, "content": question["content"] + " "}], add_generation_prompt=True), prompt
    )
    first_end = common_length(render(answers[0]), whole)
    second_start = max(first_end, common_length(render(answers[0], SEPARATOR), whole))
    changes = ((second_question, labels[1]), (question_end, labels[0]), (second_start - 1, labels[1]))
    return TokenSequence(tuple(whole), len(prompt), labels[0], changes, tuple(range(first_end, second_start)))


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of leading tokens that both share."""
    for position, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return position
    return min(len(first), len(second))
