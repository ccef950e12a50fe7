"""The routing trace of one choice: which adapters its tokens used, by name. The base model appears as `base`.

A stream carries a chunk's tokens in that chunk and the summary in the choice's last one; joined, they are what a whole
answer has.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from server.adapters.leases import AdapterLease
from server.api.choice import ChoiceDelta
from server.api.generation import Generation
from server.api.logprobs import token_label
from server.engine.sequence import TraceLevel
from server.routing.plan_course import PlanSpan
from server.routing.policy import BASE_ALIAS, BASE_SLOT, Policy

if TYPE_CHECKING:
    from server.model.tokenizer import ChatTokenizer

DIGITS = 6
"""Decimals of a weight in the answer."""


class RoutingTrace:
    """Accumulates one choice's shares and writes its `routing` objects."""

    def __init__(
        self, level: TraceLevel, lease: AdapterLease, spans: Sequence[PlanSpan], tokenizer: "ChatTokenizer"
    ) -> None:
        self._level = level
        self._plan = lease.plan
        self._spans = spans
        self._names = {**lease.slot_names, BASE_SLOT: BASE_ALIAS}
        self._tokenizer = tokenizer
        self._mass: dict[int, float] = {}
        self._num_tokens = 0

    def describe(self, delta: ChoiceDelta) -> dict[str, Any] | None:
        """`routing` of the chunk or answer that carries `delta`; None if there is nothing to say yet."""
        for routing in delta.routing:
            self._num_tokens += 1
            for slot, weight in routing.share:
                self._mass[slot] = self._mass.get(slot, 0.0) + weight
        trace: dict[str, Any] = self._summary() if delta.finish_reason is not None else {}
        if self._level is not TraceLevel.SUMMARY and (delta.routing or trace):
            trace["tokens"] = self._tokens(delta)
        return trace or None

    def _summary(self) -> dict[str, Any]:
        means = [(slot, mass / self._num_tokens) for slot, mass in self._mass.items()]
        summary: dict[str, Any] = {
            "policy": str(self._plan.policy),
            "router_generation": self._plan.router_generation,
            "adapters": self._by_name(sorted(means, key=lambda pair: (-pair[1], pair[0]))),
        }
        return {**summary, "prompt": self._prompt()} if self._spans else summary

    def _prompt(self) -> list[dict[str, Any]]:
        """Stretches of the prompt's beginning in order, and whose they are; None where the router decides, and what it
        leaves out there. Where the prompt gate is not sure, the likeliest adapter and the weights of all that act."""
        stretches, start = [], 0
        for stop, plan in self._spans:
            weights = plan.weights or ((BASE_SLOT, 1.0),)
            likeliest, _ = max(weights, key=lambda pair: pair[1])
            stretch: dict[str, Any] = {"tokens": stop - start}
            stretch["adapter"] = None if plan.policy is Policy.ROUTED else self._names[likeliest]
            if plan.policy is Policy.ROUTED and (left_out := set(self._plan.allowed_slots).difference(plan.slots)):
                stretch["left_out"] = sorted(self._names[slot] for slot in left_out)
            if len(weights) > 1:
                stretch["weights"] = self._by_name(weights)
            stretches.append(stretch)
            start = stop
        return stretches

    def _tokens(self, delta: ChoiceDelta) -> list[dict[str, Any]]:
        tokens = []
        for token_id, routing in zip(delta.token_ids, delta.routing, strict=True):
            token = {
                "token_id": token_id,
                "token": token_label(self._tokenizer, token_id),
                "adapters": self._by_name(routing.share),
            }
            if self._level is TraceLevel.LAYERS:
                token["layers"] = [self._by_name(layer) for layer in routing.layers or ()]
            tokens.append(token)
        return tokens

    def _by_name(self, weights: Sequence[tuple[int, float]]) -> dict[str, float]:
        return {self._names[slot]: round(weight, DIGITS) for slot, weight in weights}


def new_traces(generation: Generation) -> list[RoutingTrace]:
    """One per choice; none if the request asks for no trace."""
    options = generation.body.routing
    if options is None:
        return []
    level, tokenizer = TraceLevel(options.trace), generation.services.tokenizer
    return [
        RoutingTrace(level, generation.lease_of(choice.index), generation.spans_of(choice.index), tokenizer)
        for choice in generation.choices
    ]
