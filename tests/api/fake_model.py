"""A stand-in for tokenizer and model: bytes as tokens, and a runner that says what a test tells it to."""

import threading
import time
from collections.abc import Sequence
from typing import Any

from server.engine.sequence import (
    RunResult,
    ScheduledBatch,
    ScheduledSequence,
    StepOutput,
    TokenLogprobs,
    TokenRouting,
    TraceLevel,
)
from server.engine.sequence import Sequence as EngineSequence
from server.engine.step_stats import RoutingStats
from server.errors import InvalidRequestError
from server.routing.policy import GatePlan, Policy

NUM_LAYERS = 2


class ByteTokenizer:
    """One token per byte, three control tokens, and a few longer tokens; ChatML-like template. Byte level."""

    is_byte_level = True
    start_id, end_id = 256, 257

    def __init__(self) -> None:
        self.special_ids = frozenset((self.start_id, self.end_id))
        self._long = {b"<|im_start|>": 256, b"<|im_end|>": 257, b"hello": 258, b" world": 259}
        self._bytes = {token_id: text for text, token_id in self._long.items()}
        self.vocab_size = 260
        self.threads: set[str] = set()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        self.threads.add(threading.current_thread().name)
        data, ids = text.encode(), [self.start_id] if add_special_tokens and text.startswith("BOS") else []
        while data:
            piece = next((long for long in self._long if data.startswith(long)), data[:1])
            ids.append(self._long.get(piece, data[0]))
            data = data[len(piece) :]
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        kept = [i for i in token_ids if not (skip_special_tokens and i in self.special_ids)]
        return b"".join(self.token_bytes(i) for i in kept).decode(errors="replace")

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        if messages[0]["content"] == "refuse me":
            raise InvalidRequestError(
                "the chat template refuses these messages: roles must alternate", param="messages"
            )
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        if continue_final_message:
            text = text.removesuffix("<|im_end|>\n")
        elif add_generation_prompt:
            text += "<|im_start|>assistant\n"
        return self.encode(text, add_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes.get(token_id) or bytes([token_id])

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode(errors="replace")


class ScriptedRunner:
    """A model that says `reply`, then its end token; logprobs and gates follow simple rules that tests can repeat."""

    def __init__(self, tokenizer: ByteTokenizer) -> None:
        self._tokenizer = tokenizer
        self.reset()

    def reset(self) -> None:
        self.reply = "Hello, wörld!"
        self.step_s = 0.0
        self.fail_after: int | None = None
        """Raise when a sequence has this many output tokens."""
        self.seen: list[EngineSequence] = []

    def run(self, batch: ScheduledBatch) -> RunResult:
        time.sleep(self.step_s)
        return RunResult([self._output(row) for row in batch.rows], RoutingStats(((1, 0.5), (2, 0.25)), (0.1, 0.6)))

    def _output(self, row: ScheduledSequence) -> StepOutput:
        sequence = row.sequence
        if sequence not in self.seen:
            self.seen.append(sequence)
        scores = self._prompt_scores(row)
        if not row.samples:
            return StepOutput(prompt_logprobs=scores)
        index = sequence.num_output_tokens
        if self.fail_after is not None and index >= self.fail_after:
            raise RuntimeError("secret detail of the failure")
        reply = self._tokenizer.encode(self.reply, add_special_tokens=False)
        token_id = reply[index] if index < len(reply) else ByteTokenizer.end_id
        num_top, level = sequence.params.logprobs, sequence.params.trace_routing
        return StepOutput(
            (token_id,),
            logprobs=None if num_top is None else fake_logprobs(token_id, num_top),
            routing=() if level is None else (fake_routing(sequence.plan, index, level),),
            prompt_logprobs=scores,
        )

    def _prompt_scores(self, row: ScheduledSequence) -> tuple[TokenLogprobs, ...]:
        sequence, begin = row.sequence, row.sequence.num_computed_tokens
        num_top = sequence.params.prompt_logprobs
        if num_top is None or len(sequence.prompt_logprobs) >= sequence.num_prompt_tokens:
            return ()
        wanted = sequence.prompt_token_ids[begin + 1 : begin + row.num_tokens + 1]
        return tuple(fake_logprobs(token_id, num_top) for token_id in wanted)


def fake_logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    """The token is the second most likely one, after 'Z'."""
    top = ((90, -0.25), (token_id, -1.5), *((i, -2.0 - i) for i in range(20)))[:num_top]
    return TokenLogprobs(token_id, -1.5, top, rank=2)


def fake_routing(plan: GatePlan, index: int, level: TraceLevel) -> TokenRouting:
    """Fixed plans as they are; routed tokens 0.75 to one allowed slot and 0.25 to the next, in turn."""
    if plan.policy is Policy.ROUTED:
        slots = plan.allowed_slots
        first, second = slots[index % len(slots)], slots[(index + 1) % len(slots)]
        share: tuple[tuple[int, float], ...] = ((first, 0.75), (second, 0.25)) if len(slots) > 1 else ((first, 1.0),)
    else:
        share = plan.weights or ((0, 1.0),)
    return TokenRouting(share, (share,) * NUM_LAYERS if level is TraceLevel.LAYERS else None)
