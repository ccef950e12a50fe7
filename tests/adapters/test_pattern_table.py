"""The table of patterns finds what PEFT's own search finds, whatever their number."""

import re

from hypothesis import given
from hypothesis import strategies as st

from server.adapters.pattern_table import PatternTable
from server.adapters.patterns import STEPS_PER_NAME, Budget, Pattern

NAMES = [f"model.layers.{layer}.self_attn.{leaf}_proj" for layer in range(100) for leaf in "qkvo"]

KEYS = st.one_of(st.text("ab.-_", max_size=4), st.sampled_from(["a|b", "^a", "[ab].", ".*b", r"a\.b", "ä"]))


def first_as_peft_does(patterns: list[str], name: str) -> int:
    return next((i for i, text in enumerate(patterns) if re.match(rf"(.*\.)?({text})$", name)), -1)


@given(st.lists(KEYS, max_size=8, unique=True), st.text("ab.-_ä", max_size=8))
def test_the_first_pattern_that_matches_has_the_say(patterns: list[str], name: str) -> None:
    table = PatternTable([(Pattern(text), place) for place, text in enumerate(patterns)])
    assert table.first(name, Budget(STEPS_PER_NAME), -1) == first_as_peft_does(patterns, name)


def test_a_listing_of_every_module_takes_a_step_or_two_for_each_name() -> None:
    table = PatternTable([(Pattern(name), place) for place, name in enumerate(NAMES)])
    budget = Budget(steps=2 * len(NAMES))
    assert [table.first(name, budget, -1) for name in NAMES] == list(range(len(NAMES)))
    assert table.first("model.layers.5_self_attn.q_proj", Budget(10), -1) == 20, "a dot stands for any character"
