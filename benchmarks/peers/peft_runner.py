"""transformers' `generate` with PEFT: the base model, one adapter per row (`adapter_names`), or Arrow's routing."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers.equal_adapters import equalise
from benchmarks.peers.protocol import Generate, add_workload_flags, check_lengths, emit, measure, workload_from

ARROW_TOP_K = 2
"""As many adapters per token as our router keeps."""


def main() -> None:
    """Load, measure, print JSON lines."""
    parser = argparse.ArgumentParser(prog="peft_runner", description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, required=True, help="folder of adapter folders")
    parser.add_argument("--case", choices=("base", "adapters", "arrow"), required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for adapters made equal for Arrow")
    add_workload_flags(parser)
    arguments = parser.parse_args()

    import peft
    import torch
    import transformers

    torch.manual_seed(0)  # Arrow's power iteration starts at random
    folders = sorted(path for path in arguments.adapters.iterdir() if path.is_dir())
    started_s = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).eval()
    if arguments.case == "adapters":
        model = _with_adapters(model, folders)
    elif arguments.case == "arrow":
        model = _with_arrow(model, [equalise(folder, arguments.work / folder.name) for folder in folders])
    versions = {"peft": peft.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    emit(kind="start", case="peft", startup_s=time.perf_counter() - started_s, versions=versions)
    names = [folder.name for folder in folders] if arguments.case == "adapters" else []
    case = {"base": "base", "adapters": "eight adapters", "arrow": "arrow"}[arguments.case]
    measure(case, generator(model, names), workload_from(arguments))


def generator(model: Any, adapter_names: list[str]) -> Generate:
    """Greedy `generate` of exactly the wanted tokens; rows take the adapters in turn if there are any."""
    import torch

    def generate(ids: list[list[int]], new_tokens: int) -> None:
        tokens = torch.tensor(ids)
        rows = [adapter_names[index % len(adapter_names)] for index in range(len(ids))] if adapter_names else []
        named = {"adapter_names": rows} if rows else {}
        with torch.inference_mode():
            output = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=0,
                **named,
            )
        check_lengths([row[tokens.shape[1] :] for row in output.tolist()], new_tokens)

    return generate


def _with_adapters(model: Any, folders: list[Path]) -> Any:
    from peft import PeftModel

    # PEFT would keep adapters in float32 beside a bfloat16 base, which is slower.
    wrapped = PeftModel.from_pretrained(model, folders[0], adapter_name=folders[0].name, autocast_adapter_dtype=False)
    for folder in folders[1:]:
        wrapped.load_adapter(str(folder), adapter_name=folder.name, autocast_adapter_dtype=False)
    return _in_bfloat16(wrapped)


def _with_arrow(model: Any, folders: list[Path]) -> Any:
    from peft import ArrowConfig, create_arrow_model

    create: Callable[..., Any] = create_arrow_model
    wrapped = create(
        base_model=model,
        task_specific_adapter_paths=[str(folder) for folder in folders],
        arrow_config=ArrowConfig(top_k=ARROW_TOP_K, router_temperature=1.0),
        autocast_adapter_dtype=False,
    )
    return _in_bfloat16(wrapped)


def _in_bfloat16(model: Any) -> Any:
    import torch

    return model.to(torch.bfloat16).eval()


if __name__ == "__main__":
    main()
