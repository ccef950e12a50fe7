"""A GGUF file becomes a complete, exact model folder once, whatever dies or competes on the way."""

import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from server.errors import ModelLoadError
from server.model import conversion
from server.model.conversion import RECORD_NAME, convert_once
from server.model.loader import LoadedModel
from server.model.sources import GgufSource, sha256_of
from server.model.tokenizer import ChatTokenizer
from tests.model.gguf_file import write_gguf

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tied_llama(tiny_llama: "Callable[..., LlamaForCausalLM]") -> "LlamaForCausalLM":
    return tiny_llama(tie_word_embeddings=True)


@pytest.fixture(scope="session")
def gguf_path(
    tied_llama: "LlamaForCausalLM", byte_level: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.F32.gguf"
    write_gguf(path, tied_llama, byte_level)
    return path


@pytest.fixture(scope="session")
def converted(gguf_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_once(GgufSource(gguf_path), tmp_path_factory.mktemp("cache")).folder


def test_unquantised_weights_convert_to_a_model_with_the_same_logits(
    tied_llama: "LlamaForCausalLM", converted: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted)
    token_ids = torch.arange(20)[None]
    # GGUF stores rms_norm_eps as a float32, which the model computes with anyway.
    assert torch.equal(model(token_ids).logits, tied_llama(token_ids).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype is torch.float32


def test_block_quantised_weights_convert_to_exactly_the_values_the_blocks_stand_for(
    tied_llama: "LlamaForCausalLM", byte_level: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.Q4_1.gguf"
    write_gguf(path, tied_llama, byte_level, quantization=gguf.GGMLQuantizationType.Q4_1)
    model = AutoModelForCausalLM.from_pretrained(convert_once(GgufSource(path), tmp_path / "cache").folder)
    weight = model.model.layers[1].mlp.down_proj.weight
    blocks = gguf.quantize(tied_llama.model.layers[1].mlp.down_proj.weight.numpy(), gguf.GGMLQuantizationType.Q4_1)
    values = torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q4_1))
    assert torch.equal(weight, values)
    assert not torch.equal(weight, weight.bfloat16().float()), "bfloat16 would not hold these values"


def test_tokenizer_template_and_end_of_sequence_survive(converted: Path, byte_level: PreTrainedTokenizerFast) -> None:
    tokenizer = ChatTokenizer.from_folder(converted)
    messages = [{"role": "user", "content": "hello"}]
    assert tokenizer.render_chat(messages) == ChatTokenizer(byte_level).render_chat(messages)
    assert tokenizer.eos_token_id == byte_level.eos_token_id
    generation = json.loads((converted / "generation_config.json").read_text())
    assert generation["eos_token_id"] == byte_level.eos_token_id
    assert "quantization_config" not in json.loads((converted / "config.json").read_text())


@pytest.mark.parametrize(("pre", "tokens"), [("smollm", ["a", "\n\n", "1"]), ("gpt-2", ["a", "\n", "\n", "1"])])
def test_digits_are_split_off_first_where_the_gguf_says_so(
    tied_llama: "LlamaForCausalLM", byte_level: PreTrainedTokenizerFast, tmp_path: Path, pre: str, tokens: list[str]
) -> None:
    """The second newline may join the first one only where the digit does not claim it."""
    path = tmp_path / f"{pre}.gguf"
    write_gguf(path, tied_llama, byte_level, pre=pre)
    folder = convert_once(GgufSource(path), tmp_path / "cache").folder
    backend = ChatTokenizer.from_folder(folder)._backend
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("a\n\n1")]
    assert pieces == [token.replace("\n", "Ċ") for token in tokens]


def test_a_second_start_converts_nothing(gguf_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = convert_once(GgufSource(gguf_path), tmp_path)
    assert first.source_sha256 == sha256_of(gguf_path)
    monkeypatch.setattr(conversion, "_build", lambda *_: pytest.fail("converted again"))
    assert convert_once(GgufSource(gguf_path), tmp_path) == first


def test_a_damaged_conversion_is_made_anew(gguf_path: Path, tmp_path: Path) -> None:
    folder = convert_once(GgufSource(gguf_path), tmp_path).folder
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(b"cut off")
    assert convert_once(GgufSource(gguf_path), tmp_path).folder == folder
    assert weights.stat().st_size == size


def test_a_failed_conversion_leaves_nothing_behind_but_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF but not really")
    with pytest.raises(ModelLoadError, match=r"broken\.gguf cannot be converted"):
        convert_once(GgufSource(path), tmp_path / "cache")
    assert [entry.suffix for entry in (tmp_path / "cache" / "base_models").iterdir()] == [".lock"]


def test_a_wrong_digest_is_refused_before_anything_is_read(gguf_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="expected 0000"):
        convert_once(GgufSource(gguf_path, expected_sha256="0000", package="x"), tmp_path)
    assert not any(tmp_path.iterdir())


def test_too_little_space_is_said_before_it_is_used_up(
    gguf_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ModelLoadError, match=r"MiB may be needed, 0 MiB are free.*LORA_MIXER_CACHE"):
        convert_once(GgufSource(gguf_path), tmp_path)


def test_progress_is_plain_lines_when_there_is_no_terminal(
    gguf_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="server"):
        convert_once(GgufSource(gguf_path), tmp_path)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "converting tiny.F32.gguf: unpacking weights (1 of 3)"
    assert len(lines) == 3
    assert "it/s" not in capfd.readouterr().err


def test_a_killed_conversion_leaves_nothing_half_done_and_the_next_one_cleans_up(
    gguf_path: Path, tmp_path: Path
) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom server.model import conversion\n"
        "from server.model.sources import GgufSource\n"
        "def stall(path, folder):\n"
        "    (folder / 'model.safetensors').write_bytes(b'half')\n"
        "    print('stalled', flush=True)\n    time.sleep(60)\n"
        "conversion._convert = stall\n"
        "conversion.convert_once(GgufSource(Path(sys.argv[1])), Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", script, str(gguf_path), str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"stalled\n"
        process.send_signal(signal.SIGKILL)
    leftovers = [path for path in (tmp_path / "base_models").iterdir() if path.is_dir()]
    assert [path.name[0] for path in leftovers] == ["."]
    folder = convert_once(GgufSource(gguf_path), tmp_path).folder
    assert [path for path in (tmp_path / "base_models").iterdir() if path.is_dir()] == [folder]


def test_of_concurrent_starts_one_converts_and_the_others_wait(
    gguf_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads stand in for processes: the lock belongs to an open file, not to a process."""
    build, builds = conversion._build, []

    def slow(source: GgufSource, digest: str, folder: Path) -> None:
        builds.append(folder)
        time.sleep(0.2)
        build(source, digest, folder)

    monkeypatch.setattr(conversion, "_build", slow)
    with ThreadPoolExecutor(3) as starts:
        running = [starts.submit(convert_once, GgufSource(gguf_path), tmp_path) for _ in range(3)]
        folders = {start.result().folder for start in running}
    assert builds == list(folders)


def test_the_command_prints_the_folder_and_refuses_what_needs_no_conversion(
    gguf_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORA_MIXER_CACHE", str(tmp_path / "cache"))
    assert conversion.main([str(gguf_path)]) == 0
    assert (Path(capsys.readouterr().out.strip()) / RECORD_NAME).exists()
    with pytest.raises(SystemExit):
        conversion.main([str(tmp_path)])
    assert "nothing to convert" in capsys.readouterr().err


def test_the_demo_conversion_holds_float32_that_bfloat16_could_not(
    demo_base: "Callable[[str], LoadedModel]",
) -> None:
    name = "model.embed_tokens.weight"
    exact = demo_base("float32").model.get_parameter(name)
    rounded = demo_base("bfloat16").model.get_parameter(name)
    assert torch.equal(exact.bfloat16(), rounded)
    assert not torch.equal(exact, rounded.float())
