"""Examples over HTTP: with a registration, and for an adapter that is served already."""

from typing import Any

import httpx
import pytest

from tests.api.fakes import Harness

CHAT = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}


def test_a_registration_hands_its_examples_on(client: httpx.Client, harness: Harness) -> None:
    body = {"name": "new", "source": "org/new", "examples": ["1 + 1?", {"prompt": "3 + 3?"}, CHAT]}
    assert client.post("/v1/adapters", json=body).status_code == 202
    assert harness.registry.examples == body["examples"]


@pytest.mark.parametrize(("fields", "is_said"), [({}, False), ({"routed": True}, True)])
def test_asking_for_routing_differs_from_saying_nothing(
    client: httpx.Client, harness: Harness, fields: dict[str, Any], is_said: bool
) -> None:
    client.post("/v1/adapters", json={"name": "new", "source": "org/new", **fields})
    (spec,) = harness.registry.registered
    assert spec.routed
    assert ("routed" in spec.model_fields_set) is is_said


def test_calibration_answers_202_and_200_when_waited_for(client: httpx.Client, harness: Harness) -> None:
    response = client.post("/v1/adapters/mbpp/calibrate", json={"examples": ["a", "b"]})
    assert response.status_code == 202
    assert response.json()["calibration"] == {"state": "running"}
    assert harness.registry.examples == ["a", "b"]
    waited = client.post("/v1/adapters/mbpp/calibrate", json={"examples": ["c", CHAT], "wait": True})
    assert waited.status_code == 200
    assert waited.json()["name"] == "mbpp"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "examples is required"),
        ({"examples": []}, "0 examples; give 2 to 64"),
        ({"examples": ["a"]}, "1 examples; give 2 to 64"),
        ({"examples": ["a", 7]}, "examples[1] must be a prompt"),
        ({"examples": ["a", {"messages": [{"role": "tool", "content": "x"}]}]}, "role must be one of"),
        ({"examples": ["a", {"messages": [{"role": "user"}]}]}, "strings 'role' and 'content'"),
        ({"examples": ["a", {"messages": [{"role": "assistant", "content": "x"}]}]}, "must begin with"),
        ({"examples": ["a", "b"], "count": 2}, "is not a known field"),
    ],
)
def test_bad_examples_are_refused_by_index(client: httpx.Client, body: dict[str, Any], words: str) -> None:
    response = client.post("/v1/adapters/mbpp/calibrate", json=body)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


def test_an_unknown_adapter_is_not_found(client: httpx.Client) -> None:
    response = client.post("/v1/adapters/nobody/calibrate", json={"examples": ["a", "b"]})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "adapter_not_found")


def test_calibrating_is_for_administrators(client: httpx.Client) -> None:
    response = client.post(
        "/v1/adapters/mbpp/calibrate", json={"examples": ["a", "b"]}, headers={"Origin": "http://elsewhere.example"}
    )
    assert response.status_code == 403
