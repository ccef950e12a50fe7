"""Random bodies: whatever a client sends, the answer is a 200 or a refusal in OpenAI's envelope, never a failure."""

import json
from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.api.schemas import UNSUPPORTED_IN_CHAT, ChatBody, CompletionBody
from tests.api.fakes import Harness

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.integers(),
    st.sampled_from([10**400, -(10**400)]),  # no float can hold them
    st.floats(allow_nan=False),
    st.text(max_size=8),
    st.sampled_from(["auto", "gsm8k", "nobody", "user", "text", "tokens", "\ud800", "\0"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["gsm8k", "1", "type", "text", "role", "content", "trace", "x"]), inner, max_size=3
        ),
    ),
    max_leaves=6,
)
FIELDS = sorted({*ChatBody.model_fields, *CompletionBody.model_fields, *UNSUPPORTED_IN_CHAT, "made_up"})
BODIES = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3)
VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "auto", "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"model": "auto", "prompt": "Hi"},
}


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(sorted(VALID)), fields=BODIES)
def test_no_body_makes_the_server_fail(
    client: httpx.Client, harness: Harness, path: str, fields: dict[str, Any]
) -> None:
    content = json.dumps({**VALID[path], **fields})
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400, 404), (content, response.text)
    if response.status_code != 200:
        assert response.json()["error"]["message"]
    harness.settle()
