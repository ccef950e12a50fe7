"""The maths of routing as pure functions: logits to gates, gates and bank to a delta. Knows no layers and no requests.

Letters: T tokens, E slots, R rank rows of a bank, d_in and d_out of a projection, k adapters kept per token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def top_k_gates(logits: Tensor, allowed: Tensor, top_k: Tensor, temperature: float = 1.0) -> Tensor:
    """Sparse gates: mask, keep the `top_k` largest, softmax over the kept.

    logits (T, E) float32; allowed (T, E) bool; top_k (T,) int. Returns (T, E) float32: rows are non-negative, at most
    `top_k` entries are non-zero, and they sum to 1; a row with nothing allowed, or whose greatest logit is not finite,
    is all zero. Ties go to the lower slot, so the result never depends on the sorting kernel. One kept entry weighs
    exactly 1.0.
    Softmax over the kept equals softmax, mask and renormalise (as MeteoRA's gate does, arXiv 2405.13053).
    """
    masked = (logits / temperature).masked_fill(~allowed, -torch.inf)
    ranked, order = masked.sort(dim=-1, descending=True, stable=True)
    position = torch.arange(logits.shape[-1], device=logits.device)
    kept = (position < top_k[:, None]) & (ranked > -torch.inf)  # (T, E), in ranked order
    weights = torch.exp(ranked - ranked[:, :1]) * kept
    weights = torch.nan_to_num(weights) / weights.nansum(dim=-1, keepdim=True).clamp_min(
        torch.finfo(weights.dtype).tiny
    )
    return torch.zeros_like(masked).scatter(-1, order, weights)


def top_k_gates_reference(logits: Tensor, allowed: Tensor, top_k: Tensor, temperature: float = 1.0) -> Tensor:
    """`top_k_gates` token by token in plain Python: what the fast version is held to."""
    gates = torch.zeros_like(logits)
    for token in range(logits.shape[0]):
        slots = [slot for slot in range(logits.shape[1]) if allowed[token, slot]]
        slots.sort(key=lambda slot: (-float(logits[token, slot]), slot))
        kept = slots[: int(top_k[token])]
        if kept:
            gates[token, kept] = torch.softmax(logits[token, kept] / temperature, dim=-1)
    return gates


def dense_gates(logits: Tensor, allowed: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Softmax over all allowed slots, (T, E) float32: the paper's gate during training. Differentiable."""
    scaled = logits / temperature
    return torch.softmax(scaled if allowed is None else scaled.masked_fill(~allowed, -torch.inf), dim=-1)


def straight_through_gates(logits: Tensor, top_k: int, temperature: float = 1.0) -> Tensor:
    """Forward: the sparse gates that serving uses. Backward: the gradient of the dense softmax.

    g = p + stop_gradient(top_k(p) - p), which removes the gap between dense training and sparse serving.
    """
    dense = dense_gates(logits, None, temperature)
    with torch.no_grad():
        allowed = torch.ones_like(logits, dtype=torch.bool)
        count = torch.full((logits.shape[0],), top_k, device=logits.device)
        difference = top_k_gates(logits, allowed, count, temperature) - dense
    return dense + difference


def lora_delta(x: Tensor, a: Tensor, b: Tensor, owner: Tensor, gates: Tensor) -> Tensor:
    """Gated sum of every adapter's update by two products over the concatenated ranks.

    x (T, d_in), a (R, d_in), b (d_out, R) with LoRA scaling folded in, owner (R,) slot of each rank row, gates (T, E).
    Returns (T, d_out) = B (g[owner] * (A x)). The identity is SMoRA's (arXiv 2501.15103): a k-of-E mixture of LoRAs is
    one LoRA of the concatenated rank with its rank rows scaled per token; unequal ranks need no padding.
    """
    hidden = F.linear(x, a)  # (T, R)
    return F.linear(hidden * gates.index_select(1, owner).to(hidden.dtype), b)


def lora_delta_reference(x: Tensor, a: Tensor, b: Tensor, owner: Tensor, gates: Tensor) -> Tensor:
    """`lora_delta` as the textbook sum over adapters, g_e B_e (A_e x), one slot at a time, in float32."""
    delta: Tensor = torch.zeros(x.shape[0], b.shape[0], dtype=torch.float32, device=x.device)
    for slot in sorted(set(owner.tolist())):
        rows = owner == slot
        update = (x.float() @ a[rows].float().T) @ b[:, rows].float().T
        delta += gates[:, slot, None].float() * update
    result: Tensor = delta.to(x.dtype)
    return result


def gate_entropy(gates: Tensor) -> Tensor:
    """Entropy of each row in nats, (T,) float32; 0 for a row with one non-zero entry."""
    entropy: Tensor = torch.special.entr(gates.float()).sum(dim=-1)
    return entropy
