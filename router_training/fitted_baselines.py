"""Baselines that look at a few training chats, each made on demand with the facts that decide it. Measures nothing."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from router_training.baselines import CALIBRATION_TOKENS, Candidate, scored, weight_baselines
from router_training.calibration import Calibration
from router_training.evaluation import BatchMaker
from router_training.linear_scores import LDA_SHRINKAGE, PrototypeScorer, discriminant, mean_activation, ridge
from router_training.phatgoose import GateSettings, stacked, train_vectors
from router_training.progress import Progress
from router_training.roster import FIRST_SLOT, Roster
from router_training.router_inputs import CachedInputs, cache_inputs
from router_training.scores import LayerWeightsBatch, Scorer
from router_training.settings import TrainingConfig
from router_training.static_weights import HubSettings, SoupSettings, learn_layer_weights, search_weights
from server.routing.router import Granularity

TOP_K = 2
"""Adapters per token of every fitted router: the published k of Arrow's examples and of PHATGOOSE."""

TOKENS_PER_PART = 24
"""Prompt and answer tokens of a calibration chat whose router inputs are cached, evenly spread."""


class Fit(Protocol):
    """`fit(name, facts, compute)`: the result of a long fit, JSON values only, from a cache if it has been made."""

    def __call__(self, name: str, facts: Mapping[str, Any], compute: Callable[[], Any]) -> Any: ...


def score_candidates(roster: Roster, calibration: Calibration) -> dict[str, Candidate]:
    """The routers made of adapter weights. SEQR's norm is standardised on the calibration chats under the base."""
    makers = lru_cache(maxsize=1)(lambda: weight_baselines(roster, calibration.sequences))

    def candidate(name: str) -> Candidate:
        facts = {"calibration": calibration.digest, "tokens": CALIBRATION_TOKENS} if name == "seqr_norm" else {}
        return Candidate(lambda: makers()[name], facts)

    return {name: candidate(name) for name in ("arrow", "spectr", "seqr_norm", "lag")}


def linear_candidates(roster: Roster, calibration: Calibration, granularity: Granularity) -> dict[str, Candidate]:
    """Mean activation, ridge regression and linear discriminant analysis at the gates of the router under test.

    Their inputs are hidden states under the uniform mixture. Under its own adapter a chat carries that adapter's mark,
    which a router at work never sees: rows fitted on such states fail when routed (see `warm_start`).
    """

    @lru_cache(maxsize=1)
    def cached() -> CachedInputs:
        with Progress("calibration", total=len(calibration.sequences), unit="chat") as progress:
            return cache_inputs(
                roster.routed,
                calibration.sequences,
                roster.uniform_plans(),
                granularity,
                max_prompt_tokens=TOKENS_PER_PART,
                max_answer_tokens=TOKENS_PER_PART,
                on_batch=progress.advance,
            )

    def candidate(fit: Callable[[CachedInputs, int, Granularity], Scorer], **settings: Any) -> Candidate:
        def make() -> BatchMaker:
            return scored(roster, fit(cached(), len(roster.adapters), granularity), TOP_K, granularity=granularity)

        facts = {"calibration": calibration.digest, "granularity": granularity, "tokens": TOKENS_PER_PART}
        return Candidate(make, {**facts, "top_k": TOP_K, **settings})

    return {
        "mean_activation": candidate(mean_activation),
        "ridge": candidate(ridge, penalty=TrainingConfig().warm_start_penalty),
        "lda": candidate(discriminant, shrinkage=LDA_SHRINKAGE),
    }


def static_candidates(
    roster: Roster,
    calibration: Calibration,
    fit: Fit,
    soup: SoupSettings = SoupSettings(),  # noqa: B008  frozen
    hub: HubSettings = HubSettings(),  # noqa: B008  frozen
) -> dict[str, Candidate]:
    """LoRA Soups and LoRAHub: see `static_weights`."""

    def learn() -> list[list[float]]:
        with Progress("LoRA Soups", total=soup.steps, unit="step") as progress:
            weights = learn_layer_weights(
                roster, calibration.sequences, soup, on_step=lambda loss: progress.advance(1, f"loss {loss:.3f}")
            )
        rows: list[list[float]] = weights.tolist()
        return rows

    def search() -> list[list[float]]:
        chats = calibration.beginning(hub.chats_per_task)
        with Progress("LoRAHub", total=hub.evaluations, unit="evaluation") as progress:
            weights = search_weights(
                roster, chats, hub, on_evaluation=lambda loss: progress.advance(1, f"loss {loss:.3f}")
            )
        return [weights] * roster.routed.num_layers

    def candidate(name: str, settings: SoupSettings | HubSettings, compute: Callable[[], Any]) -> Candidate:
        facts = {"calibration": calibration.digest, "settings": asdict(settings)}
        return Candidate(lambda: layer_weights(roster, torch.tensor(fit(name, facts, compute))), facts)

    return {"lora_soups": candidate("lora_soups", soup, learn), "lorahub": candidate("lorahub", hub, search)}


def layer_weights(roster: Roster, weights: Tensor) -> BatchMaker:
    """Fixed weights (layers, A) for every token."""
    return lambda _: LayerWeightsBatch(roster.routed.bank.snapshot, weights)


def gate_candidates(
    roster: Roster,
    calibration: Calibration,
    fit: Fit,
    settings: GateSettings = GateSettings(),  # noqa: B008  frozen
) -> dict[str, Candidate]:
    """PHATGOOSE: see `phatgoose`. Each adapter's vectors are a fit of their own: a cut run loses one."""

    def train(index: int) -> dict[str, list[float]]:
        chats = calibration.of_label(index + FIRST_SLOT)
        with Progress(f"PHATGOOSE {roster.names[index]}", total=settings.steps, unit="step") as progress:
            vectors = train_vectors(
                roster, index, chats, settings, on_step=lambda loss: progress.advance(1, f"loss {loss:.3f}")
            )
        return {name: vector.tolist() for name, vector in vectors.items()}

    facts = {"calibration": calibration.digest, "settings": asdict(settings)}

    @lru_cache(maxsize=1)
    def prototypes() -> dict[str, Tensor]:
        fitted = [
            fit("phatgoose", {**facts, "adapter": index}, partial(train, index))
            for index in range(len(roster.adapters))
        ]
        return stacked(roster, [{name: torch.tensor(v) for name, v in vectors.items()} for vectors in fitted])

    return {
        "phatgoose": Candidate(
            lambda: scored(roster, PrototypeScorer(prototypes(), "projection"), TOP_K), {**facts, "top_k": TOP_K}
        )
    }
