"""One forward pass of the frozen routed model for its loss on answer tokens. Knows no optimiser and no files."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from router_training.encoding import IGNORED, TokenBatch, TokenSequence, collate
from server.errors import ModelLoadError
from server.routing.attach import RoutedModel
from server.routing.context import RoutingBatch


def answer_losses(routed: RoutedModel, batch: TokenBatch, routing: RoutingBatch | None) -> Tensor:
    """Negative log-likelihood of every answer token in nats, (N,) float32 in row-major order of the positions.

    The output head runs on the answer positions only: with a vocabulary of 49k it would cost a fifth of the pass.
    """
    logits = answer_logits(routed, batch, routing)
    return F.cross_entropy(logits, batch.targets[batch.targets != IGNORED], reduction="none")


def mean_chat_loss(routed: RoutedModel, sequences: Sequence[TokenSequence], routing: RoutingBatch | None) -> Tensor:
    """Mean over chats of the mean loss of the answer's tokens, a scalar: each chat weighs the same, as in training.

    `routing` is for the sequences as one batch, collated in their order.
    """
    losses = answer_losses(routed, collate(sequences), routing)
    counts = torch.tensor([sequence.num_answer_tokens for sequence in sequences])
    mean: Tensor = (losses / counts.repeat_interleave(counts)).sum() / len(sequences)
    return mean


def answer_logits(routed: RoutedModel, batch: TokenBatch, routing: RoutingBatch | None) -> Tensor:
    """Logits that predict every answer token, (N, vocabulary) float32 in row-major order of the positions."""
    model: Any = routed.model
    hidden = last_hidden_states(routed, batch, routing)  # (S, L, d)
    logits: Tensor = model.get_output_embeddings()(hidden[batch.targets != IGNORED])
    return logits.float()


def last_hidden_states(routed: RoutedModel, batch: TokenBatch, routing: RoutingBatch | None) -> Tensor:
    """Run the decoder without its output head: (S, L, d) in the model's dtype."""
    model: Any = routed.model
    with routed.context.running(routing):
        hidden: Tensor = model.base_model(input_ids=batch.token_ids, use_cache=False).last_hidden_state
    return hidden


def prepare_for_training(model: nn.Module) -> None:
    """Freeze every parameter and take eager attention, whose backward pass is the fastest on CPU."""
    model.requires_grad_(False)
    model.eval()
    frozen: Any = model
    frozen.set_attn_implementation("eager")


@torch.inference_mode()
def check_output_head(model: nn.Module) -> None:
    """Refuse models whose logits are more than head(hidden), e.g. soft-capped ones. Raises ModelLoadError."""
    causal: Any = model
    token_ids = torch.arange(4)[None]
    hidden = causal.base_model(input_ids=token_ids, use_cache=False).last_hidden_state
    expected = causal(input_ids=token_ids, use_cache=False).logits
    found = causal.get_output_embeddings()(hidden)
    if not torch.allclose(found.float(), expected.float(), atol=1e-2, rtol=1e-2):
        raise ModelLoadError(
            f"{type(model).__name__} transforms its logits after the output head; router training does not support that"
        )
