"""GET and POST /v1/router: how much of an artefact's record an answer carries. The rest: `test_adapters.py`."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.fakes import Harness

LONG: list[Any] = [
    {"losses": [0.5] * 100_000},
    {"note": "x" * 100_000},
    {"tasks": {f"task {index}": {} for index in range(50_000)}},
    {"x" * 100_000: 1},
]


@pytest.mark.parametrize("training", LONG)
def test_a_long_training_record_is_left_out(training: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "router.json").write_text("{}")
    harness = Harness(root=tmp_path, adapter_roots=(".",))
    monkeypatch.setattr(harness.registry, "router_info", lambda: {"top_k": 2, "training": training})
    with harness.serve() as client:
        for response in (client.get("/v1/router"), client.post("/v1/router", json={"path": "."})):
            assert len(response.content) < 1000
            assert response.json()["top_k"] == 2
            assert response.json()["training"].keys() == {"omitted"}


def test_a_record_as_ours_is_answered_whole(
    client: httpx.Client, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"loss": {"balance": 0.01}, "tasks": ["gsm8k", "mbpp"], "metrics": [{"nll": 1.25}] * 100}
    monkeypatch.setattr(harness.registry, "router_info", lambda: {"training": training})
    assert client.get("/v1/router").json()["training"] == training


def test_a_number_that_is_not_finite_is_null_and_fails_nothing_else(
    client: httpx.Client, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"nll": float("nan"), "losses": [1.5, float("inf")]}
    monkeypatch.setattr(harness.registry, "router_info", lambda: {"top_k": 2, "training": training})
    response = client.get("/v1/router")
    assert response.json() == {"top_k": 2, "training": {"nll": None, "losses": [1.5, None]}}
