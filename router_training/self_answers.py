"""Off-domain chats from bare questions: the base model's own greedy answers, which a router should leave alone."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from router_training.data import TrainingDataError
from router_training.encoding import TokenSequence
from router_training.generation import generate_answers
from router_training.roster import Roster

SENTENCE_ENDS = (".", "!", "?", "\n")


def read_prompts(path: Path) -> list[str]:
    """One question a line, blank lines left out. Raises TrainingDataError if there is none or the file is no text."""
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingDataError([f"{path}: cannot be read as UTF-8 text ({error})"]) from error
    if not prompts:
        raise TrainingDataError([f"{path}: the file holds no prompt; it takes one a line"])
    return prompts


def answer_prompts(
    roster: Roster, prompts: Sequence[str], max_new_tokens: int, *, on_batch: Callable[[int], None] = lambda _: None
) -> list[str]:
    """The base model's greedy answer to each prompt, without adapters; see `whole_sentences` for answers cut short.

    Raises TrainingDataError for prompts that leave no room for an answer.
    """
    loaded = roster.loaded
    rendered = [loaded.tokenizer.render_chat([{"role": "user", "content": prompt}]) for prompt in prompts]
    longest = loaded.max_model_len - max_new_tokens
    if problems := [
        f"prompt {number}: {len(tokens)} tokens; the base model reads {loaded.max_model_len}, {max_new_tokens} of them "
        "for the answer"
        for number, tokens in enumerate(rendered, start=1)
        if len(tokens) > longest
    ]:
        raise TrainingDataError(problems)
    sequences = [TokenSequence(tuple(tokens), len(tokens), 0) for tokens in rendered]
    answers = generate_answers(
        roster.routed, sequences, roster.base_plans(), loaded.eos_token_ids, max_new_tokens, on_batch=on_batch
    )
    texts = [(loaded.tokenizer.decode(tokens).strip(), len(tokens) == max_new_tokens) for tokens in answers]
    return [whole_sentences(text) if was_cut else text for text, was_cut in texts]


def whole_sentences(text: str) -> str:
    """`text` up to the end of its last whole sentence; all of it if it has none."""
    end = max(text.rfind(mark) for mark in SENTENCE_ENDS)
    return text[: end + 1].strip() or text


def write_chats(prompts: Sequence[str], answers: Sequence[str], path: Path) -> int:
    """Chat-JSONL of the pairs whose answer is not empty; returns how many."""
    pairs = [(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if answer]
    lines = [
        json.dumps(
            {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]},
            ensure_ascii=False,
        )
        for prompt, answer in pairs
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(pairs)
