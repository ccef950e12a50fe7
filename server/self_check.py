"""Whether what computes the steps agrees with the model itself, on a fixed text, before anything is served.

Part of the composition root. The model is asked first, as transformers runs it; the graph then gets the same text in
chunks and token by token, so that state outside of the K/V cache, masks and positions of a model's own show.
"""

import itertools
from collections.abc import Sequence as List
from typing import Any

import torch
from torch import Tensor

from server.engine.graph import Graph
from server.engine.layout import lay_out
from server.engine.sequence import SamplingParams, ScheduledBatch, ScheduledSequence, Sequence
from server.errors import ModelLoadError

CHUNKS = (17, 15, *itertools.repeat(1, 8))
"""Tokens computed in turn: two chunks that fill blocks and tiles, the second in the middle of one, then decoding."""
MAX_SHARE = 0.15
"""Positions that may differ by more than the tolerance; the decoded ones alone are a fifth."""


def text_for(vocab_size: int, max_model_len: int) -> list[int]:
    """Token ids of the text; begins like any other and repeats nothing."""
    return [7 * index % vocab_size for index in range(min(sum(CHUNKS), max_model_len))]


def own_logits(model: Any, token_ids: List[int]) -> Tensor:
    """Logits (T, V) float32 of the model by its own forward pass, in one go, without a cache. Raises ModelLoadError."""
    try:
        with torch.inference_mode():
            tokens = torch.tensor([token_ids], device=model.device)
            logits: Tensor = model(input_ids=tokens, use_cache=False).logits[0].float()
    except Exception as error:  # every architecture fails in its own way
        message = f"{type(model).__name__} cannot compute a text: {type(error).__name__}: {error}"
        raise ModelLoadError(message) from error
    return logits


def disagreement(graph: Graph, token_ids: List[int], expected: Tensor, tolerance: float) -> str | None:
    """How a graph differs from `expected` (T, V), by more than `tolerance` of the largest logit of all; None if it does
    not. Uses the cache's first blocks after the scratch block."""
    sequence = Sequence(id=0, prompt_token_ids=list(token_ids), params=SamplingParams())
    sequence.block_table = list(range(1, 2 + len(token_ids)))
    found = []
    for chunk in CHUNKS:
        count = min(chunk, len(token_ids) - sequence.num_computed_tokens)
        if count == 0:
            break
        layout = lay_out(ScheduledBatch((ScheduledSequence(sequence, count),)))
        with torch.inference_mode():
            found.append(graph.forward(layout, range(count), collect_layers=False).logits[:count].clone())
        sequence.num_computed_tokens += count
    difference = (torch.cat(found) - expected).abs().amax(-1) / expected.abs().max()  # (T,)
    # Not a number counts as different.
    share = 1 - float((difference <= tolerance).float().mean())
    if share <= MAX_SHARE:
        return None
    return f"disagrees with transformers' graph at {share:.0%} of the positions of a test prompt"
