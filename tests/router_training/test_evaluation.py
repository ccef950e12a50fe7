"""Likelihood per task and policy against a direct computation, and the summary over policies."""

from collections.abc import Callable

import pytest
import torch

from router_training.artefact import build_artefact
from router_training.encoding import TokenSequence
from router_training.evaluation import compare_policies, evaluate_policy
from router_training.gates import RouterParameters
from router_training.roster import Roster
from router_training.settings import TrainingConfig
from server.routing.attach import detach_routing

Sequences = Callable[..., list[TokenSequence]]


def direct_nll(roster: Roster, sequences: list[TokenSequence], label: int) -> float:
    """Nats per answer token of the bare transformers model, one unpadded sequence at a time."""
    losses = []
    for sequence in sequences:
        if sequence.label == label:
            ids = torch.tensor([sequence.token_ids])
            logits = roster.routed.model(input_ids=ids).logits[0, sequence.answer_start - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, sequence.answer_start :], reduction="none"))
    return float(torch.cat(losses).mean())


def test_base_likelihood_is_the_bare_models_whatever_the_batching(roster: Roster, make_sequences: Sequences) -> None:
    sequences = make_sequences(9)
    results = evaluate_policy(roster.routed, sequences, roster.tasks, roster.base_plans())
    detach_routing(roster.routed)
    for label, name in enumerate(roster.names, start=1):
        assert results[name]["nll"] == pytest.approx(direct_nll(roster, sequences, label), abs=1e-4)
        assert results[name]["tokens"] == sum(s.num_answer_tokens for s in sequences if s.label == label)


def test_a_router_that_always_picks_the_first_adapter_equals_that_adapter(
    roster: Roster, make_sequences: Sequences
) -> None:
    sequences = make_sequences(9)
    router = RouterParameters.zeros(roster.gated_projections(), "layer", 3, hidden_size=roster.routed.hidden_size)
    # All logits are 0, ties go to the lower slot, and one kept gate weighs exactly 1.
    artefact = build_artefact(router.detached(), roster, TrainingConfig(top_k=1))
    routed = evaluate_policy(roster.routed, sequences, roster.tasks, roster.routed_plans(artefact))
    first = [roster.own_adapter_plans()[1]] * 4
    pinned = evaluate_policy(roster.routed, sequences, roster.tasks, first)
    for name in roster.names:
        assert routed[name]["nll"] == pytest.approx(pinned[name]["nll"], abs=1e-5)
    assert [routed[name]["own_share"] for name in roster.names] == [1.0, 0.0, 0.0]
    assert [routed[name]["own_top1"] for name in roster.names] == pytest.approx([1.0, 0.0, 0.0])


def test_own_adapter_and_uniform_policies_have_the_shares_they_should(
    roster: Roster, make_sequences: Sequences
) -> None:
    sequences = make_sequences(3)
    own = evaluate_policy(roster.routed, sequences, roster.tasks, roster.own_adapter_plans())
    uniform = evaluate_policy(roster.routed, sequences, roster.tasks, roster.uniform_plans())
    assert [own[name]["own_share"] for name in roster.names] == [1.0, 1.0, 1.0]
    assert [uniform[name]["own_share"] for name in roster.names] == pytest.approx([1 / 3] * 3)


def test_summary_names_the_tasks_where_the_router_wins() -> None:
    nll = {
        "base": {"a": 3.0, "b": 1.0},
        "own_adapter": {"a": 1.0, "b": 0.5},
        "uniform": {"a": 2.0, "b": 2.0},
        "routed": {"a": 1.5, "b": 1.5},
    }
    results = {
        policy: {task: {"nll": value, "own_share": 0.0} for task, value in tasks.items()}
        for policy, tasks in nll.items()
    }
    summary = compare_policies(results)
    assert summary["ratio_to_own_adapter"] == {"a": 1.5, "b": 3.0}
    assert summary["mean_ratio_to_own_adapter"] == 2.25
    assert summary["beats_base"] == ["a"]
    assert summary["beats_uniform"] == ["a", "b"]
