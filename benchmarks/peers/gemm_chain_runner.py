"""The bare chain of the model's linear maps: what is left of a step if everything else were free.

oneDNN-prepacked bfloat16 weights, q/k/v and gate/up fused, the output head on the decode rows; no attention, norms or
sampling, and no data dependency between the products. Weights are random: their values do not change the time.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import add_workload_flags, emit, emit_prefill, workload_from

MIN_SECONDS = 2.0
"""Steps are repeated for this long, after a quarter of it as warm-up; the median step counts."""


def main() -> None:
    """Time the chain for every batch size, and for the prefill's rows without the head; print JSON lines."""
    parser = argparse.ArgumentParser(prog="gemm_chain_runner", description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True)
    add_workload_flags(parser)
    arguments = parser.parse_args()
    workload = workload_from(arguments)

    import torch

    emit(kind="start", case="gemm chain", startup_s=0.0, versions={"torch": torch.__version__})
    layer, num_layers, head = shapes(json.loads((arguments.model / "config.json").read_text(encoding="utf-8")))
    with torch.inference_mode():
        for batch in workload.batches:
            step_s = median_step_s(_chain([*(layer * num_layers), head], batch))
            emit(
                kind="generation",
                case="chain",
                batch=batch,
                prompt_tokens=0,
                new_tokens=0,
                step_s=step_s,
                decode_tok_s=batch / step_s,
            )
        for rows in sorted({min(256, workload.prefill), workload.prefill} - {0}):
            step_s = median_step_s(_chain(layer * num_layers, rows))
            emit_prefill("chain", rows, rows / step_s)


Shape = tuple[int, int]


def shapes(config: dict[str, Any]) -> tuple[list[Shape], int, Shape]:
    """(d_in, d_out) of one layer's fused products, the number of layers, and the head's, from a Llama config.json."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    qkv = (heads + 2 * config["num_key_value_heads"]) * head_dim
    intermediate = config["intermediate_size"]
    layer = [(hidden, qkv), (heads * head_dim, hidden), (hidden, 2 * intermediate), (intermediate, hidden)]
    return layer, config["num_hidden_layers"], (hidden, config["vocab_size"])


def _chain(products: list[Shape], rows: int) -> Callable[[], None]:
    """One step over all products, each with weights of its own, packed for this number of rows."""
    import torch

    ops: Any = torch.ops.mkldnn
    inputs = {d_in: torch.randn(rows, d_in).bfloat16() for d_in, _ in products}
    weights = [ops._reorder_linear_weight(torch.randn(d_out, d_in).bfloat16(), rows) for d_in, d_out in products]

    def step() -> None:
        for (d_in, _), weight in zip(products, weights, strict=True):
            ops._linear_pointwise(inputs[d_in], weight, None, "none", [], "")

    return step


def median_step_s(step: Callable[[], None], min_seconds: float = MIN_SECONDS) -> float:
    """Median wall time of one step."""
    stop_s = time.perf_counter() + min_seconds / 4
    while time.perf_counter() < stop_s:
        step()
    times: list[float] = []
    while sum(times) < min_seconds or len(times) < 3:
        started_s = time.perf_counter()
        step()
        times.append(time.perf_counter() - started_s)
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    main()
