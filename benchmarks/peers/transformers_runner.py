"""transformers' continuous batching (`generate_batch`), base model, paged sdpa."""

import argparse
import time
from pathlib import Path

from benchmarks.peers.protocol import add_workload_flags, check_lengths, emit, measure, workload_from


def main() -> None:
    """Load, measure, print JSON lines."""
    parser = argparse.ArgumentParser(prog="transformers_runner", description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True)
    add_workload_flags(parser)
    arguments = parser.parse_args()

    import torch
    import transformers
    from transformers import ContinuousBatchingConfig, GenerationConfig

    started_s = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    emit(kind="start", case="transformers", startup_s=time.perf_counter() - started_s, versions=versions)
    # Pages of 64 tokens, 256 blocks: room for 32 sequences of 64 + 128 and for one of 1,024.
    batching = ContinuousBatchingConfig(page_size=64, num_blocks=256, allow_block_sharing=False)

    def generate(ids: list[list[int]], new_tokens: int) -> None:
        generation = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        outputs = model.generate_batch(
            ids, generation_config=generation, continuous_batching_config=batching, progress_bar=False
        )
        check_lengths([output.generated_tokens for output in outputs.values()], new_tokens)

    measure("base", generate, workload_from(arguments))


if __name__ == "__main__":
    main()
