"""Small tokenizers of the two kinds we meet, made here, and a model folder to load."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from server.model.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "the user said hello to the assistant",
    "hello there, hello again",
    "1 2 3 42 日本語 héllo 👩‍🚀",
    "<|im_start|>",
] * 4


@pytest.fixture(scope="session")
def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2-like: 256 bytes and a few merges, ChatML control tokens, one added token that is no control token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>", "<｜wide▁token｜>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=CHATML
    )


@pytest.fixture(scope="session")
def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Llama-2-like: `▁` for spaces, bytes as `<0x..>` tokens for what the vocabulary lacks."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehlort,.", "▁h", "▁he"]
    backend = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[("▁", "h"), ("▁h", "e")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def demo_tokenizer(demo_model_folder: Path) -> ChatTokenizer:
    """The tokenizer of the demo base model."""
    return ChatTokenizer.from_folder(demo_model_folder)


@pytest.fixture(scope="session")
def _saved_model(
    tiny_llama: "Callable[..., LlamaForCausalLM]",
    byte_level: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_llama(tie_word_embeddings=True).save_pretrained(folder)
    byte_level.save_pretrained(folder)
    return folder


@pytest.fixture
def model_folder(_saved_model: Path, tmp_path: Path) -> Path:
    """A complete model folder with tied embeddings that the test may damage."""
    return Path(shutil.copytree(_saved_model, tmp_path / "model"))
