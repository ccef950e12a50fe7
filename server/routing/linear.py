"""RoutedLinear: a frozen projection of the base model plus the gated delta of the adapters.

Knows neither how gates come about (the batch in `RoutingContext` does) nor which adapters exist.
"""

from torch import Tensor, nn

from server.routing import ops
from server.routing.bank import ProjectionInfo
from server.routing.context import RoutingContext


class RoutedLinear(nn.Module):
    """y = W x + B (g[owner] * (A x)) over the bank rows of this projection (design section 2).

    With no routing batch in the context it is the base projection, bit for bit.
    """

    def __init__(self, base: nn.Module, info: ProjectionInfo, context: RoutingContext) -> None:
        super().__init__()
        self.base = base
        self.info = info
        self.context = context

    @property
    def weight(self) -> Tensor:
        """Weight of the base projection: some architectures look at its dtype."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """Bias of the base projection."""
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def forward(self, x: Tensor) -> Tensor:  # x (..., d_in) -> (..., d_out)
        """Base projection plus delta; the leading dimensions of `x` flatten to the T tokens of the batch."""
        y: Tensor = self.base(x)
        batch = self.context.batch
        if batch is None:
            return y
        tokens = x.reshape(-1, self.info.d_in)  # (T, d_in)
        gates = batch.gates(self.info, tokens)  # (T, E)
        bank = batch.bank.projections.get(self.info.name)
        if gates is None or bank is None:
            return y
        return y + ops.lora_delta(tokens, bank.a, bank.b, bank.owner, gates).view_as(y)

    def extra_repr(self) -> str:
        return f"layer={self.info.layer}, d_in={self.info.d_in}, d_out={self.info.d_out}"
