"""Swap a model's projections for RoutedLinear, and back. Takes any nn.Module; knows no transformers."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from server.routing.bank import LoraBank, ProjectionInfo
from server.routing.context import RoutingContext
from server.routing.linear import RoutedLinear
from server.routing.router_bank import RouterBank


@dataclass(frozen=True, eq=False)
class RoutedModel:
    """A model whose decoder projections route, with everything that steers them."""

    model: nn.Module
    projections: Mapping[str, ProjectionInfo]
    bank: LoraBank
    routers: RouterBank
    context: RoutingContext
    num_layers: int
    hidden_size: int

    @property
    def num_slots(self) -> int:
        return self.bank.num_slots


def find_projections(model: nn.Module) -> dict[str, ProjectionInfo]:
    """Every linear map inside the decoder layers, by module path, in registration order.

    The decoder layers are the longest ModuleList that lies in no other. The output head and embeddings are outside of
    it and so never targets. Experts of a mixture-of-experts block see a subset of the tokens and are left out as well.
    """
    prefix = _decoder_layers(model)
    projections = {}
    for name, module in model.named_modules():
        if not name.startswith(prefix + ".") or ".experts." in name:
            continue
        layer = int(name.removeprefix(prefix + ".").split(".")[0])
        if isinstance(module, nn.Linear):
            projections[name] = ProjectionInfo(name, module.in_features, module.out_features, layer, False)
        elif type(module).__name__ == "Conv1D" and isinstance(module.weight, nn.Parameter):
            d_in, d_out = module.weight.shape
            projections[name] = ProjectionInfo(name, d_in, d_out, layer, True)
    return projections


def attach_routing(model: nn.Module, *, num_slots: int = 65) -> RoutedModel:
    """Swap every decoder projection for a RoutedLinear around it, once, so that later registration touches no module.

    `num_slots` counts the base slot. Weights stay the same tensors. The bank computes in the model's dtype.
    """
    projections = find_projections(model)
    parameter = next(model.parameters())
    context = RoutingContext()
    for name, info in projections.items():
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        setattr(parent, leaf, RoutedLinear(getattr(parent, leaf), info, context))
    first = next(iter(projections.values()))
    return RoutedModel(
        model=model,
        projections=projections,
        bank=LoraBank(num_slots=num_slots, dtype=parameter.dtype, device=parameter.device),
        routers=RouterBank(num_slots=num_slots, device=parameter.device),
        context=context,
        num_layers=1 + max(info.layer for info in projections.values()),
        hidden_size=first.d_in,
    )


def detach_routing(routed: RoutedModel) -> None:
    """Put the original projections back."""
    for name in routed.projections:
        parent_name, _, leaf = name.rpartition(".")
        parent = routed.model.get_submodule(parent_name)
        module = getattr(parent, leaf)
        assert isinstance(module, RoutedLinear)
        setattr(parent, leaf, module.base)


def _decoder_layers(model: nn.Module) -> str:
    lists: dict[str, int] = {}
    for name, module in model.named_modules():
        # One inside another is part of a layer: experts, or norms of single heads, of which there may be more.
        if isinstance(module, nn.ModuleList) and not any(name.startswith(outer + ".") for outer in lists):
            lists[name] = len(module)
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of decoder layers")
    return max(lists, key=lambda name: lists[name])
