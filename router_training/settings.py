"""Every setting of a training run, with default and unit. Reads no environment and starts nothing."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.routing.router import Granularity

WarmStart = Literal["none", "ridge", "softmax"]


class TrainingConfig(BaseModel):
    """One training run: base model and adapters frozen, only the router learns (the paper's plug-and-play regime).

    Dimensionless unless a unit is named. `examples/demo/README.md` has the command that trained the demo router.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    samples: Annotated[int, Field(ge=1)] = 2000
    """Chats in the balanced training mix, over all tasks together (the paper's 2k)."""
    max_length: Annotated[int, Field(ge=8)] = 256
    """Longest training sequence, in tokens; longer ones are cut as `encoding.truncate` says."""
    seed: int = 0
    """Seeds the mix and the order of the batches; initial gate rows are zero or closed-form, never random."""
    granularity: Granularity = "layer"
    """`layer`: one gate per decoder layer; `projection`: one per projection, as the paper counts parameters."""
    top_k: Annotated[int, Field(ge=1)] = 2
    """Adapters kept per token when serving, and in the straight-through steps."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides gate logits, in training as in serving."""

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
    lambda_: Annotated[float, Field(ge=0)] = 1e-2
    """λ, weight of the entropy term of RSL, which runs from 0 to 1."""
    sign: Literal[1, -1] = 1
    """Sign of the entropy term: +1 penalises entropy (specialises), -1 rewards it (the paper's printed formula)."""
    lambda_ramp_fraction: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of the steps over which λ rises from 0; an entropy penalty from step 0 can lock in random choices."""
    eta: Annotated[float, Field(ge=0)] = 0.1
    """η, weight of the adapter-id cross-entropy (MeteoRA); 0 is the paper's pure loss."""

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
