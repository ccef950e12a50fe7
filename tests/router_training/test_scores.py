"""Weight-only routers against full decompositions, and Arrow against PEFT's own implementation."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import ArrowConfig, create_arrow_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from router_training.encoding import TokenSequence, collate
from router_training.evaluation import gate_batch
from router_training.forward import answer_losses, last_hidden_states
from router_training.roster import Roster
from router_training.scores import LayerWeightsBatch, ScoredBatch, WeightScorer, directions
from server.adapters.weights import load_adapter
from server.routing.attach import attach_routing
from server.routing.bank import LoraWeights, ProjectionInfo

BASE = "tiny/llama"
WIDTH = 24
INFO = ProjectionInfo("proj", WIDTH, 20, 0, False)
Sequences = Callable[..., list[TokenSequence]]


def random_weights(rank: int, seed: int) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)
    return LoraWeights(
        torch.randn(rank, WIDTH, generator=generator), torch.randn(20, rank, generator=generator) * (seed + 1)
    )


@pytest.fixture
def weights() -> list[LoraWeights]:
    return [random_weights(rank, seed) for seed, rank in enumerate((2, 4, 7))]


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(11, WIDTH, generator=torch.Generator().manual_seed(9))


def scorer(weights: list[LoraWeights], kind: Any, **options: Any) -> WeightScorer:
    return WeightScorer([{"proj": lora} for lora in weights], kind, **options)


def test_directions_are_the_singular_vectors_of_the_whole_update(weights: list[LoraWeights]) -> None:
    for lora in weights:
        found = directions(lora)
        _, strength, right = torch.linalg.svd(lora.B @ lora.A, full_matrices=False)
        rank = lora.A.shape[0]
        torch.testing.assert_close(found.strength, strength[:rank], rtol=1e-4, atol=1e-4)
        cosines = (found.right * right[:rank]).sum(dim=1).abs()
        torch.testing.assert_close(cosines, torch.ones(rank), rtol=0, atol=1e-4)


def test_norm_is_the_length_of_the_update_itself(weights: list[LoraWeights], tokens: Tensor) -> None:
    found = scorer(weights, "norm").scores(INFO, tokens)
    expected = torch.stack([(tokens @ lora.A.T @ lora.B.T).norm(dim=1) for lora in weights], dim=1)
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_spectr_is_the_length_of_the_projection_onto_the_input_space(
    weights: list[LoraWeights], tokens: Tensor
) -> None:
    found = scorer(weights, "spectr").scores(INFO, tokens)
    spans = [torch.linalg.pinv(lora.A) @ lora.A for lora in weights]
    assert found is not None
    torch.testing.assert_close(
        found, torch.stack([(tokens @ span).norm(dim=1) for span in spans], dim=1), rtol=1e-4, atol=1e-4
    )


def test_lag_ranks_arrows_shortlist_by_spectr(weights: list[LoraWeights], tokens: Tensor) -> None:
    found = scorer(weights, "lag", shortlist=2).scores(INFO, tokens)
    arrow, spectr = scorer(weights, "arrow").scores(INFO, tokens), scorer(weights, "spectr").scores(INFO, tokens)
    assert found is not None
    assert arrow is not None
    assert spectr is not None
    assert bool((found.argmin(dim=1) == arrow.argmin(dim=1)).all())
    kept = found > -torch.inf
    assert kept.sum(dim=1).tolist() == [2] * len(tokens)
    torch.testing.assert_close(found[kept], spectr[kept])


def test_calibrated_norms_do_not_favour_the_loudest_adapter(weights: list[LoraWeights], tokens: Tensor) -> None:
    plain, calibrated = scorer(weights, "norm"), scorer(weights, "norm")
    calibrated.calibrate({"proj": torch.randn(4000, WIDTH, generator=torch.Generator().manual_seed(1))})
    loud, fair = plain.scores(INFO, tokens), calibrated.scores(INFO, tokens)
    assert loud is not None
    assert fair is not None
    assert set(loud.argmax(dim=1).tolist()) == {2}
    assert len(set(fair.argmax(dim=1).tolist())) > 1


def test_an_adapter_without_the_projection_is_never_chosen(weights: list[LoraWeights], tokens: Tensor) -> None:
    adapters = [{"proj": weights[0]}, {"other": weights[1]}, {"proj": weights[2]}]
    partial = WeightScorer(adapters, "arrow")
    bank: Any = None
    batch = ScoredBatch(bank, partial, 5, top_k=3, temperature=1.0)
    gates = batch.gates(INFO, tokens)
    assert gates is not None
    assert gates.shape == (len(tokens), 5)
    assert not gates[:, [0, 2, 4]].any()
    torch.testing.assert_close(gates.sum(dim=1), torch.ones(len(tokens)))
    assert batch.gates(INFO._replace(name="elsewhere"), tokens) is None


def test_a_layers_first_projection_decides_for_all_of_it_if_gates_are_per_layer(
    weights: list[LoraWeights], tokens: Tensor
) -> None:
    second = INFO._replace(name="second")
    adapters = [{"proj": lora, "second": lora} for lora in weights]
    bank: Any = None
    for granularity, is_equal in (("layer", True), ("projection", False)):
        batch = ScoredBatch(
            bank,
            WeightScorer(adapters, "spectr"),
            4,
            top_k=2,
            temperature=1.0,
            granularity=granularity,  # type: ignore[arg-type]
        )
        first, other = batch.gates(INFO, tokens), batch.gates(second, tokens.flip(0))
        assert first is not None
        assert other is not None
        assert torch.equal(first, other) == is_equal
        later = batch.gates(second._replace(layer=1), tokens.flip(0))
        assert later is not None
        assert not torch.equal(first, later)


def test_arrow_gives_the_logits_of_pefts_own_arrow_model(
    tiny_llama: Callable[..., Any], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """PEFT runs 15 power iterations from a random start, so its vectors are near ours where the first singular value
    stands out. These adapters have one dominant direction each; the tolerance is what is left of the rest."""
    model = tiny_llama()
    folders = [make_adapter(tmp_path / f"a{seed}", model, 4, ["q_proj", "v_proj"], seed=seed) for seed in range(3)]
    for folder in folders:
        _make_dominant(folder)
    token_ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(2))
    config = ArrowConfig(top_k=2, router_temperature=0.7, rng_seed=1)
    peft_model = create_arrow_model(copy.deepcopy(model), [str(folder) for folder in folders], config)
    with torch.no_grad():
        expected = peft_model(input_ids=token_ids).logits
        base = model(input_ids=token_ids).logits
    routed = attach_routing(model, num_slots=4)
    adapters = []
    for slot, folder in enumerate(folders, start=1):
        adapter = load_adapter(folder, f"a{slot}", projections=routed.projections, base_model_name=BASE)
        routed.bank.publish(routed.bank.with_adapter(slot, adapter.weights))
        adapters.append(adapter.weights)
    batch = ScoredBatch(routed.bank.snapshot, WeightScorer(adapters, "arrow"), 4, top_k=2, temperature=0.7)
    with torch.no_grad(), routed.context.running(batch):
        found = routed.model(input_ids=token_ids).logits
    assert float((expected - base).abs().max()) > 0.05
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def _make_dominant(folder: Path) -> None:
    """Ten times weaker rank rows behind the first one, and a base model by name, which ours insists on."""
    tensors = load_file(folder / "adapter_model.safetensors")
    for value in tensors.values():
        (value if value.shape[0] < value.shape[1] else value.T)[1:] *= 0.1
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = BASE
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def test_equal_layer_weights_are_the_uniform_policy(roster: Roster, make_sequences: Sequences) -> None:
    batch = collate(make_sequences(3))
    uniform = gate_batch(roster.routed, batch, roster.uniform_plans())
    soup = LayerWeightsBatch(roster.routed.bank.snapshot, torch.full((3, 3), 1 / 3))
    with torch.no_grad():
        torch.testing.assert_close(
            answer_losses(roster.routed, batch, soup), answer_losses(roster.routed, batch, uniform)
        )


def test_layer_weights_act_in_their_own_layer(roster: Roster, make_sequences: Sequences) -> None:
    batch = collate(make_sequences(3))
    weights = torch.zeros(3, 3)
    weights[2, 0] = 1.0  # only the last layer
    with torch.no_grad():
        base = last_hidden_states(roster.routed, batch, None)
        late = last_hidden_states(roster.routed, batch, LayerWeightsBatch(roster.routed.bank.snapshot, weights))
        whole = last_hidden_states(
            roster.routed, batch, LayerWeightsBatch(roster.routed.bank.snapshot, weights[2].expand(3, 3))
        )
    assert not torch.equal(base, late)
    assert float((late - base).abs().max()) < float((whole - base).abs().max())
