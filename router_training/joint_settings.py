"""Every setting of joint training, with default and unit: those of the router, and those of the adapters."""

from collections.abc import Collection, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from router_training.settings import TrainingConfig
from server.errors import ConfigError

START_SHAPE = ("rank", "lora_alpha", "targets")
"""Settings that only a fresh adapter has a use for."""


class JointConfig(TrainingConfig):
    """Adapters and router trained together: hard by domain, then soft (LoRA-Mixer's first regime).

    The inherited settings steer the soft stage's router exactly as in plug-and-play training; both stages share data,
    `batch_size`, `warmup_fraction` and `max_gradient_norm`.
    """

    tasks: tuple[str, ...] = ()
    """Adapters to train; their chats are in data folders of the same names. Empty: every data folder for a fresh
    start, every routed adapter of the config for an existing one."""
    start: Literal["fresh", "existing"] = "fresh"
    """`fresh`: new adapters, A Kaiming-uniform from `seed`, B zero. `existing`: the config's adapters as they are."""
    rank: Annotated[int, Field(ge=1)] = 8
    """Rank of fresh adapters."""
    lora_alpha: Annotated[int, Field(ge=1)] = 16
    """Fresh adapters are scaled by `lora_alpha / rank`."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Leaf names of the projections that fresh adapters adapt, in every layer."""

    hard_steps: Annotated[int, Field(ge=0)] = 100
    """Optimiser steps per adapter in the hard stage, where every token runs under its own domain's adapter alone."""
    hard_learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak step size of AdamW in the hard stage; the same warm-up and cosine as the router's."""
    adapter_learning_rate: Annotated[float, Field(ge=0)] = 2e-4
    """Peak step size of AdamW for the adapters in the soft stage; 0 freezes them there."""
    beta: Annotated[float, Field(ge=0)] = 10.0
    """β, weight of the preservation penalty Σ‖θ - θ₀‖² in the soft stage; θ₀ are the adapters after the hard stage.
    As Adam's steps have the size of the learning rate, no weight strays further than about 1 / 2β from θ₀."""
    constrained: tuple[str, ...] | None = None
    """Adapters under the preservation penalty; null: all of them."""

    @model_validator(mode="after")
    def _only_fresh_adapters_have_a_shape(self) -> "JointConfig":
        if self.start == "existing" and (given := sorted(self.model_fields_set & set(START_SHAPE))):
            raise ValueError(f"existing adapters keep their shape; leave out {', '.join(given)}")
        return self

    def record(self) -> dict[str, Any]:
        """All settings for the artefact's training record; a shape only where it was used."""
        return self.model_dump(mode="json", exclude=set(START_SHAPE) if self.start == "existing" else None)

    def constrained_among(self, tasks: Sequence[str]) -> Collection[str]:
        """Adapters under the penalty. Raises ConfigError for a name that is not trained."""
        if self.constrained is None:
            return tuple(tasks)
        if unknown := sorted(set(self.constrained) - set(tasks)):
            raise ConfigError(
                f"constrained names {', '.join(map(repr, unknown))}; the adapters are {', '.join(map(repr, tasks))}"
            )
        return self.constrained
