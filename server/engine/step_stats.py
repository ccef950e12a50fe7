"""What one engine step counted and measured, for metrics."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RoutingStats:
    """Routing totals of one step, over real (unpadded) tokens that no earlier step has counted."""

    gate_mass: tuple[tuple[int, float], ...] = ()
    """(slot, sum of gate weight over tokens, averaged over routed layers)."""
    entropies: tuple[float, ...] = ()
    """Per routed token, entropy in nats of its gate share averaged over layers."""
    routed_mass: tuple[tuple[int, float], ...] = ()
    """As `gate_mass`, over the tokens for which the router had a choice."""


@dataclass(frozen=True)
class StepStats:
    """Counts and times of one engine step, for metrics."""

    step_s: float
    num_prompt_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int
    """Prompt tokens that newly admitted sequences took from the prefix cache."""
    num_running: int
    num_waiting: int
    num_preempted: int
    kv_usage_ratio: float
    num_drafted_tokens: int = 0
    """Guesses that were computed."""
    num_accepted_tokens: int = 0
    """Those of them that were right."""
    routing: RoutingStats = RoutingStats()
