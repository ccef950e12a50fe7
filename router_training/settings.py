"""Every setting of a training run, with default and unit. Reads no environment and starts nothing."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from server.errors import ConfigError
from server.routing.policy import BASE_ALIAS
from server.routing.router import MAX_TEMPERATURE, MIN_TEMPERATURE, Granularity

WarmStart = Literal["none", "ridge", "softmax"]
BASE_NAME = BASE_ALIAS
"""The null expert among the names of adapters."""
GateMode = Literal["convex"]
"""What the artefact format knows; `docs/routing-study.md` has what other modes would be worth."""


class TrainingConfig(BaseModel):
    """One training run: base model and adapters frozen, only the router learns (the paper's plug-and-play regime).

    Dimensionless unless a unit is named. `examples/demo/README.md` has the command that trained the demo router.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    samples: Annotated[int, Field(ge=1)] = 2000
    """Chats in the balanced training mix, over all tasks together (the paper's 2k)."""
    max_length: Annotated[int, Field(ge=8)] = 256
    """Longest training sequence, in tokens."""
    too_long: Literal["refuse", "cut"] = "refuse"
    """Training chats longer than `max_length`: refused with file and line, or cut as `encoding.truncate` says."""
    composite_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the mix that joins two chats of different tasks into one conversation or one answer."""
    rephrase_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the mix whose questions are framed anew, so that the router cannot live on the phrasings of the data."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds the mix and the order of the batches; initial gate rows are zero or closed-form, never random."""
    granularity: Granularity = "layer"
    """`layer`: one gate per decoder layer; `projection`: one per projection, as the paper counts parameters."""
    top_k: Annotated[int, Field(ge=1)] = 2
    """Adapters kept per token when serving, and in the straight-through steps."""
    temperature: Annotated[float, Field(ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)] = 1.0
    """Divides gate logits, in training as in serving."""
    gate_mode: GateMode = "convex"
    """`convex`: the kept gates sum to 1."""
    null_expert: bool = False
    """Whether the base model is a choice of its own; its chats are in the data folder `base`."""
    routed_from_layer: Annotated[int, Field(ge=0)] = 0
    """First decoder layer with a gate; routed tokens stay on the base model below it."""

    prompt_gate: bool = False
    """Whether confident stretches of a prompt's beginning go to one adapter (docs/prompt-gate.md); the router is
    trained beside it."""
    prompt_gate_samples: Annotated[int, Field(ge=1)] = 12000
    """Most chats in the mix that the prompt gate is fitted on."""

    warm_start: WarmStart = "softmax"
    """Initial gate rows from adapter labels on cached router inputs: zero, ridge regression, or softmax regression."""
    warm_start_samples: Annotated[int, Field(ge=1)] = 640
    """Chats of the mix whose router inputs are cached for the warm start."""
    warm_start_rounds: Annotated[int, Field(ge=1)] = 2
    """Caching passes: the first under the uniform mixture, each later one under the router fitted so far."""
    warm_start_prompt_tokens: Annotated[int, Field(ge=0)] = 24
    """Most prompt tokens per chat in the cache, evenly spread; the last one is always in."""
    warm_start_answer_tokens: Annotated[int, Field(ge=1)] = 24
    """Most answer tokens per chat in the cache, evenly spread."""
    warm_start_prompt_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of a cached prompt token; a cached answer token weighs 1."""
    warm_start_penalty: Annotated[float, Field(gt=0)] = 3e-4
    """L2 penalty on gate rows in the warm start, per unit mean square of the inputs."""
    warm_start_iterations: Annotated[int, Field(ge=1)] = 30
    """L-BFGS iterations of the softmax regression, per gate."""

    steps: Annotated[int, Field(ge=0)] = 200
    """End-to-end optimiser steps through the frozen model; 0 keeps the warm start."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Chats per step."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    """Peak step size of AdamW (no weight decay); cosine to a tenth after the warm-up."""
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the steps over which the learning rate rises from 0."""
    max_gradient_norm: Annotated[float, Field(gt=0)] = 1.0
    """Global gradient norm above which gradients are scaled down."""
    straight_through_fraction: Annotated[float, Field(ge=0, le=1)] = 0.6
    """Last share of the steps that runs serving's top-k gates with the dense gradient; before it gates are dense."""

    alpha: Annotated[float, Field(ge=0)] = 1e-2
    """α, weight of the balance term of RSL (1 at perfect balance)."""
    prior: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Expected traffic by adapter name for the balance term, in any unit; adapters left out weigh 1."""
    lambda_: Annotated[float, Field(ge=0)] = 1e-2
    """λ, weight of the entropy term of RSL, which runs from 0 to 1."""
    sign: Literal[1, -1] = 1
    """Sign of the entropy term: +1 penalises entropy (specialises), -1 rewards it (the paper's printed formula)."""
    lambda_ramp_fraction: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of the steps over which λ rises from 0; an entropy penalty from step 0 can lock in random choices."""
    eta: Annotated[float, Field(ge=0)] = 0.1
    """η, weight of the adapter-id cross-entropy (MeteoRA); 0 is the paper's pure loss."""
    lm_weighting: Literal["nats", "relative"] = "nats"
    """LM loss of a chat in `nats`, or `relative` to what its own adapter reaches on its task, as the report counts."""
    distil: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the LM loss that is KL(own adapter ‖ router) over the vocabulary at answer positions; the rest is the
    likelihood of the answer itself. Zero divergence is the oracle, so this part has no noise of the data at its end."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 20
    """Steps between two checkpoints; a killed run repeats at most these."""

    @property
    def straight_through_from(self) -> int:
        """First step, from 0, that runs with straight-through gates."""
        return self.steps - round(self.steps * self.straight_through_fraction)

    def lambda_at(self, step: int) -> float:
        """λ at a step counted from 0."""
        ramp = self.steps * self.lambda_ramp_fraction
        return self.lambda_ if ramp == 0 else self.lambda_ * min(1.0, (step + 1) / ramp)

    def record(self) -> dict[str, Any]:
        """All settings for the artefact's training record."""
        return self.model_dump(mode="json")


def check_choices(config: TrainingConfig, names: Sequence[str]) -> None:
    """Refuse settings that do not fit the routed adapters `names`. Raises ConfigError for a prior of anything else, for
    more choices per token than there are, and for too few samples to show each of them one chat, beside composites."""
    choices = [*names, *([BASE_NAME] if config.null_expert else [])]
    listed = ", ".join(map(repr, choices))
    if unknown := sorted(set(config.prior) - set(choices)):
        raise ConfigError(f"the prior names {', '.join(map(repr, unknown))}; the choices are {listed}")
    if config.top_k > len(choices):
        raise ConfigError(f"top_k is {config.top_k}, and there are {len(choices)} choices: {listed}")
    sizes = {"samples": config.samples}
    if config.prompt_gate:
        sizes["prompt_gate_samples"] = config.prompt_gate_samples
    for name, size in sizes.items():
        alone = size - round(size * config.composite_fraction)
        if alone < len(choices):
            composites = f", of which {size - alone} are composites" if alone < size else ""
            raise ConfigError(
                f"{name} is {size}{composites}, not one chat for each of the {len(choices)} choices: {listed}"
            )


def prior_shares(config: TrainingConfig, names: Sequence[str]) -> Tensor | None:
    """π (C,) of the balance term in slot order; None for equal shares."""
    if not config.prior:
        return None
    weights = torch.tensor(
        [config.prior.get(name, 1.0) for name in [*([BASE_NAME] if config.null_expert else []), *names]]
    )
    return weights / weights.sum()
