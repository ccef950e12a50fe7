"""Background statistics for gate rows without retraining, made from a router's own chats; see `routing.background`."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from router_training.data import Chat, data_digest, read_splits
from router_training.encoding import TokenSequence, encode_chats
from router_training.roster import BASE_TASK, Roster, check_artefact
from router_training.router_inputs import CachedInputs, cache_inputs
from server.config import ServerConfig
from server.routing.background import MAX_RETAINED, Background, summarise_gate, to_tensors
from server.routing.policy import BASE_DIGEST, BASE_SLOT, GatePlan
from server.routing.router import RouterArtefact, load_artefact, save_artefact

CHATS_PER_ADAPTER = 20
"""Of 8 adapters these are 6,000 tokens, ten for every value of a mean."""
MAX_LENGTH = 160
MAX_TOKENS_PER_PART = 24
"""Tokens kept of a chat's prompt and of its answer, evenly spread."""


def with_background(
    artefact: RouterArtefact,
    roster: Roster,
    sequences: Sequence[TokenSequence],
    plans: Sequence[GatePlan],
) -> RouterArtefact:
    """The artefact with statistics of these chats, labelled as `roster` is, under `plans` of each label.

    The plans should be those of `artefact` itself: a router at work sees such states.
    """
    cached = cache_inputs(
        roster.routed,
        sequences,
        plans,
        artefact.granularity,
        max_prompt_tokens=MAX_TOKENS_PER_PART,
        max_answer_tokens=MAX_TOKENS_PER_PART,
    )
    label_of_digest = {BASE_DIGEST: BASE_SLOT, **roster.slot_of_digest}
    index_of_label = {
        label_of_digest[adapter.digest]: index
        for index, adapter in enumerate(artefact.adapters)
        if adapter.digest in label_of_digest
    }
    retained = _retained(cached, set(index_of_label))
    domains = [index_of_label[label] for label in cached.labels[retained].tolist()]
    gates = {
        key: summarise_gate(cached.inputs[key].float(), retained, rows, artefact.temperature)
        for key, rows in artefact.rows.items()
    }
    return dataclasses.replace(artefact, background=to_tensors(Background(gates, torch.tensor(domains))))


def add_background(
    config: ServerConfig, data: Sequence[Path], folder: Path, load: Callable[[ServerConfig], Roster]
) -> None:
    """Add statistics to the artefact in `folder`, from the first training chats of every adapter; rows stay.

    `load` loads the roster. Raises TrainingDataError or RouterArtefactError before anything is written.
    """
    artefact = load_artefact(folder)
    names = [spec.name for spec in config.adapters if spec.routed]
    has_null_expert = any(adapter.digest == BASE_DIGEST for adapter in artefact.adapters)
    splits = read_splits(data, [*names, *([BASE_TASK] if has_null_expert else [])], ("train",))
    chats = [chat for rows in splits["train"].values() for chat in rows[:CHATS_PER_ADAPTER]]
    roster = load(config)
    check_artefact(artefact, roster)
    finished = with_background(artefact, roster, encode(roster, chats), roster.routed_plans(artefact))
    record = {"chats": len(chats), "data_sha256": data_digest(chats), "policy": "routed"}
    save_artefact(dataclasses.replace(finished, training={**artefact.training, "background": record}), folder)


def encode(roster: Roster, chats: Sequence[Chat]) -> list[TokenSequence]:
    """Chats as statistics see them."""
    loaded = roster.loaded
    return encode_chats(chats, roster.label_of_task, loaded.tokenizer, loaded.eos_token_ids, max_length=MAX_LENGTH)


def _retained(cached: CachedInputs, known: Collection[int]) -> Tensor:
    """Indices of evenly spread tokens, of prompts and answers alike, as many of each known label as there is room."""
    labels = sorted(set(cached.labels.tolist()) & set(known))
    share = max(1, MAX_RETAINED // len(labels))
    kept = []
    for label in labels:
        own = torch.nonzero(cached.labels == label)[:, 0]
        count = min(share, len(own))
        kept.append(own[torch.arange(count) * len(own) // count])
    return torch.cat(kept)
