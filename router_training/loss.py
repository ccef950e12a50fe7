"""The router's losses as pure functions of gate logits or probabilities, with their closed-form gradients.

Routing Specialization Loss of LoRA-Mixer (arXiv 2507.00029, Eq. 3 and 5), made independent of the number of adapters:

    RSL = α E Σ_i p̄_i f̄_i + s λ mean_t H(p_t) / log E

p̄ mean probability, f̄ top-k frequency without gradient. The paper prints s = -1, which flattens the gates, while its
text and figures need s = +1; `sign` names the choice. Adapter-id cross-entropy is MeteoRA's (arXiv 2405.13053).

Means over tokens take weights that sum to 1, so that a chat with a long answer need not outvote a short one; without
weights every token counts 1/T, as in the paper.

Letters: G gates (layers or projections), T tokens, E adapters. Leading dimensions before (T, E) are averaged over.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RouterLosses:
    """Terms of one step, each a scalar averaged over gates."""

    balance: Tensor
    """E Σ p̄ f̄: 1 at perfect balance, E when all tokens go to one adapter with k = 1."""
    entropy: Tensor
    """mean H / log E: 0 for one-hot gates, 1 for uniform ones."""
    adapter_id: Tensor
    """Cross-entropy of the gate logits against the adapter that each token's chat belongs to, in nats."""

    def total(self, *, alpha: float, lambda_: float, sign: int, eta: float) -> Tensor:
        """α balance + s λ entropy + η adapter-id."""
        return alpha * self.balance + sign * lambda_ * self.entropy + eta * self.adapter_id


def router_losses(
    logits: Tensor,
    labels: Tensor,
    top_k: int,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    prior: Tensor | None = None,
) -> RouterLosses:
    """All terms for gate logits (G, T, E) float32 of the tokens that count, their adapters (T,), weights (T,) and the
    prior (E,) of the balance term."""
    scaled = logits / temperature
    log_probabilities = torch.log_softmax(scaled, dim=-1)
    probabilities = log_probabilities.exp()
    weights = token_weights(probabilities, weights)
    own = log_probabilities.gather(-1, labels.expand(logits.shape[:-1]).unsqueeze(-1)).squeeze(-1)  # (G, T)
    return RouterLosses(
        balance=balance_term(probabilities, top_k_frequency(scaled, top_k, weights), weights, prior),
        entropy=entropy_term(probabilities, weights),
        adapter_id=-(own * weights).sum(dim=-1).mean(),
    )


def distilled_losses(logits: Tensor, targets: Tensor, teacher: Tensor, share: float) -> Tensor:
    """(1 - share) · -log q(target) + share · KL(p ‖ q) per token in nats, (N,) (Hinton et al., arXiv 1503.02531, at
    temperature 1), for logits of q (N, V), targets (N,) and the teacher's logits of p (N, V)."""
    log_q, log_p = torch.log_softmax(logits, dim=-1), torch.log_softmax(teacher, dim=-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    likelihood = -log_q.gather(-1, targets[:, None]).squeeze(-1)
    return (1 - share) * likelihood + share * divergence


def token_weights(probabilities: Tensor, weights: Tensor | None) -> Tensor:
    """`weights` (T,), or 1/T for every token of probabilities (..., T, E)."""
    num_tokens = probabilities.shape[-2]
    return probabilities.new_full((num_tokens,), 1 / num_tokens) if weights is None else weights


def top_k_frequency(scores: Tensor, top_k: int, weights: Tensor | None = None) -> Tensor:
    """f̄ (..., E): weighted share of the choices that fell on each adapter, 1/(T·k) Σ 1(i ∈ top-k) without weights.

    Sums to 1 and carries no gradient. Ties go to the lower adapter, as in serving (`ops.top_k_gates`).
    """
    chosen = scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :top_k]  # (..., T, k)
    hits = torch.zeros_like(scores, requires_grad=False).scatter(-1, chosen, 1 / top_k)
    return (hits * token_weights(scores, weights).unsqueeze(-1)).sum(dim=-2).detach()


def balance_term(
    probabilities: Tensor, frequency: Tensor, weights: Tensor | None = None, prior: Tensor | None = None
) -> Tensor:
    """Σ_i p̄_i f̄_i / π_i, with the uniform prior E Σ_i p̄_i f̄_i (Eq. 3 with Switch's factor E); scalar.

    probabilities (..., T, E), frequency (..., E), prior π (E,) sums to 1. It is 1 where p̄ = f̄ = π: a prior asks for
    balance against the expected traffic and not against equal shares.
    """
    mean = (probabilities * token_weights(probabilities, weights).unsqueeze(-1)).sum(dim=-2)  # (..., E)
    inverse = probabilities.new_tensor(float(probabilities.shape[-1])) if prior is None else 1 / prior
    return (inverse * mean * frequency.detach()).sum(dim=-1).mean()


def entropy_term(probabilities: Tensor, weights: Tensor | None = None) -> Tensor:
    """mean_t H(p_t) / log E (the entropy of Eq. 5, scaled to 0..1): probabilities (..., T, E); scalar."""
    mean = (token_entropy(probabilities) * token_weights(probabilities, weights)).sum(dim=-1)
    return mean.mean() / math.log(probabilities.shape[-1])


def token_entropy(probabilities: Tensor) -> Tensor:
    """H(p) in nats, (..., T). Its gradient is finite where a probability is too small for a number and so zero."""
    entropy: Tensor = torch.special.entr(probabilities.where(probabilities != 0, 1.0)).sum(dim=-1)
    return entropy


def mutual_information(probabilities: Tensor) -> Tensor:
    """I(adapter; token) = H(p̄) - mean_t H(p_t) in nats for (T, E): what balance plus s = +1 entropy maximise."""
    conditional = token_entropy(probabilities).mean(dim=-1)
    return token_entropy(probabilities.mean(dim=-2)) - conditional


def balance_gradient(probabilities: Tensor, frequency: Tensor) -> Tensor:
    """∂(E Σ p̄ f̄)/∂z for one gate: (E/T) p_ti (f̄_i - Σ_j p_tj f̄_j), (T, E). Pushes mass off over-used adapters."""
    num_tokens, num_adapters = probabilities.shape
    centred = frequency - (probabilities @ frequency)[:, None]
    return num_adapters / num_tokens * probabilities * centred


def entropy_gradient(probabilities: Tensor) -> Tensor:
    """∂(mean H / log E)/∂z for one gate: -p_ti (log p_ti + H_t) / (T log E), (T, E); 0 at uniform p."""
    num_tokens, num_adapters = probabilities.shape
    centred = probabilities.log() + token_entropy(probabilities)[:, None]
    return -probabilities * centred / (num_tokens * math.log(num_adapters))
