"""Which stated base names belong to the base that is served."""

import pytest

from server.adapters.base_name import is_same_base

SERVED = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    "stated",
    [
        SERVED,
        "huggingfacetb/smollm2-135m-instruct",
        " HuggingFaceTB/SmolLM2-135M-Instruct/ ",
        "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        "SmolLM2-135M-Instruct",
        "/home/me/models/SmolLM2-135M-Instruct/",
        "./SmolLM2-135M-Instruct",
        "C:\\models\\SmolLM2-135M-Instruct",
        "/root/.cache/huggingface/hub/models--HuggingFaceTB--SmolLM2-135M-Instruct/snapshots/0123abcd",
    ],
)
def test_names_of_the_same_base_agree(stated: str) -> None:
    assert is_same_base(stated, SERVED)


@pytest.mark.parametrize(
    "stated",
    [
        "",
        "/",
        "HuggingFaceTB/SmolLM-135M-Instruct",
        "HuggingFaceTB/SmolLM2-135M",
        "HuggingFaceTB/SmolLM2-360M-Instruct",
        "someone/SmolLM2-135M-Instruct",
        "/models/SmolLM2-135M-Instruct-finetuned",
        "/cache/models--someone--SmolLM2-135M-Instruct/snapshots/0123abcd",
        "SmolLM2",
    ],
)
def test_names_of_other_bases_do_not(stated: str) -> None:
    assert not is_same_base(stated, SERVED)


def test_a_served_name_without_organisation_compares_by_its_last_part() -> None:
    assert is_same_base("openai-community/gpt2", "gpt2")
    assert not is_same_base("openai-community/gpt2-medium", "gpt2")
