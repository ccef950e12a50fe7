"""A tiny roster: a random Llama with three random adapters, and tasks whose tokens tell them apart."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from router_training.encoding import TokenSequence
from router_training.forward import prepare_for_training
from router_training.roster import FIRST_SLOT, Roster, attach_adapters
from server.adapters.weights import load_adapter
from server.model.loader import LoadedModel
from server.routing.attach import attach_routing

NAMES = ("alpha", "beta", "gamma")
TARGETS = (("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"), ("v_proj", "o_proj"))
TOKENS_PER_TASK = 8
"""Few enough that token embeddings of 64 dimensions separate linearly."""


@pytest.fixture
def make_roster(
    tiny_llama: Callable[..., Any], make_adapter: Callable[..., Path], tmp_path: Path
) -> Callable[[], Roster]:
    """`make_roster()`: a fresh roster in float32, the same every time."""

    def build() -> Roster:
        model = tiny_llama()
        name = "tiny/llama"
        folders = [
            make_adapter(tmp_path / adapter, model, 4, targets, seed=seed, std=0.4)
            for seed, (adapter, targets) in enumerate(zip(NAMES, TARGETS, strict=True))
        ]
        for folder in folders:
            config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            config["base_model_name_or_path"] = name
            (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        prepare_for_training(model)
        routed = attach_routing(model, num_slots=len(NAMES) + FIRST_SLOT)
        loaded = LoadedModel(
            model=model,
            tokenizer=None,  # type: ignore[arg-type]
            config=model.config,
            name=name,
            revision=None,
            source_sha256=None,
            max_model_len=512,
            eos_token_ids=frozenset({2}),
            vocab_size=model.config.vocab_size,
        )
        adapters = [
            load_adapter(folder, adapter, projections=routed.projections, base_model_name=name)
            for folder, adapter in zip(folders, NAMES, strict=True)
        ]
        return attach_adapters(loaded, routed, adapters)

    return build


@pytest.fixture
def roster(make_roster: Callable[[], Roster]) -> Roster:
    """One fresh tiny roster."""
    return make_roster()


@pytest.fixture
def make_sequences() -> Callable[..., list[TokenSequence]]:
    """`make_sequences(count, seed=0)`: chats of three tasks in turn, each with its own range of token ids."""

    def build(count: int, seed: int = 0) -> list[TokenSequence]:
        generator = torch.Generator().manual_seed(seed)
        sequences = []
        for index in range(count):
            label = index % len(NAMES)
            length = int(torch.randint(8, 16, (), generator=generator))
            ids = torch.randint(0, TOKENS_PER_TASK, (length,), generator=generator) + label * TOKENS_PER_TASK
            sequences.append(TokenSequence(tuple(ids.tolist()), length - 3 - index % 2, label))
        return sequences

    return build
