"""The lengths of shortlists that the benchmark states are those of lists that hold the top k."""

import torch

from benchmarks.pool_cost import shortlist


def test_a_shortlist_is_short_and_holds_the_top_k() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(256, 64, generator=generator).double()
    rows[128:] = rows[:128] * (1 + 1e-6)  # a bfloat16 cannot tell them apart
    x = torch.randn(300, 64, generator=generator).double()
    kept = shortlist(x, rows, 3)
    assert kept.gather(1, (x @ rows.T).topk(3).indices).all()
    assert 4 <= kept.sum(1).float().mean() < 12
