"""Each baseline is what its name says, on the tiny roster."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from router_training.artefact import build_artefact
from router_training.baselines import (
    fixed_baselines,
    opening_length,
    per_request,
    planned,
    routed_at,
    weight_baselines,
)
from router_training.encoding import TokenSequence
from router_training.evaluation import BatchMaker, evaluate_batches
from router_training.roster import Roster
from router_training.settings import TrainingConfig
from router_training.warm_start import warm_start
from server.routing.router import RouterArtefact
from tests.router_training.test_encoding import NEWLINE, START, ByteRenderer

Sequences = Callable[..., list[TokenSequence]]


def losses(roster: Roster, sequences: list[TokenSequence], maker: BatchMaker) -> dict[str, float]:
    results = evaluate_batches(roster.routed, sequences, roster.tasks, maker)
    return {task: measures["nll"] for task, measures in results.items()}


@pytest.fixture
def artefact(roster: Roster, make_sequences: Sequences) -> RouterArtefact:
    """A router that tells the tiny tasks apart."""
    config = TrainingConfig(warm_start_rounds=1)
    return build_artefact(warm_start(roster, make_sequences(60), config).detached(), roster, config)


def test_the_oracle_is_each_single_adapter_on_its_own_task(roster: Roster, make_sequences: Sequences) -> None:
    sequences = make_sequences(9)
    makers = fixed_baselines(roster)
    assert set(makers) == {"base", "own_adapter", "uniform", "only_alpha", "only_beta", "only_gamma"}
    found = {name: losses(roster, sequences, maker) for name, maker in makers.items()}
    for task in roster.names:
        assert found["own_adapter"][task] == pytest.approx(found[f"only_{task}"][task], abs=1e-5)
    assert found["base"] != found["uniform"]


def test_weight_baselines_route_without_training_and_differ(roster: Roster, make_sequences: Sequences) -> None:
    sequences = make_sequences(6)
    makers = weight_baselines(roster, make_sequences(12, seed=5))
    assert set(makers) == {"arrow", "spectr", "seqr_norm", "lag"}
    found = [losses(roster, sequences, maker) for maker in makers.values()]
    assert all(set(values) == set(roster.names) for values in found)
    assert len({tuple(values.values()) for values in found}) == 4


def test_another_k_changes_only_how_many_adapters_share_a_token(
    roster: Roster, make_sequences: Sequences, artefact: RouterArtefact
) -> None:
    sequences = make_sequences(6)
    by_k = {k: losses(roster, sequences, routed_at(roster, artefact, k)) for k in (1, 2, 3)}
    assert by_k[2] == losses(roster, sequences, routed_at(roster, artefact))
    assert len({tuple(values.values()) for values in by_k.values()}) == 3


def test_one_choice_per_request_is_a_single_adapter_for_every_token(
    roster: Roster, make_sequences: Sequences, artefact: RouterArtefact
) -> None:
    sequences = make_sequences(12)
    chosen = losses(roster, sequences, per_request(roster, routed_at(roster, artefact)))
    singles = {
        name: losses(roster, [s], maker) for name, maker in fixed_baselines(roster).items() for s in sequences[:1]
    }
    alone = losses(roster, sequences[:1], per_request(roster, routed_at(roster, artefact)))
    assert any(alone == pytest.approx(singles[f"only_{name}"], abs=1e-5) for name in roster.names)
    own = losses(roster, sequences, fixed_baselines(roster)["own_adapter"])
    assert chosen == pytest.approx(own, rel=0.2)


def test_choosing_for_the_opening_only_leaves_the_rest_to_the_router(
    roster: Roster, make_sequences: Sequences, artefact: RouterArtefact
) -> None:
    sequences = make_sequences(6)
    router = routed_at(roster, artefact)
    assert losses(roster, sequences, per_request(roster, router, 0)) == pytest.approx(
        losses(roster, sequences, router), abs=1e-5
    )
    everything = max(map(len, sequences))
    assert losses(roster, sequences, per_request(roster, router, everything)) == pytest.approx(
        losses(roster, sequences, per_request(roster, router)), abs=1e-5
    )
    some = losses(roster, sequences, per_request(roster, router, 3))
    assert some != losses(roster, sequences, router)


def test_the_answer_never_influences_the_choice_of_a_request(
    roster: Roster, make_sequences: Sequences, artefact: RouterArtefact
) -> None:
    (sequence,) = make_sequences(1)
    other = tuple((token + 11) % 24 for token in sequence.token_ids[sequence.answer_start :])
    changed = replace(sequence, token_ids=sequence.token_ids[: sequence.answer_start] + other)
    maker = per_request(roster, routed_at(roster, artefact))
    pinned = next(
        name
        for name in roster.names
        if losses(roster, [sequence], maker)
        == pytest.approx(losses(roster, [sequence], fixed_baselines(roster)[f"only_{name}"]), abs=1e-5)
    )
    assert losses(roster, [changed], maker) == pytest.approx(
        losses(roster, [changed], fixed_baselines(roster)[f"only_{pinned}"]), abs=1e-5
    )


def test_segments_of_a_composite_run_under_their_own_adapters(roster: Roster, make_sequences: Sequences) -> None:
    sequence = replace(make_sequences(1)[0], label_changes=((4, 2),))
    found = losses(roster, [sequence], fixed_baselines(roster)["own_adapter"])
    assert list(found) == ["beta"]
    with torch.inference_mode():
        pinned = losses(roster, [sequence], planned(roster, [roster.own_adapter_plans()[2]] * 4))
    assert found["beta"] != pytest.approx(pinned["beta"], abs=1e-6)


def test_the_opening_is_what_the_template_prints_before_the_first_words() -> None:
    assert opening_length(ByteRenderer()) == 1
    assert ByteRenderer().render_chat([{"role": "user", "content": "A"}])[0] == START
    assert NEWLINE != START
