"""The prompt gate's chain as a loss: held to the server's own chain, one fit as many, tokens that say nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from router_training.chain_loss import Question, SwitchTable, log_posterior, question_loss
from server.routing.chat_frame import ChatFrame
from server.routing.prompt_gate import PromptGate, PromptGateSettings
from server.routing.task_chain import smoothed

VOCABULARY, WIDTH, CHOICES = 12, 5, 3
FRAME = ChatFrame((200, 201), 202, line_ends=((7, 1), (8, 2)))
GENERATOR = torch.Generator().manual_seed(0)
FEATURES = torch.randn(VOCABULARY, WIDTH, generator=GENERATOR)
ROWS = torch.randn(2, CHOICES, WIDTH, generator=GENERATOR)
SWITCHES = SwitchTable(FRAME, PromptGateSettings(), VOCABULARY)


def drawn(*lengths: int) -> list[Question]:
    return [
        (torch.randint(VOCABULARY, (n,), generator=GENERATOR), torch.randint(CHOICES, (n,), generator=GENERATOR))
        for n in lengths
    ]


BATCHES = [drawn(9, 1, 4), drawn(2, 30, 3)]


def plain_loss(rows: torch.Tensor, batch: list[Question]) -> float:
    """Of one fit, by the chain that serves."""
    gate = PromptGate(FEATURES @ rows.T, FRAME, replace(PromptGateSettings(), base_lead=0))
    losses = []
    for tokens, own in batch:
        found = gate.posterior(tokens.tolist(), list(gate.scores.T)).tokens
        losses.append(-np.log(found[np.arange(len(own)), own.numpy()]).mean())
    return float(np.mean(losses))


def test_both_forms_of_the_chain_agree_whatever_the_padding() -> None:
    emissions = torch.randn(3, 9, 4, generator=torch.Generator().manual_seed(0)) * 2
    lengths = [9, 1, 5]
    for row, length in enumerate(lengths):
        emissions[row, length:] = 0
    batched = log_posterior(emissions, torch.full(emissions.shape[:2], 0.01)).exp()
    for row, length in enumerate(lengths):
        alone = smoothed(emissions[row, :length].double().numpy(), np.array(0.01 / 3)).tokens
        np.testing.assert_allclose(batched[row, :length].numpy(), alone, atol=1e-5)


def test_the_trainers_chain_changes_where_the_servers_does() -> None:
    """A second task begins a line more often than it stands elsewhere."""
    gate = PromptGate(torch.zeros(10, 3), FRAME, PromptGateSettings(switch=0.01, switch_at_lines=0.3))
    questions = [[1, 2, 7, 3, 8, 8, 4], [7, 1, 1, 1, 1, 1, 7]]
    found = SwitchTable(FRAME, gate.settings, 9).of(torch.tensor(questions))
    for row, question in enumerate(questions):
        begins = gate.begins_line(question)
        np.testing.assert_allclose(found[row].numpy(), np.where(begins, 0.3, 0.01), rtol=1e-6)
    assert gate.begins_line(questions[0]).tolist() == [False, False, False, True, False, False, True]
    emissions = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(1))
    batched = log_posterior(emissions, found).exp()
    for row in range(2):
        alone = smoothed(emissions[row].double().numpy(), found[row, :, None].double().numpy() / 2).tokens
        np.testing.assert_allclose(batched[row].numpy(), alone, atol=1e-5)


def test_the_chain_stays_finite_where_evidence_is_overwhelming() -> None:
    emissions = torch.zeros(1, 40, 3)
    emissions[0, :20, 0], emissions[0, 20:, 1] = 300.0, 300.0
    emissions.requires_grad_()
    posterior = log_posterior(emissions, torch.full((1, 40), 1e-3))
    posterior.sum().backward()  # type: ignore[no-untyped-call]
    assert posterior.isfinite().all()
    assert emissions.grad is not None
    assert emissions.grad.isfinite().all()
    assert posterior[0].argmax(dim=1).tolist() == [0] * 20 + [1] * 20


def test_one_choice_is_certain() -> None:
    assert torch.equal(log_posterior(torch.randn(2, 5, 1), torch.full((2, 5), 0.05)), torch.zeros(2, 5, 1))


def test_the_loss_is_that_of_each_fit_by_itself() -> None:
    rows = ROWS.clone().requires_grad_()
    loss = question_loss(FEATURES, rows, BATCHES, SWITCHES)
    (gradient,) = torch.autograd.grad(loss, rows)
    assert loss.item() == pytest.approx(sum(map(plain_loss, ROWS, BATCHES)), rel=1e-5)
    for fit, batch in enumerate(BATCHES):
        alone = ROWS[fit : fit + 1].clone().requires_grad_()
        (own,) = torch.autograd.grad(question_loss(FEATURES, alone, [batch], SWITCHES), alone)
        torch.testing.assert_close(gradient[fit : fit + 1], own)


def test_tokens_that_drop_out_say_nothing_and_are_drawn_anew() -> None:
    def loss(dropout: float, seed: int = 0) -> float:
        generator = torch.Generator().manual_seed(seed)
        return question_loss(FEATURES, ROWS, BATCHES, SWITCHES, dropout=dropout, generator=generator).item()

    assert loss(0.0) == loss(0.0, seed=1)
    assert loss(0.4) == loss(0.4)
    assert len({loss(0.0), loss(0.4), loss(0.4, seed=1)}) == 3
    nothing = question_loss(FEATURES, torch.zeros_like(ROWS), BATCHES, SWITCHES).item()
    assert loss(1.0) == pytest.approx(nothing)
    assert nothing == pytest.approx(2 * np.log(CHOICES), rel=1e-5)
