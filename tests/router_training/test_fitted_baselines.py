"""Fitted baselines are made on demand, work on the tiny roster, and say what decides them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from router_training.baselines import Candidate, fixed_baselines, scored, weight_baselines
from router_training.calibration import Calibration
from router_training.cells import CellCache
from router_training.encoding import TokenSequence, collate
from router_training.evaluation import BatchMaker, evaluate_batches
from router_training.fitted_baselines import gate_candidates, linear_candidates, score_candidates, static_candidates
from router_training.linear_scores import PrototypeScorer
from router_training.phatgoose import GateSettings, stacked, train_vectors
from router_training.roster import Roster
from router_training.router_inputs import cache_inputs
from router_training.static_weights import HubSettings, SoupSettings
from server.routing.router import Granularity, gate_key

Sequences = Callable[..., list[TokenSequence]]


def losses(roster: Roster, sequences: list[TokenSequence], maker: BatchMaker) -> dict[str, float]:
    results = evaluate_batches(roster.routed, sequences, roster.tasks, maker)
    return {task: measures["nll"] for task, measures in results.items()}


@pytest.fixture
def calibration(make_sequences: Sequences) -> Calibration:
    return Calibration(make_sequences(60, seed=5))


@pytest.mark.parametrize("granularity", ["layer", "projection"])
@pytest.mark.parametrize("name", ["mean_activation", "ridge", "lda"])
def test_closed_forms_find_the_own_adapter_of_separable_tasks(
    roster: Roster, make_sequences: Sequences, calibration: Calibration, granularity: Granularity, name: str
) -> None:
    sequences = make_sequences(12)
    batch = linear_candidates(roster, calibration, granularity)[name].make()(collate(sequences))
    assert batch is not None
    cached = cache_inputs(
        roster.routed, sequences, roster.uniform_plans(), granularity, max_prompt_tokens=99, max_answer_tokens=99
    )
    infos = {gate_key(granularity, info): info for info in reversed(roster.gated_projections())}
    assert set(infos) == set(cached.inputs)
    gates = {key: batch.gates(infos[key], inputs) for key, inputs in cached.inputs.items()}
    hits = [(g.argmax(dim=1) == cached.labels).float().mean() for g in gates.values() if g is not None]
    assert len(hits) == len(infos)
    # A third by chance. Means alone know nothing of how inputs spread around them.
    assert float(torch.stack(hits).mean()) > (0.6 if name == "mean_activation" else 0.9)


def test_mean_activation_routes_and_differs_from_the_others(
    roster: Roster, make_sequences: Sequences, calibration: Calibration
) -> None:
    sequences = make_sequences(12)
    candidates = linear_candidates(roster, calibration, "layer")
    assert set(candidates) == {"mean_activation", "ridge", "lda"}
    found = [losses(roster, sequences, candidate.make()) for candidate in candidates.values()]
    found.append(losses(roster, sequences, fixed_baselines(roster)["uniform"]))
    assert len({tuple(values.values()) for values in found}) == 4


def test_weight_scores_are_made_as_before(roster: Roster, make_sequences: Sequences, calibration: Calibration) -> None:
    sequences = make_sequences(6)
    candidates = score_candidates(roster, calibration)
    for name, maker in weight_baselines(roster, calibration.sequences).items():
        assert losses(roster, sequences, candidates[name].make()) == losses(roster, sequences, maker)


def test_only_what_looks_at_chats_depends_on_them(roster: Roster, make_sequences: Sequences) -> None:
    def facts(seed: int) -> dict[str, Candidate]:
        calibration = Calibration(make_sequences(6, seed=seed))
        return {**score_candidates(roster, calibration), **linear_candidates(roster, calibration, "layer")}

    first, again, other = facts(1), facts(1), facts(2)
    changed = {name for name in first if first[name].facts != other[name].facts}
    assert changed == {"seqr_norm", "mean_activation", "ridge", "lda"}
    assert all(first[name].facts == again[name].facts for name in first)


def no_cache(name: str, facts: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    assert name
    assert facts
    return compute()


def test_static_mixtures_are_fitted_on_demand_and_better_than_where_they_start(
    roster: Roster, calibration: Calibration
) -> None:
    hub = HubSettings(evaluations=20, chats_per_task=20, penalty=0.0)
    candidates = static_candidates(roster, calibration, no_cache, SoupSettings(steps=10), hub)
    assert set(candidates) == {"lora_soups", "lorahub"}
    sequences, fixed = list(calibration.sequences), fixed_baselines(roster)
    for name, start in (("lora_soups", "uniform"), ("lorahub", "base")):
        found = losses(roster, sequences, candidates[name].make())
        assert sum(found.values()) < sum(losses(roster, sequences, fixed[start]).values())


def test_a_fit_is_computed_once_where_it_is_kept(roster: Roster, calibration: Calibration, tmp_path: Path) -> None:
    calls = []

    def fit(name: str, facts: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        def counted() -> Any:
            calls.append(name)
            return compute()

        return CellCache(tmp_path).get({"name": name, **facts}, counted)

    for steps in (2, 2, 3):
        static_candidates(roster, calibration, fit, SoupSettings(steps=steps))["lora_soups"].make()
    assert calls == ["lora_soups", "lora_soups"]


def test_trained_gates_are_one_kept_fit_per_adapter_and_route(
    roster: Roster, make_sequences: Sequences, calibration: Calibration
) -> None:
    kept: list[tuple[str, int]] = []

    def fit(name: str, facts: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        kept.append((name, facts["adapter"]))
        return json.loads(json.dumps(compute()))

    candidate = gate_candidates(roster, calibration, fit, GateSettings(steps=3))["phatgoose"]
    assert not kept
    sequences = make_sequences(6)
    found = losses(roster, sequences, candidate.make())
    assert losses(roster, sequences, candidate.make()) == found
    assert kept == [("phatgoose", 0), ("phatgoose", 1), ("phatgoose", 2)]
    vectors = [
        train_vectors(roster, index, calibration.of_label(index + 1), GateSettings(steps=3)) for index in range(3)
    ]
    scorer = PrototypeScorer(stacked(roster, vectors), "projection")
    assert losses(roster, sequences, scored(roster, scorer, 2)) == found
    more = gate_candidates(roster, calibration, fit, GateSettings(steps=4))["phatgoose"]
    assert more.facts != candidate.facts
