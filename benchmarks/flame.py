"""A flame picture of the engine under load: py-spy around `lora-mixer bench`, into benchmarks/figures/flame.svg."""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.environments import ROOT

RESULT = ROOT / "benchmarks" / "figures" / "flame.svg"


def main(argv: Sequence[str] | None = None) -> int:
    """Record, and return py-spy's exit status; 2 if it is not installed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flame", description=__doc__)
    parser.add_argument("--policy", choices=("base", "pinned", "routed"), default="routed")
    parser.add_argument("--concurrency", default="32", metavar="N")
    parser.add_argument("--new-tokens", default="128", metavar="N")
    parser.add_argument("--native", action="store_true", help="C++ frames too; slower, and needs symbols to say much")
    parser.add_argument("--out", type=Path, default=RESULT, metavar="FILE")
    arguments = parser.parse_args(argv)
    spy = shutil.which("py-spy", path=f"{Path(sys.executable).parent}") or shutil.which("py-spy")
    if spy is None:
        print("flame: py-spy is not installed; run `make test` once, or pip install -e '.[bench]'", file=sys.stderr)
        return 2
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    status = subprocess.run(command(spy, arguments), cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode
    if status == 0:  # the picture's title is the command line
        text = arguments.out.read_text(encoding="utf-8")
        arguments.out.write_text(text.replace(f"{ROOT}/", "").replace(str(Path.home()), "~"), encoding="utf-8")
    return status


def command(spy: str, arguments: argparse.Namespace) -> list[str]:
    """py-spy's command line; it starts the benchmark itself, so that no right to trace others is needed."""
    record = [spy, "record", "--rate", "200", "--threads", "--format", "flamegraph", "--output", str(arguments.out)]
    native = ["--native"] if arguments.native else []
    bench = [sys.executable, "-m", "server", "bench", "--policies", arguments.policy, "--repeat", "1"]
    load = ["--concurrency", arguments.concurrency, "--new-tokens", arguments.new_tokens]
    return [*record, *native, "--", *bench, *load]


if __name__ == "__main__":
    sys.exit(main())
