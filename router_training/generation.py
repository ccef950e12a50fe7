"""Continuations by the routed model in padded batches, greedy or sampled. The server's engine is not involved.

Letters: S sequences, L padded length, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from router_training.encoding import TokenSequence, batches_by_length
from router_training.evaluation import index_of, plans_of_tokens
from server.routing.attach import RoutedModel
from server.routing.context import GateBatch, build_gate_batch
from server.routing.policy import GatePlan

MAX_BATCH_TOKENS = 2048
"""Padded prompt tokens per batch."""

Choose = Callable[[Tensor], Tensor]
"""Logits (S, V) behind the last tokens of a batch to the tokens (S,) that follow."""


def likeliest(logits: Tensor) -> Tensor:
    """Greedy decoding: the token of the greatest logit, (S, V) to (S,)."""
    return logits.argmax(dim=-1)


def nucleus(temperature: float, top_p: float, seed: int) -> Choose:
    """Draws from the likeliest tokens that have `top_p` of the probability (Holtzman et al. 2020, arXiv 1904.09751).

    Deterministic in the seed and the order of calls, on one machine with one number of threads.
    """
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        logits = logits.float()
        # Shifted before it is scaled, so that no temperature overflows.
        scaled = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, torch.finfo(torch.float32).tiny)
        probabilities = torch.softmax(scaled, dim=-1)  # (S, V)
        if top_p == 1:
            return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        # Tokens below this have less than 1 - top_p together, so the nucleus lies above: fewer to sort.
        least = (1 - top_p) / logits.shape[-1]
        count = int((probabilities >= least).sum(dim=-1).max())
        ordered, token_ids = probabilities.topk(count)  # (S, count)
        likelier = ordered.cumsum(dim=-1) - ordered  # what is before each token
        drawn = torch.multinomial(ordered.masked_fill(likelier >= top_p, 0.0), 1, generator=generator)  # (S, 1)
        return token_ids.gather(1, drawn).squeeze(1)

    return choose


@torch.inference_mode()
def generate_answers(
    routed: RoutedModel,
    sequences: Sequence[TokenSequence],
    plan_of_label: Sequence[GatePlan],
    end_token_ids: Collection[int],
    max_new_tokens: int,
    *,
    choose: Choose = likeliest,
    on_batch: Callable[[int], None] = lambda _: None,
) -> list[list[int]]:
    """Token ids of each sequence's answer to its prompt, end token left out, each under the plan of its label.

    One that has no end within `max_new_tokens` is that long.
    """
    answers: list[list[int]] = [[] for _ in sequences]
    prompts = [TokenSequence(s.token_ids[: s.answer_start], s.answer_start - 1, s.label) for s in sequences]
    for group in batches_by_length(prompts, MAX_BATCH_TOKENS):
        generated = _generate(
            routed, [prompts[index] for index in group], plan_of_label, frozenset(end_token_ids), max_new_tokens, choose
        )
        for index, tokens in zip(group, generated, strict=True):
            answers[index] = tokens
        on_batch(len(group))
    return answers


def _generate(
    routed: RoutedModel,
    prompts: Sequence[TokenSequence],
    plan_of_label: Sequence[GatePlan],
    ends: Collection[int],
    max_new_tokens: int,
    choose: Choose,
) -> list[list[int]]:
    row_of_prompt = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}  # equal prompts are read once
    inputs, mask = pad_left([prompt.token_ids for prompt in row_of_prompt])  # (S, L)
    labels = torch.tensor([prompt.label for prompt in row_of_prompt])[:, None].expand_as(mask)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    read = [routed.routers.prompt_course(plan_of_label[prompt.label], prompt.token_ids) for prompt in row_of_prompt]
    starts = [mask.shape[1] - len(prompt) for prompt in row_of_prompt]
    plans, plan_of_token = plans_of_tokens(plan_of_label, labels, read, starts)
    courses = [read[row_of_prompt[prompt]] for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    rows = [row_of_prompt[prompt] for prompt in prompts]  # of the running answers, in the batch
    cache = None
    for _ in range(max_new_tokens):
        gates = build_gate_batch(plans, plan_of_token.flatten(), bank=routed.bank.snapshot, routers=routed.routers)
        logits, cache = _forward(routed, gates, inputs, mask, positions, cache)
        chosen = choose(logits[rows])  # (S,)
        goes_on = [token not in ends for token in chosen.tolist()]
        running, rows = list(compress(running, goes_on)), list(compress(rows, goes_on))
        if not running:
            break
        inputs = chosen[goes_on][:, None]
        own = []
        for answer, token in zip(running, inputs.flatten().tolist(), strict=True):
            position, plan = len(prompts[answer]) + len(answers[answer]), plan_of_label[prompts[answer].label]
            answers[answer].append(token)
            courses[answer] = courses[answer].after(token, position, plan)
            own.append(index_of(courses[answer].plan_at(position, plan), plans))
        if rows != list(range(len(mask))):  # what has ended leaves the batch; equal prompts part
            cache.batch_select_indices(torch.tensor(rows))
            mask, positions = mask[rows], positions[rows]
            rows = list(range(len(rows)))
        positions, plan_of_token = positions[:, -1:] + 1, torch.tensor(own)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return answers


def _forward(
    routed: RoutedModel, gates: GateBatch | None, inputs: Tensor, mask: Tensor, positions: Tensor, cache: Any
) -> tuple[Tensor, Any]:
    """Logits (S, V) behind the last of the tokens that `cache` does not hold yet, and the cache with them."""
    model: Any = routed.model
    with routed.context.running(gates):
        output = model(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    return output.logits[:, -1], output.past_key_values


def pad_left(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (S, L) int64, with every row ending at the same column."""
    longest = max(map(len, rows))
    token_ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for index, row in enumerate(rows):
        token_ids[index, longest - len(row) :] = torch.tensor(row)
        mask[index, longest - len(row) :] = 1
    return token_ids, mask
