"""Where rows come from: states of the server's own routed forward, and weights that stand in the bank."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from server.adapters.calibration import NEVER, Calibrator
from server.adapters.examples import encode_examples
from server.adapters.weights import load_adapter
from server.errors import RouterArtefactError
from server.model.attention import attach_paged_attention
from server.routing.attach import RoutedModel, attach_routing
from server.routing.bank import LoraWeights
from server.routing.prototypes import norm_factor
from tests.adapters.calibrating import OWN, ByteRenderer, ordinary_prompt_gate, router_with_statistics
from tests.adapters.folders import BASE
from tests.adapters.harness import artefact_for, run_inline

EXAMPLES = encode_examples(OWN, ByteRenderer())
DIGESTS = {"first": 1, "second": 2}


@pytest.fixture
def make_routed(
    tiny_llama: "Callable[..., LlamaForCausalLM]", save_adapter: Callable[..., Path], tmp_path: Path
) -> Callable[..., RoutedModel]:
    """Three adapters in slots 1 to 3, the last one on q_proj, v_proj and o_proj of the first two layers only."""

    def build(*, is_paged: bool = False) -> RoutedModel:
        model = tiny_llama()
        routed = attach_routing(model, num_slots=5)
        if is_paged:
            attach_paged_attention(model)
        options: dict[str, Any] = {"projections": routed.projections, "base_model_name": BASE}
        for slot in (1, 2, 3):
            targets = ["q_proj", "v_proj", "o_proj"] if slot == 3 else ["q_proj", "v_proj"]
            fields = {"layers_to_transform": [0, 1]} if slot == 3 else {}
            folder = tmp_path / f"{slot}"
            if not folder.exists():
                save_adapter(folder, tiny_llama(), slot + 1, targets, seed=slot, **fields)
            weights = load_adapter(folder, f"{slot}", **options).weights
            routed.bank.publish(routed.bank.with_adapter(slot, weights))
        return routed

    return build


def known(routed: RoutedModel) -> Any:
    return router_with_statistics(routed, [("a", "first"), ("b", "second")])


def test_the_servers_own_attention_gives_the_same_row(make_routed: Callable[..., RoutedModel]) -> None:
    """float32; the two attention paths may round differently."""
    rows = []
    for is_paged in (False, True):
        routed = make_routed(is_paged=is_paged)
        calibration = Calibrator(routed, run_inline).calibrate(3, EXAMPLES, known(routed), DIGESTS)
        rows.append(calibration.row)
        assert not routed.routers.generations, "nothing of a calibration is published"
        assert routed.context.batch is None
    for key, column in rows[0].columns.items():
        torch.testing.assert_close(rows[1].columns[key].row, column.row, rtol=1e-3, atol=1e-3)


def test_another_newcomer_in_the_bank_has_no_influence(make_routed: Callable[..., RoutedModel]) -> None:
    routed = make_routed()
    artefact = known(routed)
    before = Calibrator(routed, run_inline).calibrate(3, EXAMPLES, artefact, DIGESTS)
    routed.bank.publish(routed.bank.without_slots([2]))
    alone = Calibrator(routed, run_inline).calibrate(3, EXAMPLES, artefact, {"first": 1})
    assert alone.row.digest != before.row.digest, "a trained adapter does take part"
    copy = {
        name: LoraWeights(bank.a[bank.owner == 1], bank.b[:, bank.owner == 1])
        for name, bank in routed.bank.snapshot.projections.items()
        if (bank.owner == 1).any()
    }
    routed.bank.publish(routed.bank.with_adapter(4, copy))
    beside = Calibrator(routed, run_inline).calibrate(3, EXAMPLES, artefact, {"first": 1})
    for key, column in alone.row.columns.items():
        torch.testing.assert_close(beside.row.columns[key].row, column.row, rtol=1e-4, atol=1e-4)


def test_without_examples_only_projections_that_read_the_gates_input_count(
    make_routed: Callable[..., RoutedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """o_proj is as wide as q_proj but reads the attention's output; a layer without weights is never won."""
    seen: list[int] = []

    def spy(weights: Any) -> torch.Tensor:
        seen.append(len(weights))
        return norm_factor(weights)

    monkeypatch.setattr("server.routing.prototypes.norm_factor", spy)
    routed = make_routed()
    calibration = Calibrator(routed, run_inline).calibrate(3, (), known(routed), DIGESTS)
    assert seen == [2, 2]
    assert calibration.report.own_win_rate is None
    assert calibration.row.columns["layer.2"].bias == NEVER


def test_a_prompt_gate_gets_a_column_and_the_gate_row_stays(make_routed: Callable[..., RoutedModel]) -> None:
    routed = make_routed()
    plain = known(routed)
    gated = replace(plain, prompt_gate=ordinary_prompt_gate())
    before, after = (Calibrator(routed, run_inline).calibrate(3, EXAMPLES, it, DIGESTS) for it in (plain, gated))
    assert before.prompt is None
    assert before.row.prompt_column is None
    assert after.prompt is not None
    assert after.prompt.facts()["state"] == "passed"
    assert after.row.prompt_column is not None
    assert after.row.prompt_column[ord("x")] > 1 > after.row.prompt_column[ord("a")]
    for key, column in before.row.columns.items():
        assert torch.equal(after.row.columns[key].row, column.row)
    assert after.report == before.report


def test_without_examples_a_prompt_gate_cannot_place_an_adapter(make_routed: Callable[..., RoutedModel]) -> None:
    routed = make_routed()
    gated = replace(known(routed), prompt_gate=ordinary_prompt_gate())
    calibration = Calibrator(routed, run_inline).calibrate(3, (), gated, DIGESTS)
    assert calibration.row.prompt_column is None
    assert calibration.prompt is not None
    assert str(calibration.prompt.facts()["reason"]).startswith("0 of its examples have a question")
    assert calibration.problems[-1] == calibration.prompt.facts()["reason"]


def test_a_prompt_gate_that_is_not_obeyed_judges_nobody(make_routed: Callable[..., RoutedModel]) -> None:
    routed = make_routed()
    gated = replace(known(routed), prompt_gate=replace(ordinary_prompt_gate(), statistics=None))
    obeyed, ignored = (
        Calibrator(routed, run_inline, reads_prompts=reads).calibrate(3, EXAMPLES, gated, DIGESTS)
        for reads in (True, False)
    )
    assert "no statistics of questions" in obeyed.problems[-1]
    assert (ignored.prompt, ignored.problems) == (None, ())


def test_a_router_without_statistics_is_refused(make_routed: Callable[..., RoutedModel]) -> None:
    routed = make_routed()
    with pytest.raises(RouterArtefactError, match="background"):
        Calibrator(routed, run_inline).calibrate(
            3, EXAMPLES, artefact_for(routed, [("a", "first"), ("b", "second")]), DIGESTS
        )
