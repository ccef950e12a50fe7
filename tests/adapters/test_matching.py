"""Which projections are adapted, and how strongly: the same answers as PEFT's own functions."""

import math
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from server.adapters.matching import TargetSettings, match_targets
from server.adapters.peft_config import PeftConfig, parse_config
from server.errors import RefusalReason

LLAMA = [f"model.layers.{layer}.{leaf}" for layer in (0, 1, 10) for leaf in ("self_attn.q_proj", "mlp.down_proj")]
GPT = [f"transformer.h.{layer}.{leaf}" for layer in (0, 1) for leaf in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")]
BARE = ["h.0.attn.c_attn", "layers.1.q_proj", "blocks.0.inner.3.q_proj"]
NAMES = LLAMA + GPT + BARE

FRAGMENTS = ["q_proj", "c_proj", "attn.c_proj", "mlp.down_proj", "layers.1.self_attn.q_proj", *NAMES[:2], *BARE]
PATTERNS = [
    ".*",
    ".*q_proj",
    r".*\.(0|1)\..*",
    "(?!.*mlp).*",
    "model.*",
    "c_attn|c_proj",
    "^h.*",
    r"layers\.\d+\..*proj",
]


def parsed(fields: dict[str, Any]) -> PeftConfig:
    config, reasons = parse_config({"peft_type": "LORA", **fields}, max_rank=512)
    assert config is not None
    assert reasons == []
    return config


def matched(fields: dict[str, Any]) -> tuple[dict[str, TargetSettings], list[RefusalReason]]:
    return match_targets(parsed(fields), NAMES)


names = st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=3)
texts = st.sampled_from(PATTERNS)
layers = st.one_of(st.none(), st.integers(0, 10), st.lists(st.integers(0, 10), max_size=3))
list_names = st.one_of(st.none(), st.sampled_from(["layers", "h"]), st.lists(st.sampled_from(["h", "layers", "inner"])))
patterns_to_ranks = st.dictionaries(st.sampled_from(PATTERNS + FRAGMENTS), st.integers(1, 9), max_size=3)


@given(st.one_of(names, texts), st.one_of(st.none(), names, texts), layers, list_names)
def test_targets_are_those_of_peft(target: Any, exclude: Any, layer: Any, list_name: Any) -> None:
    fields = {"target_modules": target, "exclude_modules": exclude}
    if not isinstance(target, str) and layer is not None:
        fields |= {"layers_to_transform": layer, "layers_pattern": list_name}
    config = LoraConfig(**fields)
    expected = {name for name in NAMES if check_target_module_exists(config, name)}
    assert set(matched(fields)[0]) == expected


@given(patterns_to_ranks, patterns_to_ranks, st.booleans())
def test_ranks_and_scalings_are_those_of_peft(ranks: dict[str, int], alphas: dict[str, int], is_rslora: bool) -> None:
    fields = {"target_modules": ".*", "r": 6, "lora_alpha": 5, "rank_pattern": ranks, "alpha_pattern": alphas}
    settings, _ = matched({**fields, "use_rslora": is_rslora})
    for name in NAMES:
        rank = ranks.get(get_pattern_key(list(ranks), name), 6)
        alpha = alphas.get(get_pattern_key(list(alphas), name), 5)
        assert settings[name] == TargetSettings(rank, alpha / (math.sqrt(rank) if is_rslora else rank))


@pytest.mark.parametrize("listed", [["query_key_value", "Wqkv"], ["layers.99.q_proj"]])
def test_listed_names_that_are_nowhere_are_refused_by_name_if_all_are(listed: list[str]) -> None:
    assert matched({"target_modules": [*listed, "q_proj"]}) == matched({"target_modules": ["q_proj"]})
    _, reasons = matched({"target_modules": listed})
    assert [reason.code for reason in reasons] == ["unknown_target_modules"]
    assert all(repr(name) in reasons[0].message for name in listed)


def test_listed_heads_and_embeddings_are_refused_by_name() -> None:
    _, reasons = matched({"target_modules": ["q_proj", "lm_head", "embed_tokens"]})
    assert [reason.code for reason in reasons] == ["unknown_target_modules"]
    assert "'embed_tokens', 'lm_head'" in reasons[0].message


@pytest.mark.parametrize(
    "fields", [{"target_modules": "nothing"}, {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}]
)
def test_a_config_that_adapts_nothing_is_refused(fields: dict[str, Any]) -> None:
    assert [reason.code for reason in matched(fields)[1]] == ["no_target_modules"]


def test_a_pattern_that_takes_too_long_is_refused() -> None:
    config = parsed({"target_modules": "((.*a.*)*.*b.*)*(.*c.*)*(.*)*(.*d)*x"})
    _, reasons = match_targets(config, ["model.layers." + "abcd" * 300 for _ in range(3)])
    assert [reason.code for reason in reasons] == ["pattern_too_complex"]


LONG_CLASS = "[" + "!-#" * 1300 + "]"
MASKED = {"".join("." if number >> bit & 1 else "a" for bit in range(14)) + "x" * 18: 1 for number in range(10_000)}


@pytest.mark.parametrize(
    "patterns",
    [
        {f"model.layers.{layer}.self_attn.x_proj": 1 for layer in range(10_000)},
        {f"model.layers.{layer}.self_attn.x_proj": 1 for layer in range(30_000)},
        MASKED,
        {f"{LONG_CLASS}{{{count}}}": 1 for count in range(200)},
        {f"{LONG_CLASS}*x{count}": 1 for count in range(20)},
        {f"(a|m){number}": 1 for number in range(9_999)},
        {"(a|m)*|" * 500 + str(number): 1 for number in range(24)},
        {"q" + "(?:a)" * 800 + str(number): 1 for number in range(24)},
        {"((" * 19 + "m" + "))" * 19 + ".*" * 1900 + str(number): 1 for number in range(200)},
    ],
    ids=["listed", "too many", "masks", "classes", "class", "short", "alternatives", "dead end", "long"],
)
def test_no_config_within_the_size_limit_takes_long(patterns: dict[str, int]) -> None:
    names = [f"model.layers.{layer}.self_attn.{leaf}_proj" for layer in range(60) for leaf in "qkvo"]
    content = {"peft_type": "LORA", "target_modules": ".*", "rank_pattern": patterns, "alpha_pattern": patterns}
    started_s = time.process_time()
    config, reasons = parse_config(content, max_rank=512)
    if config is not None:
        reasons += match_targets(config, names)[1]
    assert time.process_time() - started_s < 5.0, "about 1.5 s at most where nothing else runs"
    assert {reason.code for reason in reasons} <= {"unsupported_pattern", "pattern_too_complex"}


def test_layer_lists_by_the_thousand_are_looked_up() -> None:
    lists = [*(f"x{number}" for number in range(50_000)), "h", "layers"]
    fields = {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [0], "layers_pattern": lists}
    started_s = time.process_time()
    assert set(matched(fields)[0]) == {LLAMA[0], GPT[0], "h.0.attn.c_attn"}
    assert time.process_time() - started_s < 5.0, "a few hundredths of a second"
