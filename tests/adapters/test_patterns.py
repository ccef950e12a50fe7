"""The bounded matcher agrees with Python's `re` wherever it accepts a pattern, and never runs away."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.adapters.pattern_syntax import PatternSyntaxError
from server.adapters.patterns import STEPS_PER_NAME, Budget, Pattern, PatternBudgetError

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "transformer.h.2.attn.c_attn",
    "q_proj",
    "lm_head",
    "a.b",
    "",
]

REAL_PATTERNS = [
    ".*",
    r".*\.(q|v)_proj",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    r"^model.layers.0.self_attn.q_proj",
    r"model\.layers\.(0|1|11)\.mlp\.(gate|up|down)_proj",
    r"layers\.\d+\.mlp\.down_proj",
    r"layers\.[0-9]{1,2}\.self_attn\.[qkv]_proj",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:k_proj|v_proj|q_proj|down_proj)))",
    r"^(?!.*visual)(?!.*vision).*(?:q_proj|k_proj)",
    r"(?=.*mlp).*down.*",
    "self_attn.q_proj",
    "q_proj",
    "[qk]_proj|[^a-z]",
    r"\w+\.\w+",
    r"model{1}.+?\bq_proj\Z",
    "a{,}.b",
    "x{y}",
    "(a*)*b?(?P<tail>.*)",
]


@pytest.mark.parametrize("pattern", REAL_PATTERNS)
def test_real_patterns_match_as_python_does(pattern: str) -> None:
    for name in NAMES:
        assert Pattern(pattern).fullmatch(name, Budget(STEPS_PER_NAME)) is bool(re.fullmatch(pattern, name)), name
        expected = bool(re.match(rf"(.*\.)?({pattern})$", name))
        assert Pattern(pattern).matches_suffix(name, Budget(STEPS_PER_NAME)) is expected, name


ATOMS = st.sampled_from(
    ["a", "b", "_", "0", ".", r"\.", "[ab]", "[^a.]", "[a-b0]", r"\d", r"\w", r"\W", r"\b", "^", "$"]
)
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join),
        inner.map(lambda text: f"({text})"),
        inner.map(lambda text: f"(?:{text})"),
        inner.map(lambda text: f"(?={text})"),
        inner.map(lambda text: f"(?!{text})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,}", "{,2}", "{1,3}?"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=8,
)


@given(PATTERNS, st.text("ab_0.", max_size=6))
def test_any_accepted_pattern_matches_as_python_does(pattern: str, name: str) -> None:
    assert Pattern(pattern).fullmatch(name, Budget(STEPS_PER_NAME)) is bool(re.fullmatch(pattern, name))
    assert Pattern(pattern).matches_suffix(name, Budget(STEPS_PER_NAME)) is bool(
        re.match(rf"(.*\.)?({pattern})$", name)
    )


@given(st.text("ab.*+?{}()[]|\\d^$-,1=!:P<>#", max_size=12))
def test_any_text_is_refused_or_matches_as_python_does(text: str) -> None:
    try:
        pattern = Pattern(text)
    except PatternSyntaxError:
        return
    if "[[" in text or "--" in text or "||" in text or re.search(r"\[.*\[", text):
        return  # Python warns about these as possible future set operations
    assert pattern.fullmatch("ab.a1", Budget(STEPS_PER_NAME)) is bool(re.fullmatch(text, "ab.a1"))


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("(a", "missing closing parenthesis"),
        ("a)|(b", "unbalanced parenthesis"),
        ("*a", "nothing to repeat"),
        ("{2}", "nothing to repeat"),
        ("a**", "multiple repeat"),
        ("a*+", "possessive"),
        ("[a", "unexpected end"),
        ("[b-a]", "bad character range"),
        (r"(a)\1", "escape"),
        (r"\x41", "escape"),
        ("(?<=a)b", "not supported"),
        ("(?i)a", "not supported"),
        ("(?>a)", "not supported"),
        ("(?P<1x>a)", "bad group name"),
        ("a{3,2}", "minimum above"),
        ("a{99999}", "too large"),
        ("^*", "anchor"),
        ("(" * 60 + "a" + ")" * 60, "nested deeper"),
        ("a" * 5000, "characters"),
    ],
)
def test_unsupported_syntax_is_refused_by_name(pattern: str, problem: str) -> None:
    with pytest.raises(PatternSyntaxError, match=re.escape(problem)):
        Pattern(pattern)


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|aa)*b", "(.*)*x", "(.*a){20}", "((((a*)*)*)*)*b", "(a?){50}a{50}", "(.*,){1,200}z"]
)
def test_patterns_that_stall_python_end_quickly(pattern: str) -> None:
    start = time.perf_counter()
    budget = Budget(100 * STEPS_PER_NAME)
    name = "a" * 60 + "!"
    Pattern(pattern).fullmatch(name, budget)
    Pattern(pattern).matches_suffix(name, budget)
    assert time.perf_counter() - start < 2.0


def test_work_beyond_the_budget_is_refused() -> None:
    with pytest.raises(PatternBudgetError):
        Pattern("(.*a.*)*b").fullmatch("a" * 80, Budget(steps=1000))


def test_a_class_costs_what_it_compares() -> None:
    pattern = Pattern("[" + "!-#" * 1300 + "]*")
    with pytest.raises(PatternBudgetError):
        pattern.fullmatch("#" * 60, Budget(steps=60 * 1300))
