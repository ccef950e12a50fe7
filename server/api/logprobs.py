"""Log-probabilities in the shapes of OpenAI's chat and completions APIs, and vLLM's prompt_logprobs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from server.engine.sequence import TokenLogprobs

if TYPE_CHECKING:
    from server.model.tokenizer import ChatTokenizer

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say; OpenAI's value."""


def token_label(tokenizer: "ChatTokenizer", token_id: int) -> str:
    """A token as text; one that is only part of a character as `bytes:\\xe2\\x82`, as OpenAI's completions have it."""
    return _label(tokenizer.token_bytes(token_id))


def _label(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(tokenizer: "ChatTokenizer", entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """`choices[].logprobs` of a chat answer or chunk."""

    def describe(token_id: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token_id)
        return {"token": _label(raw), "logprob": _finite(logprob), "bytes": list(raw)}

    content = [
        {
            **describe(entry.token_id, entry.logprob),
            "top_logprobs": [describe(token_id, logprob) for token_id, logprob in entry.top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: "ChatTokenizer",
    token_ids: Sequence[int],
    entries: Sequence[TokenLogprobs | None],
    offsets: Sequence[int],
    num_top: int,
) -> dict[str, Any]:
    """`choices[].logprobs` of a completion or chunk: four parallel lists.

    `offsets` are positions in the choice's text, in characters. The first token of an echoed prompt has no entry: null.
    """
    return {
        "tokens": [token_label(tokenizer, token_id) for token_id in token_ids],
        "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in entries],
        "top_logprobs": [None if entry is None else _top(tokenizer, entry, num_top) for entry in entries],
        "text_offset": list(offsets),
    }


def _top(tokenizer: "ChatTokenizer", entry: TokenLogprobs, num_top: int) -> dict[str, float]:
    """The most likely tokens, and the chosen one if it is not among them. Of two with one text, the likelier stays."""
    top: dict[str, float] = {}
    for token_id, logprob in (*entry.top[:num_top], (entry.token_id, entry.logprob)):
        top.setdefault(token_label(tokenizer, token_id), _finite(logprob))
    return top


def prompt_logprobs(
    tokenizer: "ChatTokenizer", entries: Sequence[TokenLogprobs | None], num_top: int
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: per prompt token an object by token id, with the token itself and the most likely ones.

    The first token has none: null.
    """

    def describe(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": token_label(tokenizer, token_id)}

    def position(entry: TokenLogprobs) -> dict[str, Any]:
        own = {str(entry.token_id): describe(entry.token_id, entry.logprob, entry.rank)}
        top = entry.top[:num_top]
        return own | {str(id_): describe(id_, logprob, rank) for rank, (id_, logprob) in enumerate(top, start=1)}

    return [None if entry is None else position(entry) for entry in entries]


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
