"""Statistics for gate rows without retraining: of the right states, for the right adapters, added without a change."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from router_training.artefact import build_artefact
from router_training.background import with_background, with_questions
from router_training.encoding import TokenSequence
from router_training.gates import RouterParameters
from router_training.leave_one_out import without_row
from router_training.prompt_fit import normalised
from router_training.roster import FIRST_SLOT, Roster
from router_training.router_inputs import cache_inputs
from router_training.settings import TrainingConfig
from server.errors import RouterArtefactError
from server.routing.background import from_tensors
from server.routing.chat_frame import ChatFrame
from server.routing.prompt_gate import PromptGate
from server.routing.router import RouterArtefact
from server.routing.token_features import token_features

Sequences = Callable[..., list[TokenSequence]]


@pytest.fixture
def artefact(roster: Roster) -> RouterArtefact:
    config = TrainingConfig()
    parameters = RouterParameters.zeros(
        roster.gated_projections(), config.granularity, len(roster.adapters), hidden_size=roster.routed.hidden_size
    )
    generator = torch.Generator().manual_seed(0)
    rows = {key: torch.randn(row.shape, generator=generator) for key, row in parameters.detached().items()}
    return build_artefact(rows, roster, config)


def test_statistics_are_of_routed_states_with_their_domains(
    roster: Roster, artefact: RouterArtefact, make_sequences: Sequences
) -> None:
    plans = roster.routed_plans(artefact)
    finished = with_background(artefact, roster, make_sequences(9), plans)
    cached = cache_inputs(roster.routed, make_sequences(9), plans, "layer", max_prompt_tokens=24, max_answer_tokens=24)
    background = from_tensors(finished.background, finished.rows)
    for key, gate in background.gates.items():
        torch.testing.assert_close(gate.mean, cached.inputs[key].mean(dim=0))
        assert torch.equal(finished.rows[key], artefact.rows[key])
    states = background.gates["layer.0"].states
    for state, domain in zip(states, background.domains, strict=True):
        nearest = int((cached.inputs["layer.0"] - state).square().sum(dim=1).argmin())
        assert int(cached.labels[nearest]) == int(domain) + FIRST_SLOT
    assert set(background.domains.tolist()) == {0, 1, 2}


def test_domains_follow_the_artefact_not_the_roster(
    roster: Roster, artefact: RouterArtefact, make_sequences: Sequences
) -> None:
    """Without the first adapter's row, the others' indices move up, and its tokens are nobody's domain."""
    smaller = without_row(artefact, 0)
    sequences = make_sequences(9)
    finished = with_background(smaller, roster, sequences, roster.base_plans())
    background = from_tensors(finished.background, finished.rows)
    cached = cache_inputs(
        roster.routed, sequences, roster.base_plans(), "layer", max_prompt_tokens=24, max_answer_tokens=24
    )
    states = background.gates["layer.0"].states
    for state, domain in zip(states, background.domains, strict=True):
        nearest = int((cached.inputs["layer.0"] - state).square().sum(dim=1).argmin())
        assert int(cached.labels[nearest]) == int(domain) + FIRST_SLOT + 1
    assert set(background.domains.tolist()) == {0, 1}
    for key, rows in smaller.rows.items():
        assert torch.equal(rows, artefact.rows[key][1:])


def test_questions_follow_the_artefact_and_leave_scores_alone(
    roster: Roster, artefact: RouterArtefact, make_sequences: Sequences
) -> None:
    frame = ChatFrame((200, 201), 202)
    scores = torch.randn(roster.loaded.vocab_size, 3).half()
    sequences = [replace(s, token_ids=(200, 201, *s.token_ids, 202)) for s in make_sequences(9)]
    smaller = without_row(replace(artefact, prompt_gate=PromptGate(scores, frame)), 0)
    found = with_questions(smaller, roster, sequences).prompt_gate
    assert found is not None
    assert torch.equal(found.scores, scores[:, 1:])
    assert found.statistics is not None
    expected = {(s.token_ids[2:-1], s.label - FIRST_SLOT - 1) for s in sequences if s.label != FIRST_SLOT}
    assert {(tuple(tokens), choice) for tokens, choice in found.statistics.questions} == expected
    model: Any = roster.loaded.model
    features = token_features(normalised(model.get_input_embeddings().weight), found.statistics.ordinary)
    assert found.statistics.features is not None
    assert torch.equal(found.statistics.features, features)


def test_chats_without_questions_are_refused_and_a_router_without_a_gate_stays(
    roster: Roster, artefact: RouterArtefact, make_sequences: Sequences
) -> None:
    assert with_questions(artefact, roster, make_sequences(3)) is artefact
    gate = PromptGate(torch.zeros(roster.loaded.vocab_size, 3).half(), ChatFrame((200, 201), 202))
    with pytest.raises(RouterArtefactError, match="no question"):
        with_questions(replace(artefact, prompt_gate=gate), roster, make_sequences(3))
