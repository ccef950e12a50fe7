"""Every way to choose adapters that the study compares, each as a maker of routing batches for the same forward pass.

Fixed mixtures, weight-only scores, a trained router at any k, and one choice per request. Trains and measures nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from router_training.encoding import ChatRenderer, TokenBatch, TokenSequence
from router_training.evaluation import BatchMaker, gate_batch
from router_training.forward import last_hidden_states
from router_training.roster import Roster
from router_training.router_inputs import cache_inputs
from router_training.scores import ScoredBatch, Scorer, WeightScore, WeightScorer
from server.routing.bank import BankSnapshot, ProjectionInfo
from server.routing.context import GateBatch, RoutingBatch
from server.routing.policy import BASE_SLOT, GatePlan
from server.routing.router import Granularity, RouterArtefact

CALIBRATION_TOKENS = 8
"""Prompt and answer tokens per calibration chat whose inputs standardise the norm score."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """One policy to compare. It is made only where a measurement of it is missing: some take minutes to fit."""

    make: Callable[[], BatchMaker]
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What decides its measurements beside base model, adapters and the chats that are measured."""


@dataclass(eq=False)
class FixedBatch:
    """Implements `RoutingBatch`: the same gates (T, E) at every projection."""

    bank: BankSnapshot
    fixed: Tensor

    def gates(self, info: ProjectionInfo, tokens: Tensor) -> Tensor:  # noqa: ARG002  the protocol's signature
        """See `RoutingBatch`."""
        return self.fixed


@dataclass(eq=False)
class SwitchedBatch:
    """Implements `RoutingBatch`: `first` where `chosen` (T,) is true, `second` elsewhere."""

    bank: BankSnapshot
    first: RoutingBatch
    second: RoutingBatch
    chosen: Tensor

    def gates(self, info: ProjectionInfo, tokens: Tensor) -> Tensor:
        """See `RoutingBatch`; a part without a gate here leaves its tokens on the base model."""
        first, second = self.first.gates(info, tokens), self.second.gates(info, tokens)
        present = first if first is not None else second
        assert present is not None
        zero = torch.zeros_like(present)
        return torch.where(self.chosen[:, None], zero if first is None else first, zero if second is None else second)


def ready(maker: BatchMaker) -> Candidate:
    """A policy that needs no making and depends on nothing else."""
    return Candidate(lambda: maker)


def fixed_baselines(roster: Roster) -> dict[str, BatchMaker]:
    """base, own adapter (the oracle; on composites per segment), uniform mix, and every single adapter."""
    own = roster.own_adapter_plans()
    plans: dict[str, list[GatePlan]] = {
        "base": roster.base_plans(),
        "own_adapter": own,
        "uniform": roster.uniform_plans(),
    }
    plans |= {f"only_{task}": [own[label]] * len(own) for label, task in enumerate(roster.tasks) if label}
    return {name: planned(roster, plan) for name, plan in plans.items()}


def weight_baselines(
    roster: Roster, calibration: Sequence[TokenSequence], *, top_k: int = 2, temperature: float = 1.0
) -> dict[str, BatchMaker]:
    """Arrow, SpectR, SEQR's standardised norm and LAG. Only the norm looks at data: `calibration`, under the base."""
    adapters = [adapter.weights for adapter in roster.adapters]
    kinds: dict[str, WeightScore] = {"arrow": "arrow", "spectr": "spectr", "seqr_norm": "norm", "lag": "lag"}
    scorers = {name: WeightScorer(adapters, kind) for name, kind in kinds.items()}
    cached = cache_inputs(
        roster.routed,
        calibration,
        roster.base_plans(),
        "projection",
        max_prompt_tokens=CALIBRATION_TOKENS,
        max_answer_tokens=CALIBRATION_TOKENS,
    )
    scorers["seqr_norm"].calibrate(cached.inputs)
    # LAG ends in one adapter per token and layer.
    return {
        name: scored(roster, scorer, 1 if name == "lag" else top_k, temperature) for name, scorer in scorers.items()
    }


def routed_at(roster: Roster, artefact: RouterArtefact, top_k: int | None = None) -> BatchMaker:
    """The trained router as the server runs it, or with another k."""
    changed = artefact if top_k is None else replace(artefact, top_k=top_k)
    return planned(roster, roster.routed_plans(changed))


def per_request(roster: Roster, router: BatchMaker, num_opening_tokens: int | None = None) -> BatchMaker:
    """One adapter per request: a first pass under `router` reads the prompt, the adapter with the most gate weight over
    its tokens takes the whole request in a second pass, or only the prompt's first `num_opening_tokens`."""

    def make(batch: TokenBatch) -> RoutingBatch:
        reading = router(batch)
        assert isinstance(reading, GateBatch), "the first pass needs a router"
        with torch.inference_mode():
            last_hidden_states(roster.routed, batch, reading)
        num_sequences, length = batch.token_ids.shape
        is_prompt = (batch.answer_positions.view(num_sequences, length).cumsum(dim=1) == 0).float()
        share = reading.share.view(num_sequences, length, -1)
        mass = (share * is_prompt[:, :, None]).sum(dim=1)  # (S, E)
        mass[:, BASE_SLOT] = -1.0  # an adapter is asked for
        fixed = torch.nn.functional.one_hot(mass.argmax(dim=1), mass.shape[1]).float()
        whole = FixedBatch(roster.routed.bank.snapshot, fixed.repeat_interleave(length, dim=0))
        if num_opening_tokens is None:
            return whole
        opening = (torch.arange(length) < num_opening_tokens).repeat(num_sequences)
        again = router(batch)
        assert again is not None
        return SwitchedBatch(whole.bank, whole, again, opening)

    return make


def opening_length(tokenizer: ChatRenderer) -> int:
    """Tokens that the chat template puts before the first user's words: the same in every request without a system
    message, so that nothing there tells the task."""
    first, second = (tokenizer.render_chat([{"role": "user", "content": text}]) for text in ("A", "7"))
    return next(
        (position for position, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), len(first)
    )


def planned(roster: Roster, plan_of_label: Sequence[GatePlan]) -> BatchMaker:
    """The server's own gates, each token under the plan of its label."""
    return lambda batch: gate_batch(roster.routed, batch, plan_of_label, collect_layers=True)


def scored(
    roster: Roster, scorer: Scorer, top_k: int, temperature: float = 1.0, *, granularity: Granularity = "projection"
) -> BatchMaker:
    """Top-k softmax gates of any scorer's scores."""

    def make(_: TokenBatch) -> RoutingBatch:
        routed = roster.routed
        return ScoredBatch(
            routed.bank.snapshot,
            scorer,
            routed.num_slots,
            top_k=top_k,
            temperature=temperature,
            granularity=granularity,
        )

    return make
