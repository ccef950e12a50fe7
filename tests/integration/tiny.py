"""A whole server around a tiny random model: starts in seconds, answers in milliseconds, in this process or its own."""

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import uvicorn
import yaml

from tests.adapters.folders import BASE, edit_config
from tests.adapters.harness import save_router
from tests.integration.conftest import RunningServer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

REPOSITORY = Path(__file__).parents[2]
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}:{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
TARGETS = (["q_proj", "v_proj"], ["q_proj"], ["up_proj", "down_proj"], ["o_proj"])


def make_tiny_root(
    root: Path,
    tiny_llama: "Callable[..., LlamaForCausalLM]",
    make_adapter: Callable[..., Path],
    *,
    num_adapters: int,
    num_configured: int,
    can_calibrate: bool = False,
    **settings: Any,
) -> dict[str, str]:
    """A configuration in `root`: model, adapters a0, a1, ... below sources/, the first ones configured and routed.

    Digest of each adapter by its name. `can_calibrate`: with a chat template, and a router that has statistics.
    """
    from server.adapters.weights import load_adapter
    from server.routing.attach import attach_routing, find_projections
    from server.routing.router import save_artefact
    from tests.adapters.calibrating import router_with_statistics

    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(root / "model")
    _save_tokenizer(root / "model", CHAT_TEMPLATE if can_calibrate else None)
    digests = {}
    for index in range(num_adapters):
        folder = root / "sources" / f"a{index}"
        edit_config(make_adapter(folder, model, 2 + index % 3, TARGETS[index % len(TARGETS)], seed=index),
                    {"base_model_name_or_path": BASE})  # fmt: skip
        projections = find_projections(model)
        digests[f"a{index}"] = load_adapter(folder, "a", projections=projections, base_model_name=BASE).digest
    known = [(name, digest) for name, digest in digests.items() if int(name[1:]) < num_configured]
    if known and can_calibrate:
        save_artefact(router_with_statistics(attach_routing(model, num_slots=2), known), root / "router")
    elif known:
        save_router(root / "router", attach_routing(model, num_slots=2), known)
    config = {
        "base_model": {"name": BASE, "source": "./model", "dtype": "float32"},
        "router": "router" if known else None,
        "adapters": [{"name": name, "source": f"./sources/{name}"} for name, _ in known],
        "server": {"kv_cache_mib": 16, "max_model_len": 256, "log_level": "warning", "num_threads": 1, **settings},
    }
    (root / "adapters.yaml").write_text(yaml.safe_dump(config))
    return digests


@contextlib.contextmanager
def serve_here(root: Path) -> Iterator[RunningServer]:
    """The server of `root` in this process, for looking inside."""
    from server.app import create_app
    from server.assembly import build_services
    from server.config import Secrets, load_config

    services = build_services(load_config(root / "adapters.yaml"), Secrets())
    server = uvicorn.Server(uvicorn.Config(create_app(services), port=0, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, name="uvicorn")
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        _wait_until_ready(url)
        yield RunningServer(url, services, root)
    finally:
        server.should_exit = True
        thread.join(timeout=60)
    assert not thread.is_alive(), "the server did not stop"


@contextlib.contextmanager
def serve_apart(root: Path, environment: dict[str, str]) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """The server of `root` as its command starts it: its address and process, which is killed at the end."""
    command = [
        sys.executable,
        "-m",
        "server",
        "serve",
        "--config",
        "adapters.yaml",
        "--port",
        "0",
        "--log-level",
        "info",
    ]
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment}
    log = root / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=root, env=variables, stdout=output, stderr=output, text=True)
    try:
        deadline_s = time.monotonic() + 120
        while (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.05)
        _wait_until_ready(found[0])
        yield found[0], process
    finally:
        process.kill()
        process.wait()


def _wait_until_ready(url: str) -> None:
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError("the server was not ready within 60 s")


def _save_tokenizer(folder: Path, chat_template: str | None) -> None:
    """One token per byte, and three control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(["<s>", "</s>", "<pad>", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
