"""User questions that the base model makes up itself, so that off-domain chats need no question file.

An instruct model that is given its chat template's opening up to a user's first word goes on with a plausible question
and ends it as the template ends a user's turn (Magpie, Xu et al. 2024, arXiv 2406.08464). Knows no answers.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from router_training.data import Chat, TrainingDataError, read_chats
from router_training.encoding import TokenSequence, around_words
from router_training.generation import generate_answers, nucleus
from router_training.roster import BASE_TASK, Roster
from server.errors import ConfigError, InvalidRequestError, LoraMixerError
from server.model.loader import LoadedModel
from server.model.tokenizer import ChatTokenizer

ROWS = 32
"""Questions sampled per round. Fixed, so that more questions under one seed begin with those of fewer."""
MAX_SAMPLES = 8
"""Sampled questions per wanted one before giving up: the demo's model needs fewer than two."""
MIN_WORDS = 3
"""Fewer are a greeting or a fragment."""


@dataclass(frozen=True)
class InventionSettings:
    """How many questions, and how they are drawn. Raises ConfigError with everything that is out of range."""

    count: int
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 0.97
    max_question_tokens: int = 200

    def __post_init__(self) -> None:
        problems = []
        if self.count < 1:
            problems.append("--invent must be at least 1")
        if not 0 <= self.seed < 2**63:
            problems.append("--seed must be from 0 to 2^63 - 1")
        if not 0 < self.temperature < math.inf:
            problems.append("--temperature must be above 0 and finite")
        if not 0 < self.top_p <= 1:
            problems.append("--top-p must be above 0 and at most 1")
        if self.max_question_tokens < 1:
            problems.append("--max-question-tokens must be at least 1")
        if problems:
            raise ConfigError("; ".join(problems))


def invent_questions(
    roster: Roster,
    settings: InventionSettings,
    *,
    excluded: Collection[str] = (),
    on_round: Callable[[int, str], None] = lambda _found, _note: None,
) -> list[str]:
    """`settings.count` different questions, none of which is one of `excluded` (up to case and spaces).

    `on_round` hears how many questions a round added, and a note. Deterministic in the settings, `excluded`, and
    machine and threads. Raises ConfigError for a base model without a frame around a user's words,
    LoraMixerError if too few questions are found.
    """
    opening, end = question_frame(roster.loaded, settings.max_question_tokens)
    prompts = [TokenSequence(tuple(opening), len(opening), 0)] * ROWS
    choose = nucleus(settings.temperature, settings.top_p, settings.seed)
    limit = settings.max_question_tokens + 1  # one more than a question may have: its end

    def sample() -> list[list[int]]:
        return generate_answers(roster.routed, prompts, roster.base_plans(), {end}, limit, choose=choose)

    return collect_questions(sample, roster.loaded.tokenizer, settings, excluded=excluded, on_round=on_round)


def collect_questions(
    sample: Callable[[], list[list[int]]],
    tokenizer: ChatTokenizer,
    settings: InventionSettings,
    *,
    excluded: Collection[str] = (),
    on_round: Callable[[int, str], None] = lambda _found, _note: None,
) -> list[str]:
    """As `invent_questions`, from rounds of sampled tokens without their end."""
    known = {same_question(text) for text in excluded}
    questions: list[str] = []
    num_sampled = 0
    while len(questions) < settings.count:
        if num_sampled >= MAX_SAMPLES * max(settings.count, ROWS):
            raise LoraMixerError(
                f"found {len(questions)} of {settings.count} questions in {num_sampled} samples; the others never "
                f"ended, had fewer than {MIN_WORDS} words, held control tokens or were there before: ask for fewer, "
                "raise --max-question-tokens, change --temperature, or pass --prompts FILE"
            )
        sampled = sample()
        num_sampled += len(sampled)
        found = []
        for tokens in sampled:
            question = question_of(tokens, tokenizer, settings.max_question_tokens)
            if question is not None and same_question(question) not in known:
                known.add(same_question(question))
                found.append(question)
        found = found[: settings.count - len(questions)]
        questions += found
        on_round(len(found), f"{num_sampled} sampled")
    return questions


def question_frame(loaded: LoadedModel, max_question_tokens: int) -> tuple[list[int], int]:
    """(tokens before a user's first word, the token that ends a user's words). Raises ConfigError if there are none."""
    why = "its chat template puts no tokens around a user's words"
    try:
        opening, closing = around_words(loaded.tokenizer)
    except InvalidRequestError as error:
        opening, closing, why = [], [], error.message
    if not opening or not closing:
        raise ConfigError(f"this base model cannot invent questions: {why}; pass --prompts FILE")
    longest = loaded.max_model_len - len(opening) - 1
    if max_question_tokens > longest:
        raise ConfigError(f"--max-question-tokens must be at most {longest} for this base model")
    return opening, closing[0]


def question_of(tokens: Sequence[int], tokenizer: ChatTokenizer, max_tokens: int) -> str | None:
    """The sampled tokens as a question; None if they did not end, are too few words, or hold a control token."""
    if len(tokens) > max_tokens or tokenizer.special_ids.intersection(tokens):
        return None
    text = tokenizer.decode(tokens).strip()
    return text if len(text.split()) >= MIN_WORDS else None


def same_question(text: str) -> str:
    """Equal for questions that differ in case and white space only."""
    return " ".join(text.split()).casefold()


def read_questions(paths: Sequence[Path]) -> list[str]:
    """Everything that users say in these chat-JSONL files. Raises TrainingDataError with all problems of all files."""
    chats: list[Chat] = []
    problems: list[str] = []
    for path in paths:
        chats += read_chats(path, BASE_TASK, problems)
    if problems:
        raise TrainingDataError(problems)
    return [message["content"] for chat in chats for message in chat.messages if message["role"] == "user"]
