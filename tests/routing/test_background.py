"""Background statistics: what they hold, their way through an artefact, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.errors import RouterArtefactError
from server.routing.background import Background, from_tensors, summarise_gate, to_tensors
from server.routing.router import load_artefact, save_artefact
from tests.routing.test_router import make_artefact

ROWS = make_artefact().rows


def inputs(count: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 16, generator=generator) * torch.linspace(0.1, 3, 16) + 1


def statistics() -> Background:
    retained = torch.tensor([3, 50, 120])
    gates = {key: summarise_gate(inputs(), retained, rows, 0.7) for key, rows in ROWS.items()}
    return Background(gates, torch.tensor([0, 1, 2]))


def test_statistics_are_the_moments_of_inputs_and_scores() -> None:
    x = inputs().double()
    gate = statistics().gates["layer.0"]
    scores = 0.7 * torch.log(torch.exp(x @ ROWS["layer.0"].double().T / 0.7).sum(dim=1))
    joint = torch.cov(torch.cat([x, scores[:, None]], dim=1).T, correction=0)
    torch.testing.assert_close(gate.mean.double(), x.mean(dim=0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gate.covariance.double(), joint[:16, :16], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gate.score_covariance.double(), joint[:16, 16], rtol=1e-4, atol=1e-4)
    assert float(gate.score_mean) == pytest.approx(float(scores.mean()), rel=1e-5)
    assert torch.equal(gate.states, inputs()[[3, 50, 120]])


def test_statistics_survive_an_artefact_up_to_float16(tmp_path: Path) -> None:
    save_artefact(make_artefact(background=to_tensors(statistics())), tmp_path)
    loaded = load_artefact(tmp_path)
    found = from_tensors(loaded.background, loaded.rows)
    assert torch.equal(found.domains, torch.tensor([0, 1, 2]))
    for key, gate in statistics().gates.items():
        assert torch.equal(found.gates[key].states, gate.states.half().float())
        assert torch.equal(found.gates[key].score_covariance, gate.score_covariance)
        torch.testing.assert_close(found.gates[key].covariance, gate.covariance, rtol=5e-3, atol=5e-3)


def test_an_artefact_without_statistics_says_how_to_add_them() -> None:
    with pytest.raises(RouterArtefactError, match="lora-mixer-train background --router DIR --data DIR"):
        from_tensors({"mean/layer.0": torch.zeros(16), "var/layer.0": torch.zeros(16)}, ROWS)


def test_statistics_that_do_not_fit_the_rows_are_refused_by_name() -> None:
    tensors = to_tensors(statistics())
    with pytest.raises(RouterArtefactError, match=r"lack diagonal/layer\.1"):
        from_tensors({key: value for key, value in tensors.items() if key != "diagonal/layer.1"}, ROWS)
    with pytest.raises(RouterArtefactError, match=r"mean/layer\.1 are \(8,\)"):
        from_tensors({**tensors, "mean/layer.1": torch.zeros(8)}, ROWS)
    with pytest.raises(RouterArtefactError, match=r"mean/layer\.0 .* not finite"):
        from_tensors({**tensors, "mean/layer.0": torch.full((16,), torch.nan)}, ROWS)
    with pytest.raises(RouterArtefactError, match="no rows for"):
        from_tensors({**to_tensors(replace(statistics(), domains=torch.tensor([0, 1, 3])))}, ROWS)
