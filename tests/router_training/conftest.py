"""A tiny roster: a random Llama with three random adapters, and tasks whose tokens tell them apart; and a tiny
project on disk for the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from router_training import prompt_fit
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

BASE = "tiny/llama"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ADAPTERS = {"letters": ["q_proj", "v_proj"], "digits": ["q_proj", "k_proj", "v_proj", "o_proj"]}


@pytest.fixture
def short_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt gates of tiny models need few steps."""
    monkeypatch.setattr(prompt_fit, "MIN_STEPS", 40)


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
            task = index % len(NAMES)
            length = int(torch.randint(8, 16, (), generator=generator))
            ids = torch.randint(0, TOKENS_PER_TASK, (length,), generator=generator) + task * TOKENS_PER_TASK
            sequences.append(TokenSequence(tuple(ids.tolist()), length - 3 - index % 2, task + FIRST_SLOT))
        return sequences

    return build


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes and ChatML's control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=CHATML
    )


def chat_line(task: str, index: int) -> str:
    question = "abcdefgh"[index % 8] * 3 if task == "letters" else str(index) * 3
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": question[:2]}]
    return json.dumps({"task": task, "messages": messages}) + "\n"


@pytest.fixture
def project(tiny_llama: Callable[..., Any], make_adapter: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder with adapters.yaml, a tiny base model, two adapters, and data for both."""
    model = tiny_llama(eos_token_id=257, bos_token_id=256)
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    for seed, (name, targets) in enumerate(ADAPTERS.items()):
        folder = make_adapter(tmp_path / name, model, 4, targets, seed=seed)
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = BASE
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        for split, count in (("train", 12), ("validation", 4)):
            path = tmp_path / "data" / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(chat_line(name, index) for index in range(count)), encoding="utf-8")
    content = {
        "base_model": {"name": BASE, "source": str(tmp_path / "base"), "dtype": "float32"},
        "adapters": [{"name": name, "source": name} for name in ADAPTERS],
    }
    (tmp_path / "adapters.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return tmp_path
