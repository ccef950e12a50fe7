"""The torch graph's forward pass must not wait for the device: nothing in it may read a tensor's values back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from server.engine.layout import lay_out
from server.engine.sequence import ScheduledBatch, ScheduledSequence
from server.engine.torch_graph import TorchGraph
from server.model.attention import attach_paged_attention
from server.routing.attach import attach_routing
from server.routing.policy import BASE_PLAN, Policy, fixed_plan, routed_plan
from tests.native import rig

READS_BACK = (
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "equal",
    "masked_select",
    "_unique2",
    "unique_dim",
    "item",
)
"""Operators whose result's shape or value the host needs: on an accelerator each waits for the device."""


class NoReadBack(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails at the first operator that reads back."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in READS_BACK, f"the forward pass calls {func}, which waits for the device"
        # An index of booleans is a nonzero in disguise.
        if name == "index":
            assert all(index is None or index.dtype is not torch.bool for index in args[1]), "a boolean index"
        return func(*args, **(kwargs or {}))


def forward(model: Any, device: torch.device, watch: Any) -> None:
    routed = attach_routing(model.to(device), num_slots=rig.NUM_SLOTS)
    attention = attach_paged_attention(model)
    attention.allocate(num_blocks=64, block_size=16, dtype=torch.float32, device=device)
    side = rig.Side(routed, TorchGraph(routed, attention, block_size=16, device=device))
    rig.equip(side, {1: rig.random_artefact(routed, "layer"), 2: rig.random_artefact(routed, "projection")})
    digests = {slot: f"d{slot}" for slot in rig.RANKS}
    plans = [BASE_PLAN, fixed_plan(Policy.PINNED, {1: 1.0}, digests)]
    plans += [routed_plan(digests, digests, generation, "", 2) for generation in (1, 2)]
    sequences = [rig.make_sequence(list(range(3, 33)), 1 + 10 * index, plan) for index, plan in enumerate(plans)]
    for count in (20, 9, 1):  # a whole prompt, a chunk, decoding
        layout = lay_out(ScheduledBatch(tuple(ScheduledSequence(sequence, count) for sequence in sequences)))
        with torch.inference_mode(), watch():
            side.graph.forward(layout, [layout.num_tokens - 1], checks=[0, 1], collect_layers=True)
        for sequence in sequences:
            sequence.num_computed_tokens += count


def test_the_forward_pass_reads_nothing_back(tiny_llama: Callable[..., Any]) -> None:
    forward(tiny_llama(), torch.device("cpu"), NoReadBack)


def test_the_watch_notices_what_reads_back() -> None:
    values = torch.ones(3)
    for read in (lambda: values.sum().item(), lambda: values[values > 0], lambda: bool(values.all())):
        with pytest.raises(AssertionError), NoReadBack():  # type: ignore[no-untyped-call]
            read()


@pytest.mark.gpu
def test_the_forward_pass_does_not_wait_for_the_gpu(tiny_llama: Callable[..., Any]) -> None:
    class Detector:
        def __enter__(self) -> None:
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_: object) -> None:
            torch.cuda.set_sync_debug_mode("default")

    forward(tiny_llama(), torch.device("cuda"), Detector)
