"""What cannot be served is refused by name, with every reason at once, and never half read."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.adapters.weights import AdapterLimits
from server.errors import AdapterRefusedError
from tests.adapters.folders import CONFIG, WEIGHTS, copied, edit_config, edit_tensors, raw_tensor_file

Load = Callable[..., Any]
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(plain_folder: Path, tmp_path: Path) -> Path:
    return copied(plain_folder, tmp_path / "adapter")


def codes(load: Load, folder: Path, **options: Any) -> set[str]:
    with pytest.raises(AdapterRefusedError) as caught:
        load(folder, **options)
    assert all(reason.message and reason.where for reason in caught.value.reasons)
    return {reason.code for reason in caught.value.reasons}


REFUSED_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "dora"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"bias": "all"}, "bias"),
    ({"bias": "lora_only"}, "bias"),
    ({"lora_bias": True}, "lora_bias"),
    ({"trainable_token_indices": [1, 2]}, "added_tokens"),
    ({"trainable_token_indices": {"embed_tokens": [1]}}, "added_tokens"),
    ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    ({"megatron_config": {"tensor_model_parallel_size": 2}}, "megatron"),
    ({"megatron_core": "os"}, "megatron"),
    ({"alora_invocation_tokens": [5]}, "alora"),
    ({"use_qalora": True}, "qalora"),
    ({"velora_config": {"num_groups": 64}}, "velora"),
    ({"monteclora_config": {"num_samples": 8}}, "monteclora"),
    ({"use_bdlora": {"nblocks": 2}}, "bdlora"),
    ({"arrow_config": {"top_k": 3}}, "arrow"),
    ({"kasa_config": {"beta": 0.1}}, "kasa"),
    ({"kasa_config": {}}, "kasa"),  # to PEFT, an empty one is one
    ({"arrow_config": {}}, "arrow"),
    ({"use_bdlora": {}}, "bdlora"),
    ({"alora_invocation_tokens": []}, "alora"),
    ({"trainable_token_indices": []}, "added_tokens"),
    ({"use_dora": 0}, "dora"),
    ({"ensure_weight_tying": True}, "weight_tying"),
    ({"init_lora_weights": "pissa"}, "base_changing_init"),
    ({"init_lora_weights": "pissa_niter_16"}, "base_changing_init"),
    ({"init_lora_weights": "olora"}, "base_changing_init"),
    ({"init_lora_weights": "OLoRA"}, "base_changing_init"),
    ({"init_lora_weights": "corda"}, "base_changing_init"),
    ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "base_changing_init"),
    ({"init_lora_weights": "lora_ga"}, "base_changing_init"),
    ({"init_lora_weights": "surprise"}, "unknown_init"),
    ({"init_lora_weights": 1}, "unknown_init"),
    ({"peft_type": "IA3"}, "unsupported_peft_type"),
    ({"peft_type": None}, "unsupported_peft_type"),
    ({"task_type": "SEQ_CLS"}, "unsupported_task_type"),
    ({"base_model_name_or_path": "test/other"}, "base_model_mismatch"),
    ({"base_model_name_or_path": None}, "base_model_unknown"),
    ({"base_model_name_or_path": ["test/tiny"]}, "base_model_unknown"),
    ({"target_modules": ["q_proj", "v_proj", "lm_head"]}, "unknown_target_modules"),
    ({"target_modules": None}, "no_target_modules"),
    ({"target_modules": []}, "no_target_modules"),
    ({"target_modules": [1]}, "invalid_config_value"),
    ({"target_modules": {"q_proj": 1}}, "invalid_config_value"),
    ({"target_modules": r"(.*)\1"}, "unsupported_pattern"),
    ({"rank_pattern": {"(?<=a)b": 4}}, "unsupported_pattern"),
    ({"rank_pattern": {"q_proj": 0}}, "invalid_config_value"),
    ({"rank_pattern": ["q_proj"]}, "invalid_config_value"),
    ({"rank_pattern": {"q_proj": 5}}, "rank_mismatch"),
    ({"alpha_pattern": {"q_proj": "16"}}, "invalid_config_value"),
    ({"layers_pattern": "layers"}, "invalid_config_value"),
    ({"layers_to_transform": [0], "layers_pattern": "lay.rs"}, "unsupported_pattern"),
    ({"layers_to_transform": "0"}, "invalid_config_value"),
    ({"layers_to_transform": [0]}, "unexpected_tensor"),
    ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "invalid_config_value"),
    ({"exclude_modules": ["v_proj"]}, "unexpected_tensor"),
    ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "missing_tensor"),
    ({"r": 8}, "rank_mismatch"),
    ({"r": 0}, "invalid_config_value"),
    ({"r": True}, "invalid_config_value"),
    ({"r": 4.0}, "invalid_config_value"),
    ({"r": 10**6}, "rank_too_large"),
    ({"lora_alpha": None}, "invalid_config_value"),
    ({"lora_alpha": 10**400}, "invalid_config_value"),
    ({"use_rslora": "yes"}, "invalid_config_value"),
    ({"use_quantum_lora": True}, "unknown_config_field"),
    ({"router_config": {"k": 2}}, "unknown_config_field"),
]


@pytest.mark.parametrize(("changes", "code"), REFUSED_FIELDS, ids=lambda value: str(value)[:60])
def test_config_fields_that_are_not_implemented_are_refused(
    changes: dict[str, Any], code: str, load: Load, folder: Path
) -> None:
    assert code in codes(load, edit_config(folder, changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_dropout": 0.3, "inference_mode": False, "revision": "main", "peft_version": "9.9"},
        {"auto_mapping": {"base_model_class": "X", "parent_library": "os"}},
        {"fan_in_fan_out": True},
        {"qalora_group_size": 8, "loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 2.0}},
        {"init_lora_weights": "eva"},
        {"init_lora_weights": None},
        {"modules_to_save": [], "target_parameters": [], "rank_pattern": None},
        {"megatron_core": None},
        {"future_field": None, "another": False, "third": {}, "fourth": []},
        {"task_type": None},
    ],
    ids=str,
)
def test_fields_without_influence_are_accepted_and_leave_the_digest_alone(
    changes: dict[str, Any], load: Load, folder: Path
) -> None:
    before = load(folder).digest
    assert load(edit_config(folder, changes)).digest == before


def _with(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {**tensors, name: value}


TENSOR_FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "missing": (lambda tensors: {n: t for n, t in tensors.items() if n != f"{Q0}.lora_B.weight"}, "missing_tensor"),
    "unexpected": (_with("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", torch.ones(4, 64)),
                   "unexpected_tensor"),
    "no lora": (_with("base_model.model.model.norm.weight", torch.ones(64)), "unexpected_tensor"),
    "without prefix": (_with("model.layers.0.self_attn.q_proj.lora_A.weight", torch.ones(4, 64)), "unexpected_tensor"),
    "other adapter name": (_with(f"{Q0}.lora_A.mine.weight", torch.ones(4, 64)), "unexpected_tensor"),
    "doubled": (_with(f"{Q0}.lora_A.default.weight", torch.ones(4, 64)), "duplicate_tensor"),
    "deeper model": (_with(Q0.replace(".0.", ".9.") + ".lora_A.weight", torch.ones(4, 64)), "unknown_target_modules"),
    "head": (_with("base_model.model.lm_head.lora_A.weight", torch.ones(4, 64)), "unknown_target_modules"),
    "embedding": (_with("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(4, 320)),
                  "embedding_target"),
    "added tokens": (_with("base_model.model.model.embed_tokens.weight", torch.ones(322, 64)), "added_tokens"),
    "added tokens in the head": (_with("base_model.model.lm_head.base_layer.weight", torch.ones(322, 64)),
                                 "added_tokens"),
    "dora": (_with(f"{Q0}.lora_magnitude_vector.weight", torch.ones(64)), "dora"),
    "lora bias": (_with(f"{Q0}.lora_B.bias", torch.ones(64)), "lora_bias"),
    "bias": (_with(f"{Q0}.bias", torch.ones(64)), "bias"),
    "wrong width": (_with(f"{Q0}.lora_A.weight", torch.ones(4, 65)), "shape_mismatch"),
    "transposed": (_with(f"{Q0}.lora_A.weight", torch.ones(64, 4)), "shape_mismatch"),
    "three dimensions": (_with(f"{Q0}.lora_A.weight", torch.ones(1, 4, 64)), "shape_mismatch"),
    "empty": (_with(f"{Q0}.lora_A.weight", torch.ones(0, 64)), "rank_mismatch"),
    "one rank less": (_with(f"{Q0}.lora_B.weight", torch.ones(64, 3)), "rank_mismatch"),
    "int8": (_with(f"{Q0}.lora_A.weight", torch.ones(4, 64, dtype=torch.int8)), "unsupported_dtype"),
    "float8": (_with(f"{Q0}.lora_A.weight", torch.ones(4, 64).to(torch.float8_e4m3fn)), "unsupported_dtype"),
    "float64": (_with(f"{Q0}.lora_A.weight", torch.ones(4, 64, dtype=torch.float64)), "unsupported_dtype"),
    "nan": (_with(f"{Q0}.lora_A.weight", torch.full((4, 64), torch.nan)), "non_finite_weights"),
    "infinity": (_with(f"{Q0}.lora_B.weight", torch.full((64, 4), torch.inf)), "non_finite_weights"),
    "absurd": (_with(f"{Q0}.lora_B.weight", torch.full((64, 4), 1e9)), "absurd_weights"),
}  # fmt: skip


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_tensors_that_do_not_fit_are_refused(fault: str, load: Load, folder: Path) -> None:
    change, code = TENSOR_FAULTS[fault]
    assert code in codes(load, edit_tensors(folder, change))


def test_scaling_that_makes_weights_absurd_is_refused(load: Load, folder: Path) -> None:
    assert codes(load, edit_config(folder, {"lora_alpha": 10**8})) == {"absurd_weights"}


def test_every_reason_is_reported_at_once(load: Load, folder: Path) -> None:
    edit_config(folder, {"use_dora": True, "bias": "all", "base_model_name_or_path": "test/other", "new": 1})
    edit_tensors(folder, lambda tensors: {**tensors, f"{Q0}.lora_A.weight": torch.full((4, 64), torch.nan)})
    expected = {"dora", "bias", "base_model_mismatch", "unknown_config_field", "non_finite_weights"}
    assert codes(load, folder) == expected


def test_the_same_base_under_another_name_is_told_where_to_name_it(load: Load, folder: Path) -> None:
    with pytest.raises(AdapterRefusedError, match=r"base_model\.name in adapters\.yaml"):
        load(edit_config(folder, {"base_model_name_or_path": "./my tiny llama"}))


def test_an_adapter_of_another_method_is_first_of_all_refused_as_that(load: Load, folder: Path) -> None:
    edit_config(folder, {"peft_type": "IA3", "feedforward_modules": ["down_proj"], "init_ia3_weights": True})
    with pytest.raises(AdapterRefusedError) as caught:
        load(folder)
    assert caught.value.reasons[0].code == "unsupported_peft_type"


def test_names_in_foreign_files_cannot_break_the_lines_or_terminals_that_show_them(load: Load, folder: Path) -> None:
    name = "\x1b[2J\u202edekcah\nINFO served"
    edit_config(folder, {f"\ud800{name}": 1})
    edit_tensors(folder, _with(name, torch.ones(1)))
    with pytest.raises(AdapterRefusedError) as caught:
        load(folder)
    assert str(caught.value).isprintable()
    wheres = [reason.where for reason in caught.value.reasons]
    assert r"adapter_config.json: \ud800\x1b[2J\u202edekcah\nINFO served" in wheres
    assert r"adapter_model.safetensors: \x1b[2J\u202edekcah\nINFO served" in wheres


def test_many_reasons_of_one_kind_are_counted_rather_than_listed(load: Load, folder: Path) -> None:
    edit_tensors(folder, lambda _: {f"x.{index}": torch.ones(1) for index in range(100)})
    with pytest.raises(AdapterRefusedError, match="and 92 more of the kind 'unexpected_tensor'"):
        load(folder)


def test_limits_of_rank_and_size_are_enforced(load: Load, folder: Path) -> None:
    assert codes(load, folder, limits=AdapterLimits(max_rank=3)) == {"rank_too_large"}
    size = (folder / WEIGHTS).stat().st_size
    assert codes(load, folder, limits=AdapterLimits(max_bytes=size - 1)) == {"file_too_large"}
    assert load(folder, limits=AdapterLimits(max_rank=4, max_bytes=size)).num_bytes == size


def test_missing_folder_and_files_are_named(load: Load, folder: Path) -> None:
    assert codes(load, folder / "absent") == {"missing_folder"}
    (folder / CONFIG).unlink()
    (folder / WEIGHTS).unlink()
    assert codes(load, folder) == {"missing_file"}


def test_pickled_weights_are_refused_unread(load: Load, folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert codes(load, folder) == {"pickle_file"}


def test_links_out_of_the_folder_are_refused(load: Load, folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    (folder / WEIGHTS).rename(outside)
    (folder / WEIGHTS).symlink_to(outside)
    assert codes(load, folder) == {"symlink_escape"}
    load(folder, link_root=tmp_path)


def test_links_inside_the_folder_are_followed(load: Load, folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "blob")
    (folder / WEIGHTS).symlink_to("blob")
    load(folder)


def test_pipes_and_folders_in_place_of_files_are_refused_without_waiting(load: Load, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()
    assert codes(load, folder) == {"not_a_file"}


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"r": 4, "r": 8}',
        b'{"rank_pattern": {"q": 1, "q": 2}}',
        b'{"r": NaN}',
        b'{"lora_alpha": Infinity}',
        b"[" * 10_000,
        b'{"a":' * 10_000,
        b'{"r": ' + b"9" * 5000 + b"}",
        b" " * (1024**2 + 1),
    ],
    ids=lambda text: repr(text[:20]),
)
def test_configs_that_are_not_clean_json_are_refused(text: bytes, load: Load, folder: Path) -> None:
    (folder / CONFIG).write_bytes(text)
    assert codes(load, folder) == {"damaged_config"}


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BROKEN_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "at least 8"),
    "no header": (b"\x08", "at least 8"),
    "huge header": (raw_tensor_file({}, header_bytes=2**40), "more than the limit"),
    "header beyond the file": (raw_tensor_file({}, header_bytes=1000), "truncated"),
    "header is no json": (raw_tensor_file(b"\x80\x04}"), "header cannot be read"),
    "header is a list": (raw_tensor_file([]), "not an object"),
    "name twice": (raw_tensor_file(b'{"a": {}, "a": {}}'), "appears twice"),
    "no entry": (raw_tensor_file({"a": 1}), "does not hold exactly"),
    "entry with extras": (raw_tensor_file({"a": {**F32, "code": "x"}}, bytes(8)), "does not hold exactly"),
    "negative shape": (raw_tensor_file({"a": {**F32, "shape": [-2]}}, bytes(8)), "malformed"),
    "fractional shape": (raw_tensor_file({"a": {**F32, "shape": [2.0]}}, bytes(8)), "malformed"),
    "boolean shape": (raw_tensor_file({"a": {**F32, "shape": [True]}}, bytes(8)), "malformed"),
    "backward offsets": (raw_tensor_file({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8)), "malformed"),
    "gigantic offsets": (raw_tensor_file({"a": {**F32, "data_offsets": [0, 2**60]}}, bytes(8)), "malformed"),
    "shape larger than data": (raw_tensor_file({"a": {**F32, "shape": [1000]}}, bytes(8)), "its data has 8 bytes"),
    "data missing": (raw_tensor_file({"a": F32}, bytes(4)), "truncated"),
    "data left over": (raw_tensor_file({"a": F32}, bytes(12)), "overlong"),
    "overlap": (raw_tensor_file({"a": F32, "b": F32}, bytes(8)), "overlaps"),
    "gap": (raw_tensor_file({"a": {**F32, "data_offsets": [4, 12]}}, bytes(12)), "leaves a gap"),
}


@pytest.mark.parametrize("fault", BROKEN_FILES)
def test_damaged_weight_files_are_refused_with_the_cause(fault: str, load: Load, folder: Path) -> None:
    content, message = BROKEN_FILES[fault]
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(AdapterRefusedError, match=message) as caught:
        load(folder)
    assert {reason.code for reason in caught.value.reasons} == {"damaged_weights"}


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_a_file_is_refused_or_harmless(data: st.DataObject, load: Load, folder: Path) -> None:
    """Bytes cut, flipped or inserted anywhere: never anything but a refusal, or weights that are all finite."""
    originals = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    name = data.draw(st.sampled_from([CONFIG, WEIGHTS]))
    content = bytearray(originals[name])
    at = data.draw(st.integers(0, min(len(content) - 1, 4000)))
    match data.draw(st.sampled_from(["cut", "flip", "insert"])):
        case "cut":
            del content[at:]
        case "flip":
            content[at] ^= data.draw(st.integers(1, 255))
        case "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=20))
    try:
        (folder / name).write_bytes(content)
        adapter = load(folder)
        assert all(torch.isfinite(matrix).all() for lora in adapter.weights.values() for matrix in lora)
    except AdapterRefusedError:
        pass
    finally:
        for original, text in originals.items():
            (folder / original).write_bytes(text)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_of_any_field_is_refused_or_harmless(data: st.DataObject, load: Load, plain_folder: Path,
                                                       tmp_path_factory: pytest.TempPathFactory) -> None:  # fmt: skip
    content = json.loads((plain_folder / CONFIG).read_text())
    field = data.draw(st.sampled_from(sorted(content)))
    folder = copied(plain_folder, tmp_path_factory.mktemp("any"))
    with contextlib.suppress(AdapterRefusedError):
        load(edit_config(folder, {field: data.draw(json_values)}))
