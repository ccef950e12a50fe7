"""Answer likelihood per task and policy, measured on the server's own gates. Knows how to compare, not how to train."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from router_training.encoding import IGNORED, TokenBatch, TokenSequence, batches_by_length, collate
from router_training.forward import answer_losses
from router_training.roster import BASE_TASK
from server.routing.attach import RoutedModel
from server.routing.context import GateBatch, RoutingBatch, build_gate_batch
from server.routing.plan_course import PlanCourse
from server.routing.policy import GatePlan

EVALUATED_GENERATION = 1
"""Router generation that evaluations publish; there is never another beside it."""

MAX_BATCH_TOKENS = 1024
"""Padded tokens per forward pass; more gains nothing on two cores."""

BatchMaker = Callable[[TokenBatch], RoutingBatch | None]
"""Gates for one padded batch; None runs the bare base model."""


@dataclass
class _Sums:
    loss: float = 0.0
    tokens: int = 0
    own_share: float = 0.0
    own_first: float = 0.0


def gate_batch(
    routed: RoutedModel, batch: TokenBatch, plan_of_label: Sequence[GatePlan], *, collect_layers: bool = False
) -> GateBatch | None:
    """The server's gates for a batch: each token under the plan of its label, unless a prompt gate has its say. The
    router of a row's first label is asked."""
    rows = [ids[:length] for ids, length in zip(batch.token_ids.tolist(), batch.lengths.tolist(), strict=True)]
    first_labels = batch.labels[:, 0].tolist()
    courses = [
        routed.routers.prompt_course(plan_of_label[label], row) for label, row in zip(first_labels, rows, strict=True)
    ]
    plans, plan_of_token = plans_of_tokens(plan_of_label, batch.labels, courses, [0] * len(rows))
    return build_gate_batch(
        plans,
        plan_of_token.flatten(),
        bank=routed.bank.snapshot,
        routers=routed.routers,
        collect_layers=collect_layers,
    )


def plans_of_tokens(
    plan_of_label: Sequence[GatePlan], labels: Tensor, courses: Sequence[PlanCourse], starts: Sequence[int]
) -> tuple[list[GatePlan], Tensor]:
    """Plans, those of the labels first, and which one each position follows, (S, L) int64: that of its label, or what
    the row's course says. `labels` (S, L); `starts`: column of each row's first token."""
    plans, plan_of_token = list(plan_of_label), labels.clone()
    for row, (course, first) in enumerate(zip(courses, starts, strict=True)):
        start = first
        for stop, own in course.spans:
            plan_of_token[row, start : first + stop] = index_of(own, plans)
            start = first + stop
    return plans, plan_of_token


def index_of(plan: GatePlan, plans: list[GatePlan]) -> int:
    """Where it is in `plans`, at the end if it was not there yet."""
    if plan not in plans:
        plans.append(plan)
    return plans.index(plan)


def evaluate_policy(
    routed: RoutedModel,
    sequences: Sequence[TokenSequence],
    tasks: Sequence[str],
    plan_of_label: Sequence[GatePlan],
    *,
    on_batch: Callable[[int], None] = lambda _: None,
) -> dict[str, dict[str, float]]:
    """Per task, `tasks` in the order of labels: `nll` (nats per answer token), `tokens`, and of the
    gates over answer positions `own_share` (mean weight of the own adapter) and `own_top1` (share of (token, gate)
    pairs whose largest weight is the own adapter's).
    """
    return evaluate_batches(
        routed,
        sequences,
        tasks,
        lambda batch: gate_batch(routed, batch, plan_of_label, collect_layers=True),
        on_batch=on_batch,
    )


@torch.inference_mode()
def evaluate_batches(
    routed: RoutedModel,
    sequences: Sequence[TokenSequence],
    tasks: Sequence[str],
    make_batch: BatchMaker,
    *,
    on_batch: Callable[[int], None] = lambda _: None,
) -> dict[str, dict[str, float]]:
    """As `evaluate_policy`, for any maker of routing batches; gate statistics only where the gates are the server's."""
    sums = [_Sums() for _ in tasks]
    for group in batches_by_length(sequences, MAX_BATCH_TOKENS):
        batch = collate([sequences[index] for index in group])
        gates = make_batch(batch)
        losses = answer_losses(routed, batch, gates)
        labels = batch.token_labels[(batch.targets != IGNORED).flatten()]  # (N,)
        for label in sorted(set(labels.tolist())):
            own = losses[labels == label]
            sums[label].loss += float(own.sum())
            sums[label].tokens += own.numel()
        if isinstance(gates, GateBatch):
            _add_gate_statistics(sums, gates, batch)
        on_batch(len(group))
    return {
        task: {
            "nll": total.loss / total.tokens,
            "tokens": total.tokens,
            "own_share": total.own_share / total.tokens,
            "own_top1": total.own_first / total.tokens,
        }
        for task, total in zip(tasks, sums, strict=True)
        if total.tokens
    }


def _add_gate_statistics(sums: Sequence[_Sums], gates: GateBatch, batch: TokenBatch) -> None:
    positions = batch.answer_positions
    labels = batch.token_labels[positions]
    own = gates.share[positions].gather(1, labels[:, None])[:, 0]
    layers = gates.layer_gates(EVALUATED_GENERATION)
    first = torch.zeros_like(own)
    for layer in layers:
        first += (layer[positions].argmax(dim=1) == labels).float() / len(layers)
    for label in sorted(set(labels.tolist())):
        sums[label].own_share += float(own[labels == label].sum())
        sums[label].own_first += float(first[labels == label].sum())


def compare_policies(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Summary of `policy -> task -> measures` for the policies base, own_adapter, uniform and routed.

    Means are over the tasks that have an adapter; chats of the base model itself stand beside them.
    """
    tasks = list(results["routed"])
    nll = {policy: {task: results[policy][task]["nll"] for task in tasks} for policy in results}
    ratio = {task: nll["routed"][task] / nll["own_adapter"][task] for task in tasks}
    adapted = [task for task in tasks if task != BASE_TASK]
    mean = {policy: sum(nll[policy][task] for task in adapted) / len(adapted) for policy in results}
    return {
        "policies": {policy: dict(measures) for policy, measures in results.items()},
        "ratio_to_own_adapter": ratio,
        "mean_nll": mean,
        "mean_ratio_to_own_adapter": sum(ratio[task] for task in adapted) / len(adapted),
        "ratio_of_means_to_own_adapter": mean["routed"] / mean["own_adapter"],
        "beats_base": [task for task in adapted if nll["routed"][task] < nll["base"][task]],
        "beats_uniform": [task for task in adapted if nll["routed"][task] < nll["uniform"][task]],
    }
