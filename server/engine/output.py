"""What a step's answer means for its sequence: tokens taken, the end found, the event for its client. No torch here."""

from typing import Any

from server.engine.sequence import FinishReason, Sequence, StepOutput, TokenEvent


def take(sequence: Sequence, output: StepOutput, longest: int) -> TokenEvent:
    """Append what the model said, up to the token that ends the sequence, at most `longest` tokens with its prompt."""
    is_first, num_known = sequence.num_output_tokens == 0, sequence.num_tokens
    finish_reason, stop_reason = _ending(sequence, longest)
    if finish_reason is None:
        assert output.token_ids, "a row that reaches its last token samples the next"
    for token_id in output.token_ids:
        if finish_reason is not None:
            break
        sequence.append(token_id)
        finish_reason, stop_reason = _ending(sequence, longest)
    num_taken = sequence.num_tokens - num_known
    return event_of(
        sequence,
        token_ids=output.token_ids[:num_taken],
        logprobs=() if output.logprobs is None else (output.logprobs,)[:num_taken],
        routing=output.routing[:num_taken],
        prompt_logprobs=tuple(sequence.prompt_logprobs) if is_first and sequence.prompt_logprobs else None,
        finish_reason=finish_reason,
        stop_reason=stop_reason,
    )


def collect_prompt_logprobs(sequence: Sequence, output: StepOutput) -> None:
    """Add a chunk's prompt logprobs; those that a preempted sequence has already are not added again."""
    if sequence.params.prompt_logprobs is None:
        return
    known = sequence.prompt_logprobs
    if not known:
        known.append(None)  # nothing predicts the first token
    first = sequence.num_computed_tokens + 1  # prompt position of the chunk's first entry
    known.extend(output.prompt_logprobs[len(known) - first :])


def event_of(sequence: Sequence, **fields: Any) -> TokenEvent:
    """An event of this sequence."""
    return TokenEvent(sequence_id=sequence.id, num_cached_tokens=sequence.num_cached_tokens, **fields)


def may_end(sequence: Sequence, token_id: int) -> bool:
    """Whether this token ends the sequence wherever one may end it."""
    params = sequence.params
    is_eos = token_id in sequence.eos_token_ids and not params.ignore_eos
    return is_eos or token_id in params.stop_token_ids


def _ending(sequence: Sequence, longest: int) -> tuple[FinishReason | None, int | None]:
    """(finish reason, stop reason) of a sequence that has just got a token, or none yet; (None, None): it goes on."""
    params = sequence.params
    if sequence.output_token_ids and sequence.num_output_tokens >= params.min_tokens:
        token_id = sequence.output_token_ids[-1]
        if token_id in sequence.eos_token_ids and not params.ignore_eos:
            return FinishReason.STOP, None
        if token_id in params.stop_token_ids:
            return FinishReason.STOP, token_id
    if sequence.num_output_tokens >= params.max_tokens or sequence.num_tokens >= longest:
        return FinishReason.LENGTH, None
    return None, None
