"""One choice of an answer: its detokenizer, how far it got, and what each event of the engine adds to it."""

from collections.abc import Sequence
from dataclasses import dataclass

from server.engine.sequence import FinishReason, TokenEvent, TokenLogprobs, TokenRouting
from server.model.detokenizer import IncrementalDetokenizer


@dataclass(slots=True)
class ChoiceDelta:
    """What one event, or the sum of several, adds to one choice."""

    index: int
    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    routing: Sequence[TokenRouting] = ()
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class Choice:
    """One sample of one prompt: its detokenizer and how far it got."""

    index: int
    detokenizer: IncrementalDetokenizer
    include_stop: bool
    last_token_s: float
    num_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache."""
    finish_reason: str | None = None

    def push(self, event: TokenEvent) -> ChoiceDelta:
        """Text of `event`'s tokens, up to a stop string; only tokens up to the one that completed it count."""
        ended_by_token = event.finish_reason is FinishReason.STOP
        hides_last = ended_by_token and not self.include_stop
        text = self.detokenizer.push(event.token_ids[:-1] if hides_last else event.token_ids)
        num_tokens, piece, stopped = len(event.token_ids), text.text, text.stopped
        if stopped is not None:
            num_tokens = text.num_tokens
        elif event.finish_reason is not None:
            rest = self.detokenizer.finish()
            piece, stopped = piece + rest.text, rest.stopped
        self.num_tokens += num_tokens
        self.num_cached_tokens = event.num_cached_tokens
        self.finish_reason = FinishReason.STOP if stopped is not None else event.finish_reason
        return ChoiceDelta(
            index=self.index,
            text=piece,
            token_ids=event.token_ids[:num_tokens],
            logprobs=event.logprobs[:num_tokens],
            routing=event.routing[:num_tokens],
            prompt_logprobs=event.prompt_logprobs,
            finish_reason=self.finish_reason,
            stop_reason=stopped if stopped is not None else event.stop_reason,
        )


def total(deltas: Sequence[ChoiceDelta]) -> ChoiceDelta:
    """The sum of all deltas of one choice."""
    last = deltas[-1]
    return ChoiceDelta(
        index=last.index,
        text="".join(delta.text for delta in deltas),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        logprobs=[entry for delta in deltas for entry in delta.logprobs],
        routing=[entry for delta in deltas for entry in delta.routing],
        prompt_logprobs=next((delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None), None),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )
