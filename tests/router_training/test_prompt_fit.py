"""The prompt gate as it is trained: where a template puts questions, the chain's two forms, and serving's own spans."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from router_training import prompt_fit
from router_training.answer_ends import answer_ends
from router_training.artefact import build_artefact
from router_training.chain_loss import Question
from router_training.encoding import TokenSequence, collate
from router_training.evaluation import gate_batch, plans_of_tokens
from router_training.forward import answer_losses
from router_training.frames import chat_frame, line_ends_behind
from router_training.gates import RouterParameters, TrainingBatch
from router_training.mixing import QUESTION_MIXES
from router_training.prompt_fit import (
    BATCH_SIZE,
    LONGEST,
    UNGUIDED_EVERY,
    PromptReader,
    balanced_batches,
    fit_prompt_gate,
    guide_of,
    num_steps,
)
from router_training.roster import FIRST_SLOT, Roster
from router_training.settings import TrainingConfig
from server.errors import ConfigError
from server.model.tokenizer import ChatTokenizer
from server.routing.chat_frame import ChatFrame
from server.routing.plan_course import plan_runs
from server.routing.prompt_gate import PromptGate
from server.routing.router import load_artefact
from tests.router_training.conftest import TOKENS_PER_TASK, byte_tokenizer
from tests.router_training.test_run import QUICK, run

pytestmark = pytest.mark.usefixtures("short_fits")

FRAME = ChatFrame((200, 201), 202)
NAMES = ("digits", "letters", "signs")
Sequences = Callable[..., list[TokenSequence]]


def framed(sequences: list[TokenSequence]) -> list[TokenSequence]:
    """The sequences with a question of the same tokens before them."""
    return [
        replace(s, token_ids=(*FRAME.header, *s.token_ids, FRAME.end, *s.token_ids), answer_start=len(s) + 5)
        for s in sequences
    ]


def fit(roster: Roster, sequences: list[TokenSequence], seed: int = 0) -> PromptGate:
    # A tiny model's embeddings have few dimensions: many short passes over the chats make up for it.
    return fit_prompt_gate(
        roster.routed.model.get_input_embeddings().weight,  # type: ignore[operator]
        [sequences * 20, sequences[::-1] * 20],
        FRAME,
        first_slot=FIRST_SLOT,
        names=NAMES,
        seed=seed,
    )


@pytest.mark.parametrize(
    ("text", "count"),
    [(b"\n", 1), (b"\n\n", 2), (b" \n  \n ", 2), (b".\n", 1), (b"}\n\n", 2), (b"\na", 0), (b" a", 0), (b"", 0)],
)
def test_line_ends_are_those_that_a_token_ends_with(text: bytes, count: int) -> None:
    """Some tokenizers join them to the sign before."""
    assert line_ends_behind(text) == count


def test_where_answers_of_a_task_end_is_counted_in_its_answers() -> None:
    frame = replace(FRAME, line_ends=((7, 1), (8, 2)))

    def answer(label: int, *tokens: int, changes: tuple[tuple[int, int], ...] = ()) -> TokenSequence:
        return TokenSequence((1, 7, 8, *tokens), 3, label, changes)

    sequences = [
        *[answer(1, 5, 5, FRAME.end, 7)] * 3,
        answer(1, 5, 7, 5, FRAME.end),
        *[answer(2, 5, 7, 5, 7, 5, 7, 5)] * 3,
        answer(2, 5, 8, 5, 7, 7, 5),
        answer(3, 5, 8, 5, 7, 7, 5, 8, 5),
        answer(4, 8, 8, changes=((4, 1),)),
    ]
    ends = answer_ends(frame, sequences, first_slot=1, num_choices=4)
    assert ends == (1, 2, 0, 0), "a line, an empty line, neither, and no answer of its own"


def of_group(group: int, number: int, length: int = 3) -> Question:
    """Question `number` of a choice, of more than one where `group` is -1; its tokens tell which one it is."""
    labels = torch.full((length,), group) if group >= 0 else torch.arange(length)
    return torch.full((length,), 1000 * (group + 1) + number), labels


@given(st.lists(st.integers(1, 100), min_size=1, max_size=4), st.booleans(), st.integers(1, 4), st.integers())
def test_choices_take_turns_in_batches_and_each_question_comes_once_before_any_comes_twice(
    counts: list[int], has_mixed: bool, steps: int, seed: int
) -> None:
    sizes = {group - has_mixed: count for group, count in enumerate(counts)}
    questions = [of_group(group, number) for group, count in sizes.items() for number in range(count)]
    batches = list(balanced_batches(questions, steps, seed))
    assert [len(batch) for batch in batches] == [BATCH_SIZE] * steps
    drawn = [divmod(int(tokens[0]), 1000) for batch in batches for tokens, _ in batch]
    groups = sorted(sizes)
    assert [group - 1 for group, _ in drawn] == [groups[place % len(groups)] for place in range(len(drawn))]
    for group, size in sizes.items():
        own = [number for drawn_group, number in drawn if drawn_group - 1 == group]
        for start in range(0, len(own), size):
            deal = own[start : start + size]
            assert len(set(deal)) == len(deal)


def test_batches_follow_from_the_seed() -> None:
    questions = [of_group(group, number) for group in (-1, 0, 1) for number in range(50)]

    def drawn(seed: int) -> list[list[int]]:
        return [[int(tokens[0]) for tokens, _ in batch] for batch in balanced_batches(questions, 3, seed)]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_long_questions_give_their_beginning_or_a_stretch_from_anywhere() -> None:
    long, short = torch.arange(3 * LONGEST), torch.arange(LONGEST)
    ((*stretches,),) = balanced_batches([(long, long % 2)], 1, seed=0)
    starts = [int(tokens[0]) for tokens, _ in stretches]
    for start, (tokens, labels) in zip(starts, stretches, strict=True):
        assert torch.equal(tokens, long[start : start + LONGEST])
        assert torch.equal(labels, tokens % 2)
    assert BATCH_SIZE // 4 < starts.count(0) < 3 * BATCH_SIZE // 4
    assert max(starts) > LONGEST
    ((first, *_),) = balanced_batches([(short, short)], 1, seed=0)
    assert torch.equal(first[0], short)


def test_few_questions_are_seen_often_enough_to_be_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_fit, "MIN_STEPS", 600)
    assert [num_steps(count) for count in (1, 6000, 12_000)] == [600, 600, 1167]
    assert prompt_fit.recipe(6000) != prompt_fit.recipe(12_000) == prompt_fit.RECIPE


def test_the_frame_is_what_the_template_puts_around_a_question() -> None:
    tokenizer = ChatTokenizer(byte_tokenizer())
    frame = chat_frame(tokenizer)
    assert tokenizer.decode(frame.header, skip_special_tokens=False) == "<|im_start|>user\n"
    assert tokenizer.decode([frame.end], skip_special_tokens=False) == "<|im_end|>"
    assert tokenizer.decode(frame.answer, skip_special_tokens=False) == "<|im_end|>\n<|im_start|>assistant\n"
    for messages in (
        [{"role": "user", "content": "what now?"}],
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what now?"}],
        [{"role": "user", "content": "what now?"}, {"role": "assistant", "content": "this"}],
    ):
        tokens = tokenizer.render_chat(messages)
        start, stop = frame.question(tokens) or (0, 0)
        assert tokenizer.decode(tokens[start:stop]) == "what now?"


@pytest.mark.parametrize(
    "template",
    ["{% for message in messages %}{{ message['content'] }}{% endfor %}", "{{ raise_exception('no system') }}", None],
    ids=["no marks", "refuses", "none"],
)
def test_a_template_without_a_frame_is_refused(template: str | None) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=r"no prompt gate for this base model: .*"):
        chat_frame(ChatTokenizer(tokenizer))


def test_the_gate_tells_tasks_apart_and_sees_where_they_change(roster: Roster, make_sequences: Sequences) -> None:
    gate = fit(roster, framed(make_sequences(60)))
    assert gate.scores.shape == (roster.loaded.vocab_size, 3)
    for held_out in make_sequences(9, seed=5):
        posterior = gate.posterior(held_out.token_ids, gate.scores.unbind(dim=1)).tokens
        assert posterior[:, held_out.label - FIRST_SLOT].min() > gate.settings.confidence
    first, second = (list(range(task * TOKENS_PER_TASK, (task + 1) * TOKENS_PER_TASK)) * 12 for task in (0, 2))
    both = gate.posterior([*first, *second], gate.scores.unbind(dim=1)).tokens.argmax(axis=1).tolist()
    assert both == [0] * len(first) + [2] * len(second)


def test_the_gate_carries_statistics_of_questions_of_one_choice(roster: Roster, make_sequences: Sequences) -> None:
    """A question of two tasks belongs to neither, and must not be what a newcomer is judged by."""
    sequences = framed(make_sequences(6))
    middle = len(sequences[0]) // 4
    joined = replace(sequences[0], label_changes=((middle, 2 + sequences[0].label % 3),))
    statistics = fit(roster, [*sequences, joined]).statistics
    assert statistics is not None
    own = {(s.token_ids[2 : s.token_ids.index(FRAME.end)], s.label - FIRST_SLOT) for s in sequences}
    assert {(tuple(tokens), choice) for tokens, choice in statistics.questions} == own
    shares = [
        np.bincount([t for tokens, label in own if label == choice for t in tokens], minlength=roster.loaded.vocab_size)
        for choice in range(3)
    ]
    expected = np.mean([share / share.sum() for share in shares], axis=0)
    np.testing.assert_allclose(statistics.frequency.numpy(), expected, rtol=1e-6)


def test_a_gate_of_mixed_questions_alone_has_no_statistics(roster: Roster, make_sequences: Sequences) -> None:
    sequences = framed(make_sequences(6))
    mixed = [replace(s, label_changes=((5, 1 + s.label % 3),)) for s in sequences]
    assert fit(roster, mixed).statistics is None


def test_one_seed_gives_one_gate_and_another_seed_another(roster: Roster, make_sequences: Sequences) -> None:
    sequences = framed(make_sequences(60))
    first, again, other = (fit(roster, sequences, seed) for seed in (0, 0, 1))
    assert torch.equal(first.scores, again.scores)
    assert not torch.equal(first.scores, other.scores)


def test_a_gate_is_the_mean_of_its_fits(
    roster: Roster, make_sequences: Sequences, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = framed(make_sequences(60))
    embeddings = roster.routed.model.get_input_embeddings().weight  # type: ignore[operator]

    def scores(draws: Sequence[list[TokenSequence]], seed: int) -> torch.Tensor:
        return fit_prompt_gate(embeddings, draws, FRAME, first_slot=FIRST_SLOT, names=NAMES, seed=seed).scores.float()

    dropped = scores([sequences, sequences], 2)
    monkeypatch.setattr(prompt_fit, "DROPOUT", 0.0)  # tokens are dropped for all fits at once
    alone = [scores([sequences], seed) for seed in (4, 5)]
    together = scores([sequences, sequences], 2)
    assert not torch.equal(together, dropped)
    mean = (alone[0] + alone[1]) / 2
    assert (together - mean).abs().mean() < 0.1 * (alone[0] - mean).abs().mean(), "but for float16"


def test_chats_without_questions_are_refused(roster: Roster, make_sequences: Sequences) -> None:
    with pytest.raises(ConfigError, match=r"letters.* have no first question"):
        fit(roster, make_sequences(6))
    embeddings = roster.routed.model.get_input_embeddings().weight  # type: ignore[operator]
    for draws in ([], [framed(make_sequences(6)), make_sequences(6)]):
        with pytest.raises(ConfigError, match=r"letters.* have no first question"):
            fit_prompt_gate(embeddings, draws, FRAME, first_slot=FIRST_SLOT, names=NAMES, seed=0)


def test_the_trainers_gates_are_the_servers_spans(roster: Roster, make_sequences: Sequences) -> None:
    """Training, evaluation and generation give the same tokens to the same adapters."""
    sequences = framed(make_sequences(8))
    gate = fit(roster, framed(make_sequences(60)))
    batch = collate(sequences)
    longest = batch.token_ids.shape[1]
    fixed, decides = PromptReader(gate, roster, top_k=3).fixed_gates(sequences, longest)
    router = RouterParameters.zeros(roster.gated_projections(), "layer", 3, hidden_size=roster.routed.hidden_size)
    config = TrainingConfig(top_k=3)
    plans = roster.routed_plans(build_artefact(router.detached(), roster, config, prompt_gate=gate))
    expected = torch.zeros(len(sequences), longest, roster.routed.num_slots)
    for row, sequence in enumerate(sequences):
        spans = roster.routed.routers.prompt_course(plans[0], sequence.token_ids).spans
        assert spans, "the gate has learnt these tasks"
        start = 0
        for plan, count in plan_runs(spans, plans[0], 0, spans[-1].stop):
            for slot, weight in plan.weights:
                expected[row, start : start + count, slot] = weight
            start += count
    assert torch.equal(fixed.view_as(expected), expected)
    assert torch.equal(decides, expected.sum(dim=2).flatten() > 0)

    gates = gate_batch(roster.routed, batch, plans)
    assert gates is not None
    with torch.inference_mode():
        answer_losses(roster.routed, batch, gates)
    assert torch.allclose(gates.share[decides], fixed[decides])
    assert torch.allclose(gates.share[~decides][:, FIRST_SLOT:], torch.tensor(1 / 3))

    courses = [roster.routed.routers.prompt_course(plans[s.label], s.token_ids) for s in sequences]
    starts = [longest - len(sequence) for sequence in sequences]
    all_plans, plan_of_token = plans_of_tokens(plans, batch.labels, courses, starts)
    for row, sequence in enumerate(sequences):
        own = [all_plans[index] for index in plan_of_token[row, longest - len(sequence) :].tolist()]
        is_fixed = decides.view(len(sequences), longest)[row, : len(sequence)].tolist()
        assert [plan != plans[0] for plan in own] == is_fixed


def served_gates(roster: Roster, gate: PromptGate, sequence: TokenSequence, *, top_k: int) -> torch.Tensor:
    """Gates (T, E) of one sequence as the server has them, means over layers, under a router that knows nothing."""
    router = RouterParameters.zeros(roster.gated_projections(), "layer", 3, hidden_size=roster.routed.hidden_size)
    artefact = build_artefact(router.detached(), roster, TrainingConfig(top_k=top_k), prompt_gate=gate)
    gates = gate_batch(roster.routed, batch := collate([sequence]), roster.routed_plans(artefact))
    assert gates is not None
    with torch.inference_mode():
        answer_losses(roster.routed, batch, gates)
    return gates.share


def test_the_trainer_knows_whose_turn_it_is(roster: Roster) -> None:
    frame = ChatFrame((200, 201), 202, (202, 203), ((7, 1),))
    scores = torch.zeros(roster.loaded.vocab_size, 3)
    scores[11, 0] = scores[12, 1] = 4.0
    gate = PromptGate(scores.half(), frame, answer_ends=(1, 1, 1))
    tokens = (*frame.header, *[11] * 6, *[12] * 6, *frame.answer, 5, 5, 7, 5)
    sequence = TokenSequence(tokens, len(tokens) - 4, FIRST_SLOT)
    fixed, decides = PromptReader(gate, roster, top_k=3).fixed_gates([sequence], len(tokens))
    first, second = FIRST_SLOT, FIRST_SLOT + 1
    assert decides.tolist() == [True] * 16 + [False, False, True, False]
    assert fixed[decides].argmax(dim=1).tolist() == [first] * 8 + [second] * 6 + [first] * 2 + [second]

    assert torch.allclose(served_gates(roster, gate, sequence, top_k=3)[decides], fixed[decides])


def test_where_the_gate_is_not_sure_the_trainers_gates_have_the_servers_weights(roster: Roster) -> None:
    frame = ChatFrame((200, 201), 202, (202, 203))
    scores = torch.zeros(roster.loaded.vocab_size, 3)
    scores[11, 0] = scores[12, 1] = 0.5
    gate = PromptGate(scores.half(), frame)
    tokens = (*frame.header, *[11] * 6, *[12] * 3, *frame.answer, 5, 5)
    sequence = TokenSequence(tokens, len(tokens) - 2, FIRST_SLOT)
    fixed, decides = PromptReader(gate, roster, top_k=2).fixed_gates([sequence], len(tokens))
    assert decides.tolist() == [True] * 13 + [False] * 2
    assert fixed[decides][:, [FIRST_SLOT, FIRST_SLOT + 1]].tolist() == [[0.875, 0.125]] * 13

    assert torch.allclose(served_gates(roster, gate, sequence, top_k=2)[decides], fixed[decides])


def test_where_the_gate_decides_the_router_learns_nothing(roster: Roster, make_sequences: Sequences) -> None:
    sequences = make_sequences(4)
    batch = collate(sequences)
    num_tokens = batch.token_ids.numel()
    fixed = torch.zeros(num_tokens, roster.routed.num_slots)
    fixed[:, 2] = 1.0
    snapshot = roster.routed.bank.snapshot
    router = RouterParameters.zeros(roster.gated_projections(), "layer", 3, hidden_size=roster.routed.hidden_size)

    def loss(decides: torch.Tensor) -> torch.Tensor:
        training = TrainingBatch(snapshot, router, "dense", top_k=2, temperature=1.0, fixed=(fixed, decides))
        return answer_losses(roster.routed, batch, training).sum()

    everywhere = loss(torch.ones(num_tokens, dtype=torch.bool))
    everywhere.backward()  # type: ignore[no-untyped-call]
    assert all(row.grad is None or not row.grad.any() for row in router.parameters)
    own = gate_batch(roster.routed, batch, [roster.own_adapter_plans()[2]] * len(roster.tasks))
    assert torch.allclose(everywhere, answer_losses(roster.routed, batch, own).sum(), rtol=1e-5)
    loss(torch.zeros(num_tokens, dtype=torch.bool)).backward()  # type: ignore[no-untyped-call]
    assert all(row.grad is not None and row.grad.any() for row in router.parameters)


def test_some_chats_are_trained_without_the_gate(roster: Roster, make_sequences: Sequences) -> None:
    sequences = framed(make_sequences(60))
    guide = guide_of(fit(roster, sequences), roster, sequences[:8], top_k=2)
    assert guide is not None
    decides = guide(sequences[:8], 64)[1].view(8, 64).any(dim=1)
    assert decides.tolist() == [index % UNGUIDED_EVERY != UNGUIDED_EVERY - 1 for index in range(8)]
    assert guide_of(None, roster, sequences, top_k=2) is None


@pytest.mark.parametrize("flags", [[], ["--null-expert"]], ids=["adapters", "null expert"])
def test_train_with_a_prompt_gate_writes_one_that_fits(project: Path, flags: list[str]) -> None:
    if flags:
        folder = project / "data" / "base"
        folder.mkdir()
        for name in ("train.jsonl", "validation.jsonl"):
            lines = (project / "data" / "letters" / name).read_text(encoding="utf-8")
            (folder / name).write_text(lines.replace('"letters"', '"base"'), encoding="utf-8")
    assert run(project, "train", "--out", str(project / "router"), "--prompt-gate", *flags, *QUICK) == 0
    artefact = load_artefact(project / "router")
    assert artefact.training["question_chats"] == 12 * (2 + len(flags)), "of the data, not --samples"
    assert artefact.training["question_mixes"] == QUESTION_MIXES
    assert len(artefact.training["question_sha256"]) == 64
    gate = artefact.prompt_gate
    assert gate is not None
    assert gate.scores.shape[1] == 2 + len(flags)
    assert gate.frame == chat_frame(ChatTokenizer(byte_tokenizer()))
