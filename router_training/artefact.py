"""From trained rows to the artefact folder that the server reads (design section 3.5)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from router_training.roster import BASE_TASK, Roster
from router_training.settings import TrainingConfig
from server.routing.policy import BASE_DIGEST
from server.routing.prompt_gate import PromptGate
from server.routing.router import ArtefactAdapter, RouterArtefact


def build_artefact(
    rows: Mapping[str, Tensor],
    roster: Roster,
    config: TrainingConfig,
    *,
    background: Mapping[str, Tensor] | None = None,
    prompt_gate: PromptGate | None = None,
    training: Mapping[str, Any] | None = None,
) -> RouterArtefact:
    """Rows in slot order, the null expert's first if there is one; shares their memory."""
    return RouterArtefact(
        base_model=roster.loaded.name,
        hidden_size=roster.routed.hidden_size,
        num_layers=roster.routed.num_layers,
        granularity=config.granularity,
        top_k=min(config.top_k, len(roster.adapters) + config.null_expert),
        temperature=config.temperature,
        gate_mode=config.gate_mode,
        adapters=(
            *((ArtefactAdapter(name=BASE_TASK, digest=BASE_DIGEST),) if config.null_expert else ()),
            *_trained_adapters(roster),
        ),
        rows=rows,
        background=background or {},
        prompt_gate=prompt_gate,
        training=training or {},
    )


def _trained_adapters(roster: Roster) -> tuple[ArtefactAdapter, ...]:
    return tuple(
        ArtefactAdapter(
            name=adapter.name,
            digest=adapter.digest,
            source=adapter.source,
            revision=adapter.revision,
            rank=adapter.rank,
            targets=tuple(adapter.targets),
        )
        for adapter in roster.adapters
    )
