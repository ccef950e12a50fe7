"""LoRA adapters as parameters of a training run: fresh or loaded, laid out for the routed layers with their gradients.

Knows no optimiser, no files and no data; the maths of the delta stays in `server.routing.ops`.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from router_training.roster import FIRST_SLOT
from server.adapters.weights import Adapter
from server.errors import ConfigError
from server.routing.bank import BankSnapshot, ProjectionBank, ProjectionInfo

AdapterState = dict[str, dict[str, Tensor]]
"""Adapter name -> matrix name -> value, as checkpoints keep it."""


@dataclass(frozen=True, eq=False)
class TrainableAdapter:
    """One adapter; per projection name A (r, d_in) and B (d_out, r), float32, and delta = scaling · B A x."""

    name: str
    scaling: float
    a: Mapping[str, nn.Parameter]
    b: Mapping[str, nn.Parameter]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.named_parameters().values())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Matrix name, `<projection>.A` or `<projection>.B`, -> parameter."""
        return {f"{name}.{letter}": part[name] for name in self.a for letter, part in (("A", self.a), ("B", self.b))}


class TrainableAdapters:
    """All adapters of a run; adapter i sits in slot i + `FIRST_SLOT`, as in a roster."""

    def __init__(self, adapters: Sequence[TrainableAdapter]) -> None:
        self.adapters = tuple(adapters)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for adapter in self.adapters for parameter in adapter.parameters]

    def snapshot(self, dtype: torch.dtype, slot: int | None = None) -> BankSnapshot:
        """What the routed layers read, computed in `dtype`; gradients flow back to the parameters.

        With `slot` the bank holds that adapter alone, and costs what it alone costs.
        """
        parts: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
        for own_slot, adapter in enumerate(self.adapters, start=FIRST_SLOT):
            for name in adapter.a if slot in (None, own_slot) else ():
                scaled = adapter.b[name] * adapter.scaling
                parts.setdefault(name, []).append((own_slot, adapter.a[name].to(dtype), scaled.to(dtype)))
        return BankSnapshot({name: _concatenated(rows) for name, rows in parts.items()})

    def state(self) -> AdapterState:
        """Copies of all matrices."""
        return {
            adapter.name: {name: value.detach().clone() for name, value in adapter.named_parameters().items()}
            for adapter in self.adapters
        }

    def load_state(self, state: AdapterState) -> None:
        """Take every matrix from `state`."""
        with torch.no_grad():
            for adapter in self.adapters:
                for name, parameter in adapter.named_parameters().items():
                    parameter.copy_(state[adapter.name][name])

    def distances(self, start: AdapterState) -> dict[str, float]:
        """‖θ - θ₀‖² per adapter, over A and B of all its projections."""
        with torch.no_grad():
            return {
                adapter.name: float(
                    sum(
                        (value - start[adapter.name][name]).double().square().sum()
                        for name, value in adapter.named_parameters().items()
                    )
                )
                for adapter in self.adapters
            }


@dataclass(frozen=True, eq=False)
class Preservation:
    """β Σ ‖θ - θ₀‖² over the constrained adapters (LoRA-Mixer Eq. 11)."""

    start: AdapterState
    """θ₀."""
    constrained: Collection[str]
    beta: float

    def penalty(self, adapters: TrainableAdapters) -> float:
        """The term's value at this moment."""
        distances = adapters.distances(self.start)
        return self.beta * sum(distances[name] for name in self.constrained)

    def pull(self, adapters: TrainableAdapters, learning_rate: float) -> None:
        """The term's share of an optimiser step: its proximal map, θ ← θ₀ + (θ - θ₀) / (1 + 2βη).

        As a gradient it would pass through Adam, which divides by its size: β would hardly matter, and a large one
        would make the step swing about θ₀. The proximal map is stable for any β: 0 does nothing, ∞ returns to θ₀.
        """
        keep = 1 / (1 + 2 * self.beta * learning_rate)
        if keep == 1:
            return
        with torch.no_grad():
            for adapter in adapters.adapters:
                if adapter.name in self.constrained:
                    for name, parameter in adapter.named_parameters().items():
                        start = self.start[adapter.name][name]
                        parameter.copy_(torch.lerp(start, parameter, keep))


def fresh_adapters(
    names: Sequence[str],
    projections: Iterable[ProjectionInfo],
    *,
    targets: Collection[str],
    rank: int,
    scaling: float,
    seed: int,
) -> TrainableAdapters:
    """Adapters as PEFT begins them: A Kaiming-uniform from the seed, B zero, so that their deltas are zero.

    Raises ConfigError for a target that no projection of the base model has.
    """
    infos = list(projections)
    leaves = {info.name.rpartition(".")[2] for info in infos}
    if unknown := sorted(set(targets) - leaves):
        raise ConfigError(
            f"the base model has no projection {', '.join(map(repr, unknown))}; it has {', '.join(sorted(leaves))}"
        )
    generator = torch.Generator().manual_seed(seed)
    adapters = []
    for name in names:
        a, b = {}, {}
        for info in infos:
            if info.name.rpartition(".")[2] in targets:
                start = nn.init.kaiming_uniform_(torch.empty(rank, info.d_in), a=math.sqrt(5), generator=generator)
                a[info.name] = nn.Parameter(start)
                b[info.name] = nn.Parameter(torch.zeros(info.d_out, rank))
        adapters.append(TrainableAdapter(name, scaling, a, b))
    return TrainableAdapters(adapters)


def loaded_adapters(adapters: Iterable[Adapter]) -> TrainableAdapters:
    """Adapters as they were loaded: their own scaling is folded into B, so that scaling 1 keeps every bit."""
    return TrainableAdapters(
        [
            TrainableAdapter(
                adapter.name,
                1.0,
                {name: nn.Parameter(lora.A.clone()) for name, lora in adapter.weights.items()},
                {name: nn.Parameter(lora.B.clone()) for name, lora in adapter.weights.items()},
            )
            for adapter in adapters
        ]
    )


def _concatenated(rows: Sequence[tuple[int, Tensor, Tensor]]) -> ProjectionBank:
    slots = tuple((slot, a.shape[0]) for slot, a, _ in rows)
    owner = torch.tensor([slot for slot, rank in slots for _ in range(rank)])
    return ProjectionBank(torch.cat([a for _, a, _ in rows]), torch.cat([b for _, _, b in rows], dim=1), owner, slots)
