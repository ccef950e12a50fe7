"""The training chats that fitted baselines see: a balanced draw, the same for all of them. Fits nothing."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from router_training.background import encode
from router_training.data import Chat, balanced_sample
from router_training.encoding import TokenSequence
from router_training.roster import BASE_TASK, Roster

CALIBRATION_SEED = 7
"""Which training chats are drawn; one fixed draw, so that records compare."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Chats of the tasks that have an adapter, at most `background.MAX_LENGTH` tokens each."""

    sequences: Sequence[TokenSequence]
    """Tasks take turns, so that any beginning is nearly balanced."""

    @property
    def digest(self) -> str:
        """sha256 of what the fits see."""
        content = [[sequence.token_ids, sequence.answer_start, sequence.label] for sequence in self.sequences]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def of_label(self, label: int) -> list[TokenSequence]:
        """The chats of one adapter."""
        return [sequence for sequence in self.sequences if sequence.label == label]

    def beginning(self, chats_per_task: int) -> list[TokenSequence]:
        """A balanced part of it."""
        num_tasks = len({sequence.label for sequence in self.sequences})
        return list(self.sequences[: chats_per_task * num_tasks])


def draw_calibration(roster: Roster, train: Mapping[str, Sequence[Chat]], chats_per_task: int) -> Calibration:
    """`chats_per_task` training chats of every adapter's task; off-domain chats stay out, no baseline has them."""
    adapted = {task: chats for task, chats in train.items() if task != BASE_TASK}
    return Calibration(encode(roster, balanced_sample(adapted, chats_per_task * len(adapted), CALIBRATION_SEED)))
