"""Converts a GGUF file to a model folder (safetensors, config, tokenizer) in the cache, once.

Weights are stored as float32. Block-quantised values are a 4- or 8-bit integer times a float16 scale, which bfloat16's
8 bits of precision cannot hold (79 % of SmolLM2's Q4_1 weights are not representable), so only float32 lets both dtypes
load exactly what the GGUF says.

`python -m server.model.conversion SOURCE` fills the cache ahead of the first start, for example in an image build.
"""

import argparse
import copy
import io
import json
import logging
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from server.config import BaseModelConfig, cache_folder
from server.errors import ModelLoadError
from server.model.progress import Stages, on_terminal, quiet_transformers
from server.model.sources import GgufSource, locate, verified_sha256

logger = logging.getLogger(__name__)

CONVERTER_VERSION = 1
"""Raise it when the same GGUF file should give other files; every cached conversion is then made anew."""

RECORD_NAME = "conversion.json"
"""Written last; lists every file with its size, so a folder with a fitting record is complete."""

_DIGITS_FIRST = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
"""Values of `tokenizer.ggml.pre` (llama.cpp's names) that split off every digit before GPT-2's own pattern applies.
transformers' GGUF reader ignores the key; without the split, white space before digits is tokenised wrongly."""

_BYTES_PER_BLOCK_WEIGHT = 8
"""Disk needed per byte of GGUF, at most: 4-bit weights (half a byte) become 4-byte floats."""


_READER_ERRORS = (
    *(ValueError, LookupError, RuntimeError, TypeError, AttributeError, ArithmeticError, ImportError),
    struct.error,
)
"""What the GGUF readers raise on files that are damaged or that they do not know."""


@dataclass(frozen=True)
class Conversion:
    """A converted model folder and the sha256 of the GGUF file it was made from."""

    folder: Path
    source_sha256: str


def convert_once(source: GgufSource, cache: Path) -> Conversion:
    """Return the folder converted from `source`, converting only if the cache does not hold it yet.

    Safe under concurrent starts (one converts, the others wait) and under kill -9 (the folder appears under its name
    only when it is complete). Raises ModelLoadError.
    """
    digest = verified_sha256(source)
    folder = cache / "base_models" / f"{source.path.stem}-{digest[:16]}-v{CONVERTER_VERSION}"
    if not _is_complete(folder):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _exclusive(folder):
                if not _is_complete(folder):
                    _build(source, digest, folder)
        except OSError as error:
            raise ModelLoadError(
                f"cannot convert {source.path} into {folder}: {error}. Free space there, or point LORA_MIXER_CACHE at "
                "a writable folder."
            ) from error
    return Conversion(folder, digest)


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock of one conversion; the system drops it when its process dies."""
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        logger.info("waiting for another process that converts into %s", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _is_complete(folder: Path) -> bool:
    try:
        files = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _build(source: GgufSource, digest: str, folder: Path) -> None:
    """Convert beside `folder`, then rename. The caller holds the lock, so leftovers belong to dead processes."""
    for leftover in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    needed = source.path.stat().st_size * _BYTES_PER_BLOCK_WEIGHT
    if (free := shutil.disk_usage(folder.parent).free) < needed:
        raise OSError(f"{needed >> 20} MiB may be needed, {free >> 20} MiB are free")
    if source.package is not None and source.expected_sha256 is None:
        logger.warning("package %s is not one we know; its weights have sha256 %s", source.package, digest)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _convert(source.path, building)
        _seal(building, {"source": source.path.name, "sha256": digest, "converter_version": CONVERTER_VERSION})
        if folder.exists():
            shutil.rmtree(folder)
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _convert(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with Stages(f"converting {path.name}", 3, logger) as stages, quiet_transformers():
        try:
            stages.next("unpacking weights")
            with _no_bars_in_logs():
                model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **_unpacked())
            stages.next("writing float32 weights")
            _plain(model).save_pretrained(folder)
            del model
            stages.next("building the tokenizer")
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            _restore_pre_tokenizer(tokenizer, path)
            tokenizer.save_pretrained(folder)
        except _READER_ERRORS as error:
            raise ModelLoadError(
                f"{path} cannot be converted: {type(error).__name__}: {error}. Use the model's safetensors folder."
            ) from error


def _unpacked() -> dict[str, Any]:
    import torch
    from transformers import GgufConfig

    return {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True), "local_files_only": True}


@contextmanager
def _no_bars_in_logs() -> Iterator[None]:
    """transformers draws a bar over the GGUF tensors whatever its settings; elsewhere than on a terminal, drop it."""
    if on_terminal():
        yield
        return
    with redirect_stderr(io.StringIO()):
        yield


def _plain(model: Any) -> Any:
    """The same weights in a model that does not know it came from a quantised file; shares their memory."""
    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def _restore_pre_tokenizer(tokenizer: Any, path: Path) -> None:
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() in _DIGITS_FIRST:
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])


def _seal(folder: Path, facts: dict[str, Any]) -> None:
    """Flush every file to disk, make it readable for other users (images are built as root), and write the record."""
    sizes = {}
    for path in sorted(folder.iterdir()):
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sizes[path.name] = path.stat().st_size
    (folder / RECORD_NAME).write_text(json.dumps({**facts, "files": sizes}, indent=1), encoding="utf-8")
    folder.chmod(0o755)


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert one source into the cache and print the folder."""
    parser = argparse.ArgumentParser(prog="python -m server.model.conversion", description=main.__doc__)
    parser.add_argument("source", help="a .gguf file, or package:NAME for weights inside an installed package")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    source = locate(BaseModelConfig(source=options.source), Path.cwd())
    if not isinstance(source, GgufSource):
        parser.error(f"{options.source} is not a GGUF file, so there is nothing to convert")
    print(convert_once(source, cache_folder()).folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
