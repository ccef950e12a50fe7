"""What the router costs as the pool grows, with and without shortlists, in steps of one process side by side.

    python -m benchmarks.pool_cost                # about 4 minutes; prints two tables
    python -m benchmarks.pool_cost --threads 2    # wall clock on an otherwise idle machine

No adapter is registered, so a step costs what the base model's does and its gates. One thread's own CPU time counts
unless --threads says otherwise: other processes then hardly show. The second table is about the demo's router: how
long its shortlists are, with its own rows and with further rows up to a pool of 256, and whether they held the top k.
"""

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.environments import ROOT
from server.backend import Backend, build_backend
from server.config import cache_folder, load_config
from server.engine.layout import lay_out
from server.engine.sequence import SamplingParams, ScheduledBatch, ScheduledSequence
from server.engine.sequence import Sequence as EngineSequence
from server.model.loader import load_base_model
from server.native.routers import NativeRouter
from server.routing.attach import RoutedModel, attach_routing
from server.routing.policy import BASE_PLAN, GatePlan, routed_plan
from server.routing.router import ArtefactAdapter, RouterArtefact, load_artefact

POOLS = (8, 64, 256)
CONTEXT = 64
LOADS = (("decode 1", 1, 1, 60), ("decode 8", 8, 1, 50), ("decode 32", 32, 1, 20), ("prefill 256", 1, 256, 8))
"""(name, sequences, tokens of each, repetitions); decoding goes on from a context of 64 tokens."""
NUM_STATES = 500
BLOCKS_PER_SEQUENCE = 24


def main(argv: Sequence[str] | None = None) -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pool_cost", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of a step (default: 1, CPU time)")
    arguments = parser.parse_args(argv)
    demo = load_config(ROOT / "adapters.yaml")
    loaded = load_base_model(demo.base_model, device="cpu", cache_folder=cache_folder(), root=ROOT)
    routed = attach_routing(loaded.model, num_slots=max(POOLS) + 1)
    settings = demo.server.model_copy(update={"kv_cache_mib": 512, "num_threads": arguments.threads})
    backend = build_backend(routed, settings, loaded.max_model_len)
    if backend.name != "native":
        print("pool_cost: this is about the native backend, which cannot run here", file=sys.stderr)
        return 1
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tokens = loaded.tokenizer.encode(text, add_special_tokens=False)
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    print_costs(backend, plans_of(routed, backend), tokens, clock)
    assert demo.router_folder is not None, "the demo has a router"
    print_shortlists(attention_inputs(backend, routed, tokens), load_artefact(demo.router_folder))
    return 0


def plans_of(routed: RoutedModel, backend: Backend) -> dict[str, GatePlan]:
    """Plans by their column: pools of random rows, each with the router that looks at all and with shortlists."""
    generator = torch.Generator().manual_seed(0)
    shape = max(POOLS), routed.hidden_size
    rows = {
        f"layer.{layer}": torch.randn(shape, generator=generator) / routed.hidden_size**0.5
        for layer in range(routed.num_layers)
    }
    adapters = tuple(ArtefactAdapter(f"random-{index}", f"d{index}") for index in range(max(POOLS)))
    native: Any = getattr(backend.graph, "_native")  # noqa: B009 - only a profile looks inside
    plans = {"base": BASE_PLAN}
    for size in POOLS:
        slots = {f"d{index}": index + 1 for index in range(size)}
        kept = {key: values[:size] for key, values in rows.items()}
        artefact = RouterArtefact("", shape[1], routed.num_layers, "layer", 2, 1.0, adapters[:size], kept)
        for start in (None, 32):
            if start is not None and size < start:
                continue
            routed.routers.pack = functools.partial(
                NativeRouter, routed=routed, native=native, shortlist_from=start
            )  # fmt: skip
            id_ = len(plans)
            routed.routers.publish(routed.routers.stage(id_, artefact, slots))
            digests = {slot: digest for digest, slot in slots.items()}
            plan = routed_plan(digests, digests, id_, artefact.settings, artefact.top_k)
            plans[f"{size}{'' if start is None else ', shortlist'}"] = plan
    return plans


def print_costs(backend: Backend, plans: dict[str, GatePlan], tokens: list[int], clock: Any) -> None:
    """Fastest step of each load and plan, as a multiple of the base model's."""
    print(f"| step | base, ms | {' | '.join(name for name in plans if name != 'base')} |")
    print("| --- " * (1 + len(plans)) + "|")
    for name, num_sequences, count, repetitions in LOADS:
        context = 0 if count > 1 else CONTEXT
        batches = {key: sequences_of(plan, num_sequences, tokens) for key, plan in plans.items()}
        for batch in batches.values():
            for sequence in batch if context else []:
                timed_step(backend, [sequence], context, clock)
                sequence.num_computed_tokens = context
        best = dict.fromkeys(plans, float("inf"))
        for _ in range(repetitions):
            for key, batch in batches.items():
                best[key] = min(best[key], timed_step(backend, batch, count, clock))
        ratios = [f"{best[key] / best['base']:.3f}" for key in plans if key != "base"]
        print(f"| {name} | {1e3 * best['base']:.1f} | {' | '.join(ratios)} |", flush=True)


def sequences_of(plan: GatePlan, count: int, tokens: list[int]) -> list[EngineSequence]:
    """Different texts, each with cache blocks of its own."""
    made = []
    for index in range(count):
        prompt = tokens[7 * index : 7 * index + CONTEXT + 256]
        sequence = EngineSequence(id=index, prompt_token_ids=prompt, params=SamplingParams(), plan=plan)
        first = 1 + BLOCKS_PER_SEQUENCE * index
        sequence.block_table = list(range(first, first + BLOCKS_PER_SEQUENCE))
        made.append(sequence)
    return made


def timed_step(backend: Backend, sequences: list[EngineSequence], count: int, clock: Any) -> float:
    """Seconds of one step, which leaves the sequences where they were."""
    layout = lay_out(ScheduledBatch(tuple(ScheduledSequence(sequence, count) for sequence in sequences)))
    last = [start + count - 1 for start in layout.starts]
    start_s = clock()
    backend.graph.forward(layout, last, collect_layers=False)
    return float(clock() - start_s)


def attention_inputs(backend: Backend, routed: RoutedModel, tokens: list[int]) -> Tensor:
    """(layers, NUM_STATES, hidden) of a text, in chunks of the cache that one sequence has."""
    graph: Any = backend.graph
    states = torch.empty(routed.num_layers, NUM_STATES, routed.hidden_size)
    for start in range(0, NUM_STATES, 250):
        sequence = sequences_of(BASE_PLAN, 1, tokens[start:])[0]
        layout = lay_out(ScheduledBatch((ScheduledSequence(sequence, 250),)))
        inputs = torch.empty(routed.num_layers, 250, routed.hidden_size)
        graph.forward(layout, [249], collect_layers=False, inputs=inputs)
        states[:, start : start + 250] = inputs
    return states


def print_shortlists(states: Tensor, demo: RouterArtefact) -> None:
    """Lengths of shortlists with the bounds of `src/shortlist.h` in float64, and the share of the top k in them."""
    print("\n| rows | mean length | 99 % | longest | top k in it |")
    print("| --- " * 5 + "|")
    generator = torch.Generator().manual_seed(0)

    def copies(rows: Tensor, noise: float) -> Tensor:
        count = max(POOLS) - len(rows)
        source = rows[torch.arange(count) % len(rows)] if noise < 1 else torch.zeros(count, rows.shape[1])
        scale = rows.norm(dim=1).mean() / rows.shape[1] ** 0.5
        return torch.cat([rows, source + noise * scale * torch.randn(source.shape, generator=generator)])

    kinds = {f"the demo's {len(demo.adapters)}": None, "and random ones to 256": 1.0}
    for name, noise in {**kinds, "and copies with 30 % noise": 0.3, "and copies with 3 % noise": 0.03}.items():
        lengths, hits = [], []
        for key, own in demo.rows.items():
            rows = (own if noise is None else copies(own, noise)).double()
            x = states[int(key.removeprefix("layer."))].double()
            kept = shortlist(x, rows, demo.top_k)
            hits.append(kept.gather(1, (x @ rows.T).topk(demo.top_k).indices).float())
            lengths.append(kept.sum(1).float())
        length = torch.cat(lengths)
        figures = length.mean(), length.quantile(0.99), length.max()
        print(f"| {name} | {figures[0]:.1f} | {figures[1]:.0f} | {figures[2]:.0f} | {torch.cat(hits).mean():.4f} |")


def shortlist(x: Tensor, rows: Tensor, top_k: int) -> Tensor:
    """(T, E) bool: which of the rows (E, d) can be among the top k of the inputs (T, d), by bfloat16 prototypes."""
    rounded = rows.bfloat16().double()
    rounding = rows.shape[1] * 2.0**-23 + 2.0**-21
    slack = 1.001 * ((rows - rounded).norm(dim=1) + rounding * rows.norm(dim=1))
    margin = slack * 1.001 * x.norm(dim=1, keepdim=True)
    scores = x @ rounded.T
    kept: Tensor = (scores + margin) >= (scores - margin).topk(top_k).values[:, -1:]
    return kept


if __name__ == "__main__":
    sys.exit(main())
