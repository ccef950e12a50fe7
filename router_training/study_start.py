"""Starts of runs, kept by content: runs of a study that differ only in what comes after share their warm start."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from router_training.cells import CellCache
from router_training.encoding import TokenSequence
from router_training.frozen import base_digest
from router_training.gates import RouterParameters
from router_training.roster import Roster
from router_training.run import num_warm_start, own_losses, start_router
from router_training.settings import TrainingConfig

WARM_START_FIELDS = (
    *(name for name in TrainingConfig.model_fields if name.startswith("warm_start")),
    *("granularity", "top_k", "temperature", "gate_mode", "null_expert", "routed_from_layer"),
)
"""Settings that decide the rows; those of the gates because later rounds run under the router fitted so far."""


class KeptStart:
    """As `start_router`, bit for bit (JSON writes a float32 with enough digits to read it back), and how long it took
    whoever computed it."""

    def __init__(self, cells: CellCache) -> None:
        self._cells = cells
        self.seconds = 0.0
        """Of the last call."""

    def __call__(
        self, roster: Roster, sequences: Sequence[TokenSequence], settings: TrainingConfig
    ) -> tuple[RouterParameters, dict[int, float] | None]:
        kept = self._rows(roster, sequences, settings)
        self.seconds = kept["seconds"]
        rows = {key: torch.tensor(row) for key, row in kept["rows"].items()}
        router = RouterParameters(rows, settings.granularity, null_expert=settings.null_expert)
        if settings.lm_weighting != "relative":
            return router, None
        facts = {"policy": "own losses", **_roster_facts(roster), "sequences": _content(sequences)}
        losses = self._cells.get(facts, lambda: list(own_losses(roster, sequences).items()))
        return router, {int(label): loss for label, loss in losses}

    def _rows(self, roster: Roster, sequences: Sequence[TokenSequence], settings: TrainingConfig) -> dict[str, Any]:
        plain = settings.model_copy(update={"lm_weighting": "nats"})

        def fit() -> dict[str, Any]:
            started = time.perf_counter()
            rows = start_router(roster, sequences, plain)[0].detached()
            seconds = round(time.perf_counter() - started, 1)
            return {"rows": {key: row.tolist() for key, row in rows.items()}, "seconds": seconds}

        decisive = {name: getattr(settings, name) for name in WARM_START_FIELDS}
        seen = _content(sequences[: num_warm_start(sequences, settings)])
        facts = {"policy": "warm start", **_roster_facts(roster), "settings": decisive, "sequences": seen}
        kept: dict[str, Any] = self._cells.get(facts, fit)
        return kept


def _roster_facts(roster: Roster) -> dict[str, Any]:
    return {
        "base": base_digest(roster),
        "adapters": [adapter.digest for adapter in roster.adapters],
        "dtype": str(next(roster.routed.model.parameters()).dtype),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _content(sequences: Sequence[TokenSequence]) -> list[Any]:
    return [[s.token_ids, s.answer_start, s.label, s.label_changes, s.unscored] for s in sequences]
