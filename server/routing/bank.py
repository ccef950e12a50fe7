"""The LoRA bank: tensors of all resident adapters, concatenated along the rank axis, as immutable snapshots.

Staging a change (`with_adapter`, `without_slots`) is pure and may run on any thread; `publish` is one assignment and
belongs to the thread that runs the model. Knows slots, not names, leases or requests.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from server.routing.policy import BASE_SLOT

RANK_BUCKET = 16
"""Rank rows are padded to a multiple of this, so that shapes change rarely as adapters come and go."""


class ProjectionInfo(NamedTuple):
    """What an adapter has to know about one projection."""

    name: str
    """Module path as PEFT sees it, e.g. `model.layers.0.self_attn.q_proj`."""
    d_in: int
    d_out: int
    layer: int
    """Index of its decoder layer."""
    fan_in_fan_out: bool
    """True where the base stores its weight as (d_in, d_out), as GPT-2's Conv1D does."""


class LoraWeights(NamedTuple):
    """One adapter's update of one projection, delta = B A x."""

    A: Tensor
    """(r, d_in) float32."""
    B: Tensor
    """(d_out, r) float32, LoRA scaling folded in."""


@dataclass(frozen=True, eq=False)
class ProjectionBank:
    """All adapters of one projection. Padding rows are zero and owned by the base slot."""

    a: Tensor
    """(R, d_in) in the compute dtype."""
    b: Tensor
    """(d_out, R) in the compute dtype."""
    owner: Tensor
    """(R,) int64: slot of each rank row."""
    slots: tuple[tuple[int, int], ...]
    """(slot, rank) in row order, padding left out."""

    @property
    def num_rows(self) -> int:
        """Rank rows in use, padding left out."""
        return sum(rank for _, rank in self.slots)


class Packed(Protocol):
    """One adapter in the layout of a native step."""

    pointer: int
    num_bytes: int
    content: bytes
    """Digest of what it holds."""


@dataclass(frozen=True, eq=False)
class BankSnapshot:
    """What the layers read during one step: concatenated tensors, or one packed adapter a slot for a native step."""

    projections: Mapping[str, ProjectionBank] = field(default_factory=dict)
    packed: Mapping[int, Packed] = field(default_factory=dict)

    @property
    def slots(self) -> frozenset[int]:
        return frozenset(slot for bank in self.projections.values() for slot, _ in bank.slots) | self.packed.keys()

    @property
    def num_bytes(self) -> int:
        tensors = (tensor for bank in self.projections.values() for tensor in (bank.a, bank.b))
        packed = sum(adapter.num_bytes for adapter in self.packed.values())
        return packed + sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class LoraBank:
    """Owner of the current snapshot. Stage changes one at a time: each builds on the snapshot current when it began."""

    def __init__(self, *, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.num_slots = num_slots
        self.dtype = dtype
        self.device = device
        self.snapshot = BankSnapshot()
        self.pack: Callable[[Mapping[str, LoraWeights]], Packed] | None = None
        """Set before the first adapter comes: adapters are packed one by one for a native step, not concatenated."""

        self.packed_bytes: Callable[[Mapping[str, LoraWeights]], int] | None = None
        """Set with `pack`: memory of what it makes."""

    def bytes_of(self, weights: Mapping[str, LoraWeights]) -> int:
        """Memory of an adapter in the bank."""
        if self.packed_bytes is not None:
            return self.packed_bytes(weights)
        return sum(part.numel() for pair in weights.values() for part in (pair.A, pair.B)) * self.dtype.itemsize

    def with_adapter(
        self, slot: int, weights: Mapping[str, LoraWeights], *, onto: BankSnapshot | None = None
    ) -> BankSnapshot:
        """Current snapshot, or a staged one, plus one adapter; rows of the others are copied bit for bit.

        Raises ValueError if the slot is the base's, out of range or already in use (the caller's bug).
        """
        if not BASE_SLOT < slot < self.num_slots:
            raise ValueError(f"slot {slot} is outside 1..{self.num_slots - 1}")
        before = self.snapshot if onto is None else onto
        if slot in before.slots:
            raise ValueError(f"slot {slot} is in use")
        if self.pack is not None:
            return BankSnapshot(packed={**before.packed, slot: self.pack(weights)})
        projections = dict(before.projections)
        for name, lora in weights.items():
            projections[name] = self._extend(projections.get(name), slot, lora)
        return BankSnapshot(projections)

    def without_slots(self, slots: Iterable[int]) -> BankSnapshot:
        """Current snapshot less the rows of `slots`; projections left empty disappear."""
        removed = frozenset(slots)
        packed = {slot: adapter for slot, adapter in self.snapshot.packed.items() if slot not in removed}
        projections = {}
        for name, bank in self.snapshot.projections.items():
            if removed.isdisjoint(slot for slot, _ in bank.slots):
                projections[name] = bank
            elif kept := [entry for entry in bank.slots if entry[0] not in removed]:
                rows = torch.isin(bank.owner, torch.tensor([slot for slot, _ in kept], device=self.device))
                projections[name] = self._assemble(bank.a[rows], bank.b[:, rows], tuple(kept))
        return BankSnapshot(projections, packed)

    def publish(self, snapshot: BankSnapshot) -> None:
        """Make `snapshot` current. Only between two steps, on the thread that runs the model."""
        self.snapshot = snapshot

    def _extend(self, bank: ProjectionBank | None, slot: int, lora: LoraWeights) -> ProjectionBank:
        a = lora.A.to(self.device, self.dtype)
        b = lora.B.to(self.device, self.dtype)
        slots: tuple[tuple[int, int], ...] = ((slot, a.shape[0]),)
        if bank is not None:
            used = bank.num_rows
            a = torch.cat([bank.a[:used], a])
            b = torch.cat([bank.b[:, :used], b], dim=1)
            slots = bank.slots + slots
        return self._assemble(a, b, slots)

    def _assemble(self, a: Tensor, b: Tensor, slots: tuple[tuple[int, int], ...]) -> ProjectionBank:
        rows = a.shape[0]
        capacity = -(-rows // RANK_BUCKET) * RANK_BUCKET
        owner = torch.full((capacity,), BASE_SLOT, dtype=torch.int64, device=self.device)
        owner[:rows] = torch.tensor([slot for slot, rank in slots for _ in range(rank)], device=self.device)
        padded_a = a.new_zeros(capacity, a.shape[1])
        padded_a[:rows] = a
        padded_b = b.new_zeros(b.shape[0], capacity)
        padded_b[:, :rows] = b
        return ProjectionBank(padded_a, padded_b, owner, slots)
