"""Greedy answers of the routed model in padded batches, for task metrics. The server's engine is not involved."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from router_training.encoding import TokenSequence, batches_by_length
from router_training.evaluation import plans_of_tokens
from server.routing.attach import RoutedModel
from server.routing.context import build_gate_batch
from server.routing.policy import GatePlan

MAX_BATCH_TOKENS = 2048
"""Padded prompt tokens per batch."""


@torch.inference_mode()
def generate_answers(
    routed: RoutedModel,
    sequences: Sequence[TokenSequence],
    plan_of_label: Sequence[GatePlan],
    end_token_ids: Collection[int],
    max_new_tokens: int,
    *,
    on_batch: Callable[[int], None] = lambda _: None,
) -> list[list[int]]:
    """Token ids of each sequence's answer to its prompt, end token left out, each under the plan of its label."""
    answers: list[list[int]] = [[] for _ in sequences]
    prompts = [TokenSequence(s.token_ids[: s.answer_start], s.answer_start - 1, s.label) for s in sequences]
    for group in batches_by_length(prompts, MAX_BATCH_TOKENS):
        generated = _generate(
            routed, [prompts[index] for index in group], plan_of_label, frozenset(end_token_ids), max_new_tokens
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
) -> list[list[int]]:
    model: Any = routed.model
    inputs, mask = pad_left([prompt.token_ids for prompt in prompts])  # (S, L)
    labels = torch.tensor([prompt.label for prompt in prompts])
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    answers: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    cache = None
    rows = [prompt.token_ids for prompt in prompts]
    plans, plan_of_token = plans_of_tokens(
        routed, plan_of_label, labels[:, None].expand_as(mask), rows, is_padded_left=True
    )
    for _ in range(max_new_tokens):
        gates = build_gate_batch(plans, plan_of_token.flatten(), bank=routed.bank.snapshot, routers=routed.routers)
        with routed.context.running(gates):
            output = model(
                input_ids=inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        cache = output.past_key_values
        chosen = output.logits[:, -1].argmax(dim=-1)  # (S,)
        for row, token in enumerate(chosen.tolist()):
            running[row] = running[row] and token not in ends
            if running[row]:
                answers[row].append(token)
        if not any(running):
            break
        inputs, positions, plan_of_token = chosen[:, None], positions[:, -1:] + 1, labels[:, None]
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    return answers


def pad_left(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (S, L) int64, with every row ending at the same column."""
    longest = max(map(len, rows))
    token_ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for index, row in enumerate(rows):
        token_ids[index, longest - len(row) :] = torch.tensor(row)
        mask[index, longest - len(row) :] = 1
    return token_ids, mask
