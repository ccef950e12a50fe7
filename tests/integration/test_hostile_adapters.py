"""A corpus of hostile adapters over HTTP: each is refused by name, in bounded time and memory, and harms nobody."""

import json
import os
import resource
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch

from tests.adapters.folders import CONFIG, WEIGHTS, copied, edit_config, edit_tensors, raw_tensor_file
from tests.integration.conftest import RunningServer
from tests.integration.tiny import make_tiny_root, serve_here

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

MAX_SECONDS = 10.0
"""For one refusal; they take milliseconds, but test machines pause."""
MAX_GROWTH_MIB = 48
"""Of the peak resident memory over one refusal: well below every bomb of the corpus."""

Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BOMB = "(" * 20 + "a+" + ")+" * 20 + "$"


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def config(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: edit_config(folder, changes)


def filled(value: float) -> Callable[[Path], object]:
    return lambda folder: edit_tensors(folder, lambda tensors: {**tensors, Q0: torch.full_like(tensors[Q0], value)})


def typed(dtype: torch.dtype) -> Callable[[Path], object]:
    return lambda folder: edit_tensors(folder, lambda tensors: {**tensors, Q0: tensors[Q0].to(dtype)})


def linked(name: str, target: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return change


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/pwned'\ntR.")


def pickle_in_disguise(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/pwned'\ntR.")


def sparse(name: str, size_bytes: int, start: bytes = b"") -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.write(start)
            file.truncate(size_bytes)

    return change


def pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def doubled_config_key(folder: Path) -> None:
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.rstrip().removesuffix("}") + ', "r": 999}')


def cut(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 7)


def many_tensors(folder: Path) -> None:
    header = {f"x{index}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for index in range(50_000)}
    (folder / WEIGHTS).write_bytes(raw_tensor_file(header))


CORPUS: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "a pickle": (pickled, {"pickle_file"}),
    "a pickle named safetensors": (pickle_in_disguise, {"damaged_weights"}),
    "header cut": (write(WEIGHTS, raw_tensor_file({"a": F32})[:20]), {"damaged_weights"}),
    "data cut": (cut, {"damaged_weights"}),
    "tensors overlap": (write(WEIGHTS, raw_tensor_file({"a": F32, "b": F32}, bytes(8))), {"damaged_weights"}),
    "header of 100 MB": (sparse(WEIGHTS, 101_000_000, struct.pack("<Q", 100_000_000)), {"damaged_weights"}),
    "header of 2^63 bytes": (write(WEIGHTS, struct.pack("<Q", 2**63)), {"damaged_weights"}),
    "fifty thousand tensors": (many_tensors, {"unexpected_tensor", "missing_tensor"}),
    "rank of a million": (config(r=10**6), {"rank_too_large", "rank_mismatch"}),
    "rank of a million by pattern": (config(rank_pattern={"q_proj": 10**6}), {"rank_too_large", "rank_mismatch"}),
    "shape of a million ranks": (
        write(WEIGHTS, raw_tensor_file({Q0: {"dtype": "F32", "shape": [10**6, 64], "data_offsets": [0, 8]}}, bytes(8))),
        {"damaged_weights"},
    ),
    "64-bit floats": (typed(torch.float64), {"unsupported_dtype"}),
    "integers": (typed(torch.int8), {"unsupported_dtype"}),
    "not a number": (filled(torch.nan), {"non_finite_weights"}),
    "infinite": (filled(-torch.inf), {"non_finite_weights"}),
    "absurd": (filled(3e38), {"absurd_weights"}),
    "weights linked to a system file": (linked(WEIGHTS, "/etc/passwd"), {"symlink_escape"}),
    "config linked to a neighbour": (linked(CONFIG, "../a1/adapter_config.json"), {"symlink_escape"}),
    "linked to itself": (linked(WEIGHTS, WEIGHTS), {"missing_file"}),
    "weights from a pipe": (pipe, {"not_a_file"}),
    "regex bomb in target_modules": (config(target_modules=BOMB), {"no_target_modules"}),
    "backreferences": (config(target_modules=r"(.*)(.*)\1\2"), {"unsupported_pattern"}),
    "too many steps": (config(rank_pattern={f"({'.*' * 40}){{30}}{n}": 2 for n in range(50)}), {"pattern_too_complex"}),
    "pattern of a megabyte": (config(target_modules="a|" * 400_000), {"unsupported_pattern"}),
    "auto_map": (config(auto_map={"AutoModel": "evil--code.Model"}), {"unknown_config_field"}),
    "layer_replication": (config(layer_replication=[[0, 10**9]]), {"layer_replication"}),
    "megatron_core module": (config(megatron_config={"a": 1}, megatron_core="os"), {"megatron"}),
    "a config key twice": (doubled_config_key, {"damaged_config"}),
    "a tensor name twice": (write(WEIGHTS, raw_tensor_file(b'{"a": {}, "a": {}}')), {"damaged_weights"}),
    "nested without end": (write(CONFIG, b'{"a":' * 100_000), {"damaged_config"}),
    "empty config": (write(CONFIG, b""), {"damaged_config"}),
    "empty weights": (write(WEIGHTS, b""), {"damaged_weights"}),
    "config of 10 GB": (sparse(CONFIG, 10 * 2**30, b"{"), {"damaged_config"}),
    "weights of 1 TB": (sparse(WEIGHTS, 2**40), {"file_too_large"}),
    "another base of equal shapes": (config(base_model_name_or_path="test/tiny2"), {"base_model_mismatch"}),
    "terminal controls in names": (config(**{"\x1b[2J\u202egnp.exe": 1}), {"unknown_config_field"}),
}


@pytest.fixture(scope="module")
def server(
    tiny_llama: "Callable[..., LlamaForCausalLM]",
    make_adapter: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RunningServer]:
    root = tmp_path_factory.mktemp("hostile")
    make_tiny_root(root, tiny_llama, make_adapter, num_adapters=2, num_configured=2)
    with serve_here(root) as running:
        yield running


def answer_of(server: RunningServer) -> str:
    body = {"model": "a0", "prompt": "hello", "max_tokens": 8, "ignore_eos": True, "temperature": 0}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


@pytest.mark.parametrize("fault", CORPUS)
def test_hostile_adapters_are_refused_and_the_server_goes_on(fault: str, server: RunningServer) -> None:
    change, codes = CORPUS[fault]
    before = answer_of(server)
    folder = copied(server.root / "sources" / "a0", server.root / "sources" / "evil")
    try:
        change(folder)
        peak_kib, start_s = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        answer = server.post("/v1/adapters", {"name": "evil", "source": "sources/evil", "wait": True})
        seconds = time.monotonic() - start_s
        growth_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib) / 1024
    finally:
        for path in folder.iterdir():
            path.unlink()
    assert answer.status_code == 422, answer.text
    found = {reason["code"] for reason in answer.json()["error"]["reasons"]}
    assert found & codes, found
    assert json.loads(answer.text)["error"]["message"].isprintable()
    assert len(answer.content) < 20_000
    assert seconds < MAX_SECONDS
    assert growth_mib < MAX_GROWTH_MIB
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert answer_of(server) == before
    assert "evil" not in [model["id"] for model in server.get("/v1/models").json()["data"]]


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_make_backtracking_explode_match_in_no_time(field: str, server: RunningServer) -> None:
    """They match nothing here, so the adapter is sound, and takes no longer than any other."""
    folder = edit_config(copied(server.root / "sources" / "a0", server.root / "sources" / "slow"), {
        field: {BOMB: 2, "(.*)*(.*)*(.*)*zz": 2, "([a-z_.]+)+\\d$": 2}})  # fmt: skip
    start_s = time.monotonic()
    answer = server.post("/v1/adapters", {"name": "slow", "source": "sources/slow", "wait": True})
    assert time.monotonic() - start_s < MAX_SECONDS
    assert answer.status_code == 201, answer.text
    httpx.delete(f"{server.url}/v1/adapters/slow")
    assert server.services.registry.wait_retired("slow", 30)
    for path in folder.iterdir():
        path.unlink()
