"""The training mix: which chats of which tasks, framed how and joined with what, as a pure function of the settings."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from router_training.composites import CompositeChat, encode_composite, pair_up
from router_training.data import Chat, TrainingDataError, balanced_sample, data_digest
from router_training.encoding import ChatRenderer, TokenSequence, encode_chats
from router_training.rephrasing import rephrase_some, without_framing
from router_training.settings import TrainingConfig
from server.errors import InvalidRequestError

QUESTION_TOKENS = 640
"""Longest sequence that a prompt gate learns from: the question that it reads, and what stands before it."""

QUESTION_MIXES = 6
"""Fits whose mean a prompt gate is. What differs between them is noise: frames, pairs and order of the same chats."""


@dataclass(frozen=True)
class Mix:
    """Chats in order of training; every so many of them a composite takes a place."""

    chats: tuple[Chat, ...]
    composites: tuple[CompositeChat, ...]

    @property
    def digest(self) -> str:
        """sha256 over everything the router is trained on, in order."""
        parts = [part for composite in self.composites for part in (composite.first, composite.second)]
        return data_digest([*self.chats, *parts])

    def __len__(self) -> int:
        return len(self.chats) + len(self.composites)

    def count(self, task: str) -> int:
        """Single chats of a task."""
        return sum(chat.task == task for chat in self.chats)


def draw_mix(chats: Mapping[str, Sequence[Chat]], config: TrainingConfig) -> Mix:
    """`config.samples` chats and composites together."""
    num_composites = round(config.samples * config.composite_fraction)
    single = balanced_sample(chats, config.samples - num_composites, config.seed)
    composites = pair_up(chats, num_composites, config.seed) if num_composites else []
    return Mix(tuple(rephrase_some(single, config.rephrase_fraction, config.seed)), tuple(composites))


def draw_question_mixes(chats: Mapping[str, Sequence[Chat]], config: TrainingConfig) -> tuple[Mix, ...]:
    """What the fits of a prompt gate are made of, none where there is to be none: mixes of their own, since questions
    that run through no model cost next to nothing. Chats are repeated only as far as tasks need to keep up with the
    largest. Runs of different seeds have no mix in common."""
    if not config.prompt_gate:
        return ()
    most = len(chats) * max(len(rows) for rows in chats.values())
    samples = min(config.prompt_gate_samples, most)
    seeds = range(config.seed * QUESTION_MIXES, (config.seed + 1) * QUESTION_MIXES)
    return tuple(draw_mix(chats, config.model_copy(update={"samples": samples, "seed": seed})) for seed in seeds)


def question_facts(questions: Sequence[Mix]) -> dict[str, Any]:
    """What a prompt gate was fitted on, nothing where there is none."""
    if not questions:
        return {}
    together = hashlib.sha256("".join(mix.digest for mix in questions).encode()).hexdigest()
    return {"question_sha256": together, "question_chats": len(questions[0]), "question_mixes": len(questions)}


def question_settings(config: TrainingConfig) -> TrainingConfig:
    """What `encode_mix` takes for one of `draw_question_mixes`: sequences as long as a prompt gate reads."""
    return config.model_copy(update={"max_length": QUESTION_TOKENS, "too_long": "cut"})


def encode_mix(
    mix: Mix,
    label_of_task: Mapping[str, int],
    tokenizer: ChatRenderer,
    eos_token_ids: Collection[int],
    config: TrainingConfig,
) -> list[TokenSequence]:
    """Token sequences in order of training, composites spread evenly among the single chats.

    Raises TrainingDataError as `encode_chats` does. A composite longer than `max_length` is cut where chats may be, and
    left out where that cannot make it fit or chats may not. The chats have been checked as they are in the data: one
    that its frame makes too long is cut, and one loses the system message that its frame gave it where the template
    takes none.
    """
    chats = mix.chats if takes_system_messages(tokenizer) else list(map(without_framing, mix.chats))
    single = encode_chats(chats, label_of_task, tokenizer, eos_token_ids, max_length=config.max_length, too_long="cut")
    longest = config.max_length if config.too_long == "cut" else None
    joined = [
        encode_composite(composite, label_of_task, tokenizer, eos_token_ids, max_length=longest)
        for composite in mix.composites
    ]
    return interleave(single, [sequence for sequence in joined if len(sequence) <= config.max_length])


def takes_system_messages(tokenizer: ChatRenderer) -> bool:
    """Whether the chat template does; some refuse them."""
    messages = [{"role": "system", "content": "A"}, {"role": "user", "content": "A"}]
    try:
        tokenizer.render_chat(messages, add_generation_prompt=True)
    except InvalidRequestError:
        return False
    return True


def interleave(single: Sequence[TokenSequence], joined: Sequence[TokenSequence]) -> list[TokenSequence]:
    """Both in order, the second spread evenly among the first."""
    total = len(single) + len(joined)
    result, taken = [], 0
    for index in range(total):
        if taken < len(joined) and (taken + 0.5) * total <= (index + 0.5) * len(joined):
            result.append(joined[taken])
            taken += 1
        else:
            result.append(single[index - taken])
    return result


def check_longest(sequences: Sequence[TokenSequence], max_model_len: int, chats: Sequence[Chat]) -> None:
    """Refuse chats that the base model cannot read whole. Raises TrainingDataError with file and line of each."""
    problems = [
        f"{chat.origin}: {len(sequence)} tokens, and the base model reads {max_model_len}"
        for chat, sequence in zip(chats, sequences, strict=True)
        if len(sequence) > max_model_len
    ]
    if problems:
        raise TrainingDataError(problems)
