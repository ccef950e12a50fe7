"""Ratios are taken within a round; what was not measured is not there."""

from typing import Any

from benchmarks.ratios import RATIOS, figures, ratios, size_of


def line(peer: str, case: str, number: int, rate: float | None, **other: Any) -> dict[str, Any]:
    facts = {"kind": "generation", "batch": 8, "prompt_tokens": 64, "new_tokens": 128, "decode_tok_s": rate}
    return {"peer": peer, "case": case, "round": number, **facts, **other}


def test_a_ratio_is_taken_within_each_round_and_compared_with_its_target() -> None:
    lines = [
        line("ours", "routed", 0, 90.0),
        line("ours", "base", 0, 100.0),
        line("ours", "routed", 1, 30.0),
        line("ours", "base", 1, 50.0),
    ]
    (found,) = ratios(lines)
    assert found["name"] == "routed / our base"
    assert found["size"] == "8"
    assert (found["median"], found["min"], found["max"], found["rounds"]) == (0.75, 0.6, 0.9, 2)
    assert (found["target"], found["met"]) == (0.85, False)


def test_rounds_in_which_one_side_is_missing_do_not_count() -> None:
    lines = [line("ours", "routed", 0, 90.0), line("ours", "base", 1, 100.0), line("ours", "base", 0, None)]
    assert ratios(lines) == []


def test_sizes_are_compared_with_their_like_only() -> None:
    prefill = {"kind": "prefill", "prompt_tokens": 1024, "prefill_tok_s": 500.0, "batch": 1}
    lines = [
        line("ours", "base", 0, 100.0),
        line("gemm-chain", "chain", 0, 50.0, batch=32),
        line("ours", "base", 0, None, **prefill),
        line("gemm-chain", "chain", 0, None, **{**prefill, "prefill_tok_s": 1000.0}),
        line("gemm-chain", "chain", 0, None, **{**prefill, "prompt_tokens": 256, "prefill_tok_s": 2000.0}),
    ]
    assert [size_of(row) for row in lines] == ["8", "32", "prefill", "prefill", "prefill 256"]
    (found,) = ratios(lines)
    assert (found["size"], found["median"], found["met"]) == ("prefill", 0.5, False)


def test_figures_have_median_range_and_the_number_of_new_tokens() -> None:
    found = figures(
        [line("peft-arrow", "arrow", number, rate, new_tokens=24) for number, rate in enumerate((3.0, 5.0))]
    )
    expected = {"median": 4.0, "min": 3.0, "max": 5.0, "rounds": 2}
    assert found == [{"peer": "peft-arrow", "case": "arrow", "size": "8", "new_tokens": 24, **expected}]


def test_every_ratio_names_a_peer_that_exists() -> None:
    from benchmarks.peers.catalogue import peers

    assert {ratio.peer for ratio in RATIOS} <= {peer.name for peer in peers()}
