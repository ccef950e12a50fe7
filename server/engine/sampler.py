"""From logits to tokens: one batched pass over rows whose parameters may all differ.

Knows sequences and their parameters; the maths is in `sampling_ops`. Order per row: logit bias, min_tokens, penalties,
then argmax (temperature 0) or temperature, min-p, top-k, top-p and one draw.
"""

from collections.abc import Iterator
from collections.abc import Sequence as ListLike
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from server.engine import sampling_ops as ops
from server.engine.occurrences import Occurrences
from server.engine.sequence import Sequence, TokenLogprobs
from server.errors import EngineError

LOGPROB_ROWS = 64
"""Prompt positions scored at once: bounds the temporaries of a long prompt to 64 rows of the vocabulary."""

CPU_ROWS = 16
"""Rows drawn at once on a CPU: their temporaries stay in the cache, and malloc reuses them. Up to 1.6 times as fast as
64 rows at once; an accelerator prefers few large kernels."""


class SampledToken(NamedTuple):
    """The token chosen for one row, and its logprobs if the sequence asked for them."""

    token_id: int
    logprobs: TokenLogprobs | None


def sample(logits: Tensor, rows: ListLike[Sequence]) -> list[SampledToken]:
    """Choose one token per row. `logits` (S, V) of any float type, untouched; row i belongs to `rows[i]`.

    A row depends on its own logits, parameters, tokens and random numbers only: one number is taken from
    `sequence.rng` per sampled token if its temperature is above 0, none otherwise. Raises EngineError that names the
    sequences whose logits are not finite, before any number is taken.
    """
    if not rows:
        return []
    logits = logits.float()
    best, token_ids = ops.greatest(logits)  # (S,), (S,)
    _require_finite(best, rows)
    adjusted, place = logits, {}  # place: row of `logits` -> its row in `adjusted`
    if adjusting := [index for index, sequence in enumerate(rows) if sequence.adjusts_logits]:
        place = {index: position for position, index in enumerate(adjusting)}
        adjusted = _adjust(logits[adjusting], [rows[index] for index in adjusting])
        best[adjusting], token_ids[adjusting] = ops.greatest(adjusted)
        _require_finite(best, rows)
    random = [index for index, sequence in enumerate(rows) if sequence.params.temperature > 0]
    for chunk in _chunks(random, CPU_ROWS if logits.device.type == "cpu" else len(random)):
        own = logits[chunk]
        if moved := [(position, place[index]) for position, index in enumerate(chunk) if index in place]:
            own[[position for position, _ in moved]] = adjusted[[position for _, position in moved]]
        token_ids[chunk] = _draw(own, best[chunk], [rows[index] for index in chunk])
    logprobs = _logprobs(logits, token_ids, rows)
    return [SampledToken(*chosen) for chosen in zip(token_ids.tolist(), logprobs, strict=True)]


def score_tokens(
    logits: Tensor, targets: ListLike[int], num_top: int, *, sequence_id: int | None = None
) -> list[TokenLogprobs]:
    """Logprobs of known tokens: `logits` (N, V) at N positions, `targets` the token after each, `num_top` alternatives.

    Raises EngineError if a row is not finite; it names `sequence_id`, so that no other sequence has to end.
    """
    scored: list[TokenLogprobs] = []
    for start in range(0, len(targets), LOGPROB_ROWS):
        ids = list(targets[start : start + LOGPROB_ROWS])
        chunk = logits[start : start + LOGPROB_ROWS].float()
        if not bool(chunk.amax(-1).isfinite().all()):
            raise _not_finite([] if sequence_id is None else [sequence_id])
        found = ops.row_logprobs(chunk, torch.tensor(ids, device=logits.device), [num_top] * len(ids))
        scored += [TokenLogprobs(id_, row.logprob, row.top, row.rank) for id_, row in zip(ids, found, strict=True)]
    return scored


def _chunks(indices: list[int], size: int) -> Iterator[list[int]]:
    return (indices[start : start + size] for start in range(0, len(indices), max(1, size)))


def _require_finite(best: Tensor, rows: ListLike[Sequence]) -> None:
    """`best` (S,) greatest logit per row: NaN or infinite iff the row holds NaN, plus infinity or no finite logit."""
    is_finite = best.isfinite()
    if not bool(is_finite.all()):
        raise _not_finite([rows[index].id for index in (~is_finite).nonzero().flatten().tolist()])


def _not_finite(sequence_ids: list[int]) -> EngineError:
    listed = ", ".join(map(str, sequence_ids)) or "unknown"
    return EngineError(f"the model computed logits that are not finite (sequence {listed})", sequence_ids=sequence_ids)


def _adjust(logits: Tensor, rows: list[Sequence]) -> Tensor:
    """Apply logit bias, min_tokens and penalties in place; returns `logits` (S, V)."""
    _apply_bias(logits, rows)
    _apply_penalties(logits, rows)
    return logits


def _draw(logits: Tensor, best: Tensor, rows: list[Sequence]) -> Tensor:
    """Tokens (S,) drawn for rows with a temperature. `logits` (S, V) is overwritten, `best` (S,) holds its maxima."""
    # A temperature that float32 rounds to 0 would make the best token's 0 / 0 not a number.
    tiny = torch.finfo(torch.float32).tiny
    temperatures = _column([max(sequence.params.temperature, tiny) for sequence in rows], logits)
    weights = ops.to_weights(logits, best, temperatures)
    _filter(weights, rows)
    uniforms = [sequence.rng.random() for sequence in rows]
    return ops.draw(weights, torch.tensor(uniforms, dtype=torch.float64, device=logits.device))


def _apply_bias(logits: Tensor, rows: list[Sequence]) -> None:
    biases = [(index, *bias) for index, sequence in enumerate(rows) for bias in sequence.params.logit_bias]
    if biases:
        indices, ids, values = zip(*biases, strict=True)
        where = (_ids(indices, logits), _ids(ids, logits))
        logits.index_put_(where, _column(values, logits), accumulate=True)
    forbidden = [(index, id_) for index, sequence in enumerate(rows) for id_ in sequence.forbidden_token_ids]
    if forbidden:
        indices, ids = zip(*forbidden, strict=True)
        logits[_ids(indices, logits), _ids(ids, logits)] = -torch.inf


def _apply_penalties(logits: Tensor, rows: list[Sequence]) -> None:
    indices = [index for index, sequence in enumerate(rows) if sequence.params.is_penalised]
    if not indices:
        return
    known = [_occurrences(rows[index]) for index in indices]
    lengths = [len(occurrences.token_ids) for occurrences in known]
    params = [rows[index].params for index in indices]
    penalties = [(row.repetition_penalty, row.presence_penalty, row.frequency_penalty) for row in params]
    arrays = (
        np.repeat(indices, lengths),
        np.concatenate([np.array(occurrences.token_ids) for occurrences in known]),
        np.concatenate([np.array(occurrences.num_said) for occurrences in known]),
        np.repeat(np.array(penalties, np.float32), lengths, axis=0),
    )
    ops.penalise(logits, *(torch.from_numpy(array).to(logits.device) for array in arrays))


def _occurrences(sequence: Sequence) -> Occurrences:
    """Its tokens so far, those of its prompt only where they are penalised."""
    if (known := sequence.occurrences) is None:
        prompt = sequence.prompt_token_ids if sequence.params.repetition_penalty != 1.0 else ()
        known = sequence.occurrences = Occurrences(prompt)
    known.tell(sequence.output_token_ids[known.num_told :])
    return known


def _filter(weights: Tensor, rows: list[Sequence]) -> None:
    """Apply min-p, top-k and top-p to the rows that ask for any of them."""
    vocab_size = weights.shape[-1]
    filtered = [
        index
        for index, sequence in enumerate(rows)
        if sequence.params.min_p > 0 or sequence.params.top_p < 1 or 0 < sequence.params.top_k < vocab_size
    ]
    if not filtered:
        return
    params = [rows[index].params for index in filtered]
    filters = ops.Filters(
        min_p=_column([row.min_p for row in params], weights),
        top_k=_ids([row.top_k if row.top_k > 0 else vocab_size for row in params], weights),
        top_p=_column([row.top_p for row in params], weights),
    )
    if len(filtered) == len(rows):
        ops.keep_likely(weights, filters)
    else:
        kept = weights[filtered]
        ops.keep_likely(kept, filters)
        weights[filtered] = kept


def _logprobs(logits: Tensor, token_ids: Tensor, rows: ListLike[Sequence]) -> list[TokenLogprobs | None]:
    """Logprobs of the chosen tokens for the rows that want them, from the untouched logits."""
    scored: list[TokenLogprobs | None] = [None] * len(rows)
    wanted = [(index, count) for index, row in enumerate(rows) if (count := row.params.logprobs) is not None]
    if wanted:
        indices, counts = map(list, zip(*wanted, strict=True))
        chosen = token_ids[indices]
        found = ops.row_logprobs(logits[indices], chosen, counts)
        for index, token_id, row in zip(indices, chosen.tolist(), found, strict=True):
            scored[index] = TokenLogprobs(token_id, row.logprob, row.top, row.rank)
    return scored


def _ids(values: ListLike[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=like.device)


def _column(values: ListLike[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)
