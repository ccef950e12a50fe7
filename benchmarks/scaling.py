"""How speed scales: curves over concurrency, context, adapters, rank and k, and what a step is made of.

    python -m benchmarks.scaling            # about 15 minutes, writes benchmarks/results/scaling.json
    python -m benchmarks.scaling --quick    # a few points of every curve, few tokens: shows that everything runs

The engine runs in this process. Curves over adapters, rank and k use random adapters with a random router.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.loads import Loader
from benchmarks.peers.environments import ROOT
from benchmarks.results_file import write_json
from benchmarks.server_process import serving
from benchmarks.step_cost import EngineTimer, step_cost
from benchmarks.synthetic import projection_shapes, write_adapter, write_router
from server.api.services import Services
from server.bench.facts import OtherLoad
from server.bench.in_process import in_process
from server.bench.over_http import HttpTarget
from server.config import AdapterSpec, ServerConfig, cache_folder, load_config
from server.errors import LoraMixerError
from server.machine import machine_facts, version_facts
from server.model.loader import base_model_folder
from server.routing.router import load_artefact

RESULT = ROOT / "benchmarks" / "results" / "scaling.json"
CONTEXT_CONCURRENCY = 4
"""Sequences in the context curve: four of 4,096 tokens fit the default cache."""
ADAPTER_CONCURRENCY = 8


@dataclass(frozen=True)
class Scale:
    """The points of every curve."""

    concurrency: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128)
    context: Sequence[int] = (64, 256, 1024, 4096)
    adapters: Sequence[int] = (1, 2, 4, 8, 16, 64, 256)
    top_k: Sequence[int] = (1, 2, 3, 4)
    rank: Sequence[int] = (4, 8, 16, 32, 64)
    split: Sequence[int] = (1, 8, 32)
    """Concurrency of the step costs, and of 64 adapters against 8."""
    new_tokens: int = 48
    repeat: int = 2
    """Times each point is measured; the median counts."""


QUICK = Scale((1, 4), (64, 256), (1, 8, 64), (1, 2), (4, 16), (1, 4), new_tokens=6, repeat=1)


@dataclass
class Scaling:
    """Measures and collects: `curves` maps a curve's name to its points."""

    scale: Scale
    work: Path
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    step_costs: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._demo = load_config(ROOT / "adapters.yaml")
        self._model = base_model_folder(self._demo.base_model, cache_folder=cache_folder(), root=ROOT)
        self._shapes = projection_shapes(self._model)

    async def run(self) -> None:
        """Every curve, in an order that loads as few models as possible."""
        await self._demo_curves()
        for num_adapters in self.scale.adapters:
            await self._synthetic(num_adapters, 16)
        for rank in self.scale.rank:
            if rank != 16:
                await self._synthetic(8, rank)

    async def _demo_curves(self) -> None:
        """Concurrency, context and step costs with the demo's adapters and router."""
        settings = self._demo.server.model_copy(update={"max_num_seqs": max(64, *self.scale.concurrency)})
        timer = EngineTimer()
        async with in_process(self._demo.model_copy(update={"server": settings}), timer.attach) as (target, _):
            loader = Loader(target)
            for concurrency in self.scale.concurrency:
                for policy in ("base", "routed"):
                    await self._point(loader, "concurrency", concurrency, policy, concurrency)
            for context in self.scale.context:
                for policy in ("base", "routed"):
                    await self._point(loader, "context", context, policy, CONTEXT_CONCURRENCY, context)
            for concurrency in self.scale.split:
                note(f"parts of a step, concurrency {concurrency}")
                cost = await step_cost(loader, timer, concurrency, self.scale.new_tokens)
                self.step_costs.append(cost)
        async with serving() as server, await HttpTarget.connect(server.url, None) as over_http:
            for cost in self.step_costs:
                concurrency = cost["concurrency"]
                rate = await Loader(over_http).rate(
                    "routed", concurrency, prompt_tokens=64, new_tokens=self.scale.new_tokens
                )
                cost["parts_ms"]["http"] = round(1e3 * concurrency / rate - cost["step_ms"], 3)

    async def _synthetic(self, num_adapters: int, rank: int) -> None:
        """One engine with this many random adapters of one rank: a point of the curves it belongs to."""
        services: list[Services] = []
        async with self._engine(num_adapters, rank, services) as loader:
            if rank == 16:
                await self._point(loader, "adapters", num_adapters, "routed", ADAPTER_CONCURRENCY)
            if num_adapters in (8, 64) and rank == 16:
                for concurrency in self.scale.split:
                    await self._point(loader, f"{num_adapters} adapters", concurrency, "routed", concurrency)
            if num_adapters == 8:
                await self._point(loader, "rank", rank, "routed", ADAPTER_CONCURRENCY)
            if num_adapters == 8 and rank == 16:
                for top_k in self.scale.top_k:
                    await asyncio.to_thread(self._install_router, services[0], top_k)
                    await self._point(loader, "top_k", top_k, "routed", ADAPTER_CONCURRENCY)

    @asynccontextmanager
    async def _engine(self, num_adapters: int, rank: int, services: list[Services]) -> AsyncIterator[Loader]:
        note(f"loading {num_adapters} random adapters of rank {rank}")
        config = self._config(num_adapters, rank)
        started_s = time.perf_counter()

        def install(parts: Services) -> None:
            services.append(parts)
            self._install_router(parts, min(2, num_adapters))

        async with in_process(config, install) as (target, digests):
            if len(digests) != num_adapters:
                raise LoraMixerError(f"{len(digests)} of {num_adapters} random adapters are ready")
            note(f"ready after {time.perf_counter() - started_s:.0f} s")
            yield Loader(target)

    def _config(self, num_adapters: int, rank: int) -> ServerConfig:
        base_model = self._demo.base_model
        specs = []
        for index in range(num_adapters):
            folder = self.work / f"rank-{rank}" / f"random-{index}"
            if not folder.exists():
                write_adapter(folder, self._shapes, base_model=base_model.name, rank=rank, seed=index)
            specs.append(AdapterSpec(name=folder.name, source=str(folder)))
        # The default of 64 where it suffices: gates are as wide as the slots.
        settings = self._demo.server.model_copy(update={"max_adapters": max(64, num_adapters)})
        return ServerConfig(base_model=base_model, adapters=tuple(specs), server=settings, root=self.work)

    def _install_router(self, services: Services, top_k: int) -> None:
        assert self._demo.router_folder is not None, "the demo has a router"
        demo = load_artefact(self._demo.router_folder)
        adapters = services.registry.list()
        folder = self.work / f"router-{len(adapters)}-{adapters[0].rank}-{top_k}"
        facts = {"base_model": demo.base_model, "hidden_size": demo.hidden_size, "num_layers": demo.num_layers}
        write_router(folder, adapters, top_k=top_k, **facts)  # type: ignore[arg-type]
        services.registry.swap_router(folder)

    async def _point(
        self, loader: Loader, curve: str, x: int, policy: str, concurrency: int, context: int = 64
    ) -> None:
        note(f"{curve} {x}: {policy}")
        others = OtherLoad()
        rates = [
            await loader.rate(
                policy,
                concurrency,
                prompt_tokens=context,
                new_tokens=self.scale.new_tokens,
                is_cached=context > 64,
            )
            for _ in range(self.scale.repeat)
        ]
        point = {
            "x": x,
            "policy": policy,
            "concurrency": concurrency,
            "tok_s": round(statistics.median(rates), 2),
            "tok_s_all": [round(rate, 2) for rate in rates],
            "other_cores": others.cores(),
        }
        self.curves.setdefault(curve, []).append(point)


def adapters_ratios(curves: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """64 registered adapters over 8, per concurrency."""
    few = {point["x"]: point["tok_s"] for point in curves.get("8 adapters", [])}
    many = {point["x"]: point["tok_s"] for point in curves.get("64 adapters", [])}
    return [
        {"concurrency": x, "ratio": round(many[x] / few[x], 3), "target": 0.8, "met": many[x] / few[x] >= 0.8}
        for x in few
        if x in many
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure everything and write the result; 1 if something could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few points and tokens; the figures mean nothing")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"default: {RESULT.relative_to(ROOT)}; not with --quick"
    )
    arguments = parser.parse_args(argv)
    if arguments.quick and arguments.out is None:
        parser.error("--quick needs --out: its figures must not replace measured ones")
    scale = QUICK if arguments.quick else Scale()
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lora-mixer-scaling-") as work:
        try:
            scaling = Scaling(scale, Path(work))
            asyncio.run(scaling.run())
        except LoraMixerError as error:
            print(f"scaling: {error.message}", file=sys.stderr)
            return 1
    result = {
        "format_version": 1,
        "machine": machine_facts(),
        "versions": version_facts(),
        "command": "python -m benchmarks.scaling" + (" --quick" if arguments.quick else ""),
        "new_tokens": scale.new_tokens,
        "repeat": scale.repeat,
        "duration_s": round(time.monotonic() - started_s),
        "curves": scaling.curves,
        "many_adapters": adapters_ratios(scaling.curves),
        "step_costs": scaling.step_costs,
    }
    write_json(arguments.out or RESULT, result)
    return 0


def note(text: str) -> None:
    """Tell people what is about to run."""
    print(f"scaling: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
