"""Artefacts at rest: exact round trips, refusals by name, rows by slot."""

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from server.errors import RouterArtefactError
from server.routing.bank import ProjectionInfo
from server.routing.chat_frame import ChatFrame
from server.routing.plan_course import ENDLESS
from server.routing.policy import routed_plan
from server.routing.prompt_gate import PromptGate, PromptGateSettings
from server.routing.prompt_statistics import summarise_questions
from server.routing.prototypes import GateColumn, HotRow
from server.routing.router import ArtefactAdapter, RouterArtefact, load_artefact, save_artefact
from server.routing.router_bank import RouterBank, check_base


def make_artefact(**changes: Any) -> RouterArtefact:
    generator = torch.Generator().manual_seed(0)
    artefact = RouterArtefact(
        base_model="tiny/llama",
        hidden_size=16,
        num_layers=2,
        granularity="layer",
        top_k=2,
        temperature=0.7,
        adapters=(
            ArtefactAdapter("maths", "d1", "folder", None, 8, ("q_proj",)),
            ArtefactAdapter("code", "d2"),
            ArtefactAdapter("base", "base"),
        ),
        rows={f"layer.{layer}": torch.randn(3, 16, generator=generator) for layer in range(2)},
        background={"mean/layer.0": torch.randn(16, generator=generator)},
        training={"alpha": 0.01, "note": "naïve"},
    )
    return replace(artefact, **changes)


def test_save_and_load_is_exact(tmp_path: Path) -> None:
    artefact = make_artefact()
    save_artefact(artefact, tmp_path)
    loaded = load_artefact(tmp_path)
    for name in ("base_model", "granularity", "top_k", "temperature", "adapters", "gate_mode", "training"):
        assert getattr(loaded, name) == getattr(artefact, name)
    for key, rows in artefact.rows.items():
        assert torch.equal(loaded.rows[key], rows)
    assert torch.equal(loaded.background["mean/layer.0"], artefact.background["mean/layer.0"])
    assert loaded.row_digests() == artefact.row_digests()


def test_whoever_may_read_the_record_may_read_the_rows(tmp_path: Path) -> None:
    """A server often runs as somebody else than the trainer."""
    save_artefact(make_artefact(), tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_what_a_kill_left_half_written_goes_and_a_full_disk_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "router.jsonk2j3.tmp").write_text("half", encoding="utf-8")
    save_artefact(make_artefact(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["router.json", "router.safetensors"]

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*router\.safetensors'"):
        save_artefact(make_artefact(temperature=2.0), tmp_path)
    assert load_artefact(tmp_path).temperature == make_artefact().temperature


def make_prompt_gate(num_choices: int = 3) -> PromptGate:
    scores = torch.randn(12, num_choices, generator=torch.Generator().manual_seed(2)).half()
    settings = PromptGateSettings(switch=0.01, switch_at_lines=0.1, max_question_tokens=5)
    return PromptGate(scores, ChatFrame((7, 8), 9, (9, 6), ((2, 1),)), settings, answer_ends=(1, 2, 0)[:num_choices])


def test_a_prompt_gate_is_saved_and_loaded_exactly(tmp_path: Path) -> None:
    artefact = make_artefact(prompt_gate=make_prompt_gate())
    save_artefact(artefact, tmp_path)
    loaded = load_artefact(tmp_path)
    assert loaded.prompt_gate is not None
    assert torch.equal(loaded.prompt_gate.scores, make_prompt_gate().scores)
    assert loaded.prompt_gate.record() == make_prompt_gate().record()
    assert (loaded.settings, loaded.row_digests()) == (artefact.settings, artefact.row_digests())


def with_statistics(**changes: Any) -> RouterArtefact:
    statistics = replace(summarise_questions([([1, 2, 2], 0), ([5], 2)], torch.eye(12), 3), **changes)
    return make_artefact(prompt_gate=replace(make_prompt_gate(), statistics=statistics))


def test_statistics_of_questions_are_saved_and_loaded_exactly_and_change_no_gate(tmp_path: Path) -> None:
    artefact = with_statistics()
    save_artefact(artefact, tmp_path)
    loaded = load_artefact(tmp_path).prompt_gate
    assert loaded is not None
    assert artefact.prompt_gate is not None
    assert loaded.statistics is not None
    assert artefact.prompt_gate.statistics is not None
    assert loaded.statistics.questions == artefact.prompt_gate.statistics.questions
    saved = artefact.prompt_gate.statistics.tensors()
    assert saved.keys() == loaded.statistics.tensors().keys() >= {"frequency", "features"}
    assert all(torch.equal(value, saved[name]) for name, value in loaded.statistics.tensors().items())
    without = make_artefact(prompt_gate=make_prompt_gate())
    assert (artefact.settings, artefact.row_digests()) == (without.settings, without.row_digests())


def test_statistics_of_questions_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_artefact(with_statistics(frequency=torch.ones(13) / 13), tmp_path)
    with pytest.raises(RouterArtefactError, match=r"question statistics: frequency is \(13,\)"):
        load_artefact(tmp_path)


def test_a_prompt_gate_is_part_of_what_identifies_gates() -> None:
    plain, gated = make_artefact(), make_artefact(prompt_gate=make_prompt_gate())
    assert plain.settings != gated.settings
    moved = make_prompt_gate().scores
    moved[3, 1] += 1
    changed = make_artefact(prompt_gate=replace(make_prompt_gate(), scores=moved))
    same = [digest for digest, value in changed.row_digests().items() if value == gated.row_digests()[digest]]
    assert same == ["d1", "base"]


@pytest.mark.parametrize(
    ("scores", "problem"),
    [
        (make_prompt_gate(2).scores, r"\(12, 2\), not float16 \(vocabulary, 3\)"),
        (make_prompt_gate().scores.float(), "float32"),
        (make_prompt_gate().scores * float("nan"), "non-finite"),
    ],
)
def test_a_prompt_gate_that_does_not_fit_is_refused(tmp_path: Path, scores: torch.Tensor, problem: str) -> None:
    save_artefact(make_artefact(prompt_gate=replace(make_prompt_gate(), scores=scores)), tmp_path)
    with pytest.raises(RouterArtefactError, match=problem):
        load_artefact(tmp_path)


def test_a_prompt_gate_that_tells_answers_of_other_choices_is_refused(tmp_path: Path) -> None:
    save_artefact(make_artefact(prompt_gate=replace(make_prompt_gate(), answer_ends=(1, 2))), tmp_path)
    with pytest.raises(RouterArtefactError, match="answer_ends are 2, not one per choice"):
        load_artefact(tmp_path)


def test_a_prompt_gate_without_its_scores_is_refused(tmp_path: Path) -> None:
    save_artefact(make_artefact(prompt_gate=make_prompt_gate()), tmp_path)
    save_file({"gate/layer.0": torch.zeros(3, 16), "gate/layer.1": torch.zeros(3, 16)}, tmp_path / "router.safetensors")
    with pytest.raises(RouterArtefactError, match="prompt_gate/scores"):
        load_artefact(tmp_path)


def test_equal_artefacts_have_equal_bytes(tmp_path: Path) -> None:
    reordered = replace(make_artefact(), rows=dict(reversed(list(make_artefact().rows.items()))))
    save_artefact(make_artefact(), tmp_path / "one")
    save_artefact(reordered, tmp_path / "two")
    for name in ("router.json", "router.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(RouterArtefactError, match=r"no router artefact in .*nowhere"):
        load_artefact(tmp_path / "nowhere")


def test_a_truncated_tensor_file_is_refused(tmp_path: Path) -> None:
    save_artefact(make_artefact(), tmp_path)
    file = tmp_path / "router.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(RouterArtefactError, match="damaged"):
        load_artefact(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 99}', '{"format_version": 1}'])
def test_a_json_that_is_no_router_record_is_refused(tmp_path: Path, text: str) -> None:
    save_artefact(make_artefact(), tmp_path)
    (tmp_path / "router.json").write_text(text)
    with pytest.raises(RouterArtefactError):
        load_artefact(tmp_path)


@pytest.mark.parametrize("training", [[1, 2], "x", 3])
def test_a_training_record_that_is_no_object_is_refused(tmp_path: Path, training: object) -> None:
    """The server shows it to whoever asks for the router: found out then, the swap would have happened."""
    save_artefact(make_artefact(), tmp_path)
    path = tmp_path / "router.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "training": training}))
    with pytest.raises(RouterArtefactError, match="training is no object"):
        load_artefact(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"granularity": "token"}, "granularity 'token'"),
        ({"gate_mode": "unit"}, "gate_mode 'unit'"),
        ({"top_k": 4}, r"top_k 4 is outside 1\.\.3"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": 1e-310}, "temperature 1e-310 is not a number from 0.0001 to 10000"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save_artefact(make_artefact(), tmp_path)
    record = json.loads((tmp_path / "router.json").read_text())
    (tmp_path / "router.json").write_text(json.dumps(record | change))
    with pytest.raises(RouterArtefactError, match=message):
        load_artefact(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(2, 16), "not float32"),
        (torch.zeros(3, 16, dtype=torch.float16), "not float32"),
        (torch.zeros(3, 9), "width 9"),
        (torch.full((3, 16), torch.nan), "non-finite"),
        (torch.full((3, 16), -1e38), r"values up to 1e\+38"),
    ],
)
def test_bad_gate_rows_are_refused_by_name(tmp_path: Path, rows: torch.Tensor, message: str) -> None:
    save_artefact(make_artefact(), tmp_path)
    save_file({"gate/layer.1": rows}, tmp_path / "router.safetensors")
    with pytest.raises(RouterArtefactError, match=f"gate 'layer.1'.*{message}"):
        load_artefact(tmp_path)


def test_a_full_disk_leaves_the_old_artefact_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_artefact(make_artefact(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls: list[int] = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    changed = {key: rows + 1 for key, rows in make_artefact().rows.items()}
    with pytest.raises(OSError, match="No space"):
        save_artefact(replace(make_artefact(), rows=changed), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_base_is_refused_with_every_difference() -> None:
    with pytest.raises(RouterArtefactError, match=r"base model 'tiny/llama'.*hidden size 16.*number of layers 2"):
        check_base(make_artefact(), base_model="other/llama", hidden_size=32, num_layers=3)
    check_base(make_artefact(), base_model="tiny/llama", hidden_size=16, num_layers=2)


def test_rows_land_in_the_slots_of_their_digests() -> None:
    artefact = make_artefact()
    bank = RouterBank(num_slots=6, device=torch.device("cpu"))
    generation = bank.stage(4, artefact, {"d2": 5, "d1": 3, "unknown": 1})
    rows = generation.rows["layer.1"]
    assert torch.equal(rows[3], artefact.rows["layer.1"][0])
    assert torch.equal(rows[5], artefact.rows["layer.1"][1])
    assert torch.equal(rows[0], artefact.rows["layer.1"][2]), "the null expert stands in the base slot"
    assert not rows[[1, 2, 4]].any()
    assert generation.slots == {0, 3, 5}
    assert generation.row_digest_of_slot[5] == artefact.row_digests()["d2"]


def test_generations_come_and_go_without_touching_each_other() -> None:
    bank = RouterBank(num_slots=6, device=torch.device("cpu"))
    first, second = bank.stage(1, make_artefact(), {"d1": 1}), bank.stage(2, make_artefact(), {"d1": 2})
    bank.publish(first)
    seen = bank.generations
    bank.publish(second)
    assert set(seen) == {1}
    assert set(bank.generations) == {1, 2}
    bank.drop(1)
    assert bank.generations[2] is second


def test_a_layer_router_has_a_gate_for_every_projection_of_its_layers() -> None:
    generation = RouterBank(num_slots=4, device=torch.device("cpu")).stage(1, make_artefact(), {"d1": 1})
    assert generation.key(ProjectionInfo("layers.1.mlp.up_proj", 16, 32, 1, False)) in generation.rows
    assert generation.key(ProjectionInfo("layers.2.mlp.up_proj", 16, 32, 2, False)) not in generation.rows


def hot_row(seed: int, bias: float) -> HotRow:
    generator = torch.Generator().manual_seed(seed)
    return HotRow({key: GateColumn(torch.randn(16, generator=generator), bias) for key in make_artefact().rows})


def test_hot_rows_stand_beside_trained_ones_that_keep_every_bit() -> None:
    bank = RouterBank(num_slots=6, device=torch.device("cpu"))
    slots = {"d1": 1, "d2": 2}
    plain, hot = bank.stage(1, make_artefact(), slots), bank.stage(1, make_artefact(), slots, {4: hot_row(0, -2.5)})
    assert plain.biases == {}
    assert hot.slots == {0, 1, 2, 4}
    assert hot.row_digest_of_slot == {**plain.row_digest_of_slot, 4: hot_row(0, -2.5).digest}
    tokens = torch.randn(7, 16, generator=torch.Generator().manual_seed(9))
    for key, rows in hot.rows.items():
        assert torch.equal(rows[[0, 1, 2, 3, 5]], plain.rows[key][[0, 1, 2, 3, 5]])
        assert torch.equal(rows[4], hot_row(0, -2.5).columns[key].row)
        assert hot.biases[key].tolist() == [0, 0, 0, 0, -2.5, 0]
        logits = tokens @ rows.T + hot.biases[key]
        assert torch.equal(logits[:, [0, 1, 2]], (tokens @ plain.rows[key].T)[:, [0, 1, 2]])


def test_hot_rows_commute() -> None:
    bank = RouterBank(num_slots=6, device=torch.device("cpu"))
    one, other = {3: hot_row(1, 1.0)}, {5: hot_row(2, -1.0)}
    first = bank.stage(1, make_artefact(), {"d1": 1}, {**one, **other})
    second = bank.stage(1, make_artefact(), {"d1": 1}, {**other, **one})
    for key in first.rows:
        assert torch.equal(first.rows[key], second.rows[key])
        assert torch.equal(first.biases[key], second.biases[key])
    assert first.row_digest_of_slot == second.row_digest_of_slot


def prompted(seed: int, token: int) -> HotRow:
    """A row whose column in the prompt gate speaks for one token."""
    column = torch.zeros(12, dtype=torch.float16)
    column[token] = 20.0
    return replace(hot_row(seed, 0.0), prompt_column=column)


def spans_of(hot: dict[int, HotRow], slots: dict[str, int], question: list[int], without: set[int] = set()) -> Any:  # noqa: B006
    """(stop, slots, fingerprint) of the spans of a prompt [7, 8, *question, 9] for the pool of all but some slots."""
    generation = RouterBank(num_slots=6, device=torch.device("cpu")).stage(
        1, make_artefact(prompt_gate=make_prompt_gate()), slots, hot
    )
    allowed = {slot: f"slot {slot}" for slot in generation.slots - without}
    plan = routed_plan(allowed, generation.row_digest_of_slot, 1, "settings", 2)
    spans = generation.prompt_course(plan, [7, 8, *question, 9]).spans
    return [(span.stop, span.plan.slots, span.plan.fingerprint) for span in spans]


def test_a_newcomers_column_takes_part_in_the_prompt_gate() -> None:
    slots = {"d1": 1, "d2": 2, "new": 3}
    assert [found[:2] for found in spans_of({3: prompted(0, 6)}, slots, [6, 6, 6])] == [(ENDLESS, (3,))]
    assert spans_of({3: hot_row(0, 0.0)}, slots, [6, 6, 6]) == [], "without a column it silences the gate"
    trained = [4] * 5
    assert spans_of({3: prompted(0, 6)}, slots, trained, without={3}) == spans_of({}, slots, trained) != []


def test_how_answers_end_follows_the_slots() -> None:
    bank = RouterBank(num_slots=6, device=torch.device("cpu"))
    artefact = make_artefact(prompt_gate=make_prompt_gate())
    staged = bank.stage(1, artefact, {"d1": 4, "d2": 2, "new": 3}, {3: prompted(0, 6)})
    assert staged.answer_ends_of_slot == {4: 1, 2: 2, 3: 2}, "of a newcomer an empty line is a guess"
    assert 0 not in staged.answer_ends_of_slot, "no row of line ends is the end of a base model's answer here"
    assert bank.stage(1, make_artefact(), {"d1": 4}).answer_ends_of_slot == {}


def test_columns_of_newcomers_commute_and_follow_their_slots() -> None:
    one, other = prompted(1, 5), prompted(2, 6)
    first = spans_of({3: one, 4: other}, {"d1": 1, "d2": 2, "one": 3, "other": 4}, [5, 5, 6, 6])
    second = spans_of({3: other, 4: one}, {"d1": 1, "d2": 2, "one": 4, "other": 3}, [5, 5, 6, 6])
    assert [found[1] for found in first] == [(3,), (4,)]
    assert [found[1] for found in second] == [(4,), (3,)]
    assert [found[::2] for found in first] == [found[::2] for found in second]


def test_spans_are_told_apart_by_the_adapter_not_by_its_row() -> None:
    """Other weights under an equal row give other K/V; so the prefix cache must not mix them."""
    slots, row = {"d1": 1, "d2": 2}, {3: prompted(0, 6)}
    old, new = (spans_of(row, {**slots, digest: 3}, [6, 6, 6]) for digest in ("old", "new"))
    assert old[0][:2] == new[0][:2]
    assert old[0][2] != new[0][2]


def test_artefacts_of_format_1_still_load(tmp_path: Path) -> None:
    save_artefact(make_artefact(), tmp_path)
    record = json.loads((tmp_path / "router.json").read_text())
    assert record["format_version"] == 2
    (tmp_path / "router.json").write_text(json.dumps({**record, "format_version": 1}))
    assert load_artefact(tmp_path).row_digests() == make_artefact().row_digests()
