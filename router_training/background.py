"""Statistics for gate rows and prompt-gate columns without retraining, made from a router's own chats.

See `routing.background` and `routing.prompt_statistics`.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from router_training.data import Chat, data_digest, read_splits
from router_training.encoding import TokenSequence, encode_chats
from router_training.prompt_fit import normalised
from router_training.roster import BASE_TASK, Roster, check_artefact
from router_training.router_inputs import CachedInputs, cache_inputs
from server.config import ServerConfig
from server.errors import RouterArtefactError
from server.routing.background import MAX_RETAINED, Background, summarise_gate, to_tensors
from server.routing.policy import BASE_DIGEST, BASE_SLOT, GatePlan
from server.routing.prompt_statistics import summarise_questions
from server.routing.router import RouterArtefact, load_artefact, save_artefact

CHATS_PER_ADAPTER = 20
"""Of 8 adapters these are 6,000 tokens, ten for every value of a mean."""
QUESTIONS_PER_ADAPTER = 250
"""Chats whose questions count for the prompt gate: they are read, not computed. As many as a training mix has."""
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
    index_of_label = _index_of_label(artefact, roster)
    retained = _retained(cached, set(index_of_label))
    domains = [index_of_label[label] for label in cached.labels[retained].tolist()]
    gates = {
        key: summarise_gate(cached.inputs[key].float(), retained, rows, artefact.temperature)
        for key, rows in artefact.rows.items()
    }
    return dataclasses.replace(artefact, background=to_tensors(Background(gates, torch.tensor(domains))))


def with_questions(artefact: RouterArtefact, roster: Roster, sequences: Sequence[TokenSequence]) -> RouterArtefact:
    """The artefact, if it has a prompt gate, with statistics of the first questions of these chats.

    Raises RouterArtefactError where no chat of its adapters has a question.
    """
    gate = artefact.prompt_gate
    if gate is None:
        return artefact
    index_of_label = _index_of_label(artefact, roster)
    questions = [
        (sequence.token_ids[span[0] : span[1]], index_of_label[sequence.label])
        for sequence in sequences
        if sequence.label in index_of_label and (span := gate.frame.question(sequence.token_ids)) is not None
    ]
    if not questions:
        raise RouterArtefactError("the chats hold no question as the artefact's prompt gate knows them")
    model: Any = roster.loaded.model
    embeddings = normalised(model.get_input_embeddings().weight)
    statistics = summarise_questions(questions, embeddings, gate.scores.shape[1])
    return dataclasses.replace(artefact, prompt_gate=dataclasses.replace(gate, statistics=statistics))


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
    if artefact.prompt_gate is not None:
        more = [chat for rows in splits["train"].values() for chat in rows[:QUESTIONS_PER_ADAPTER]]
        finished = with_questions(finished, roster, encode(roster, more))
    record = {"chats": len(chats), "data_sha256": data_digest(chats), "policy": "routed"}
    save_artefact(dataclasses.replace(finished, training={**artefact.training, "background": record}), folder)


def encode(roster: Roster, chats: Sequence[Chat]) -> list[TokenSequence]:
    """Chats as statistics see them."""
    loaded = roster.loaded
    return encode_chats(chats, roster.label_of_task, loaded.tokenizer, loaded.eos_token_ids, max_length=MAX_LENGTH)


def _index_of_label(artefact: RouterArtefact, roster: Roster) -> dict[int, int]:
    """Label of a chat -> place of its adapter in the artefact."""
    label_of_digest = {BASE_DIGEST: BASE_SLOT, **roster.slot_of_digest}
    return {
        label_of_digest[adapter.digest]: index
        for index, adapter in enumerate(artefact.adapters)
        if adapter.digest in label_of_digest
    }


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
