"""Proof that training left base model and adapters alone: digests over their tensors, before and after."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from router_training.roster import Roster
from server.errors import LoraMixerError


class FrozenWeightsError(LoraMixerError):
    """A weight that must never change did; the run's result is void."""

    default_code = "frozen_weights_changed"


def frozen_digests(roster: Roster) -> dict[str, str]:
    """sha256 of the base model's parameters and buffers, and of each adapter's rows in the bank, by name."""
    digests = {"base": _base_digest(roster)}
    for slot, task in enumerate(roster.tasks):
        if slot:
            digests[task] = _digest(_rows_of(roster, slot))
    return digests


def base_digest(roster: Roster) -> str:
    """What tells the base model's weights from any others: sha256 of the file that they were read from, where there is
    one, else of the weights as they are in memory."""
    return roster.loaded.source_sha256 or _base_digest(roster)


def check_frozen(roster: Roster, before: Mapping[str, str]) -> None:
    """Raises FrozenWeightsError that names every part that is no longer what it was."""
    after = frozen_digests(roster)
    if changed := [name for name in before if after.get(name) != before[name]]:
        raise FrozenWeightsError(
            f"training changed weights that are frozen: {', '.join(changed)}; nothing was written, please report this"
        )


def _base_digest(roster: Roster) -> str:
    model = roster.routed.model
    return _digest([*model.named_parameters(), *model.named_buffers()])


def _rows_of(roster: Roster, slot: int) -> Iterable[tuple[str, Tensor]]:
    for name, bank in sorted(roster.routed.bank.snapshot.projections.items()):
        rows = bank.owner == slot
        yield f"{name}.A", bank.a[rows]
        yield f"{name}.B", bank.b[:, rows]


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    sha = hashlib.sha256()
    for name, tensor in tensors:
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
