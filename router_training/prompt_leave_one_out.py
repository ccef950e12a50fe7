"""What a prompt-gate column without training is worth: each adapter in turn is a newcomer to a gate that never saw it.

Fits prompt gates alone and runs no model: who gets which tokens of validation questions. Run with
`python -m router_training.prompt_leave_one_out --data DIR` and the settings of a training run, which tell the mix;
writes JSON and renders a table of docs/hot-routing.md.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from router_training.background import CHATS_PER_ADAPTER
from router_training.data import Chat, read_splits
from router_training.encoding import TokenSequence, encode_chats
from router_training.flags import add_settings, add_sources, config_from, settings_from
from router_training.frames import chat_frame
from router_training.leave_one_out import replace_table
from router_training.mixing import draw_question_mixes, encode_mix, question_settings
from router_training.prompt_fit import fit_prompt_gate
from router_training.report import markdown_table
from router_training.roster import BASE_TASK
from router_training.run import write_json
from router_training.settings import TrainingConfig
from server.adapters.examples import encode_examples
from server.config import ServerConfig, cache_folder
from server.model.loader import LoadedModel, load_base_model
from server.routing.chat_frame import ChatFrame
from server.routing.prompt_columns import base_place, column_from_questions, make_column, shares
from server.routing.prompt_gate import PromptGate

COUNTS = (4, 16, 64)
TABLE_START, TABLE_END = "<!-- prompt leave-one-out: begin -->\n", "<!-- prompt leave-one-out: end -->\n"
Given = dict[str, float]
"""Shares from 0 to 1 of the tokens of a task's questions: given to its `own` choice, to `others`, and left to the
`router`."""


@dataclass(frozen=True)
class Material:
    """Everything that the gates are fitted on and judged by."""

    embeddings: Tensor
    frame: ChatFrame
    tasks: tuple[str, ...]
    """In the order of a whole gate's columns."""
    draws: Sequence[Sequence[TokenSequence]]
    """The mixes that prompt gates are fitted on, labelled with places in `tasks`."""
    examples: Mapping[str, Sequence[Sequence[int]]]
    """Rendered examples of every adapter, as many as the largest count."""
    validation: Mapping[str, Sequence[Sequence[int]]]
    """Questions of every task."""
    seed: int

    def fit(self, left_out: int | None) -> PromptGate:
        """A gate of all tasks, or of all but one, from the chats that have nothing to do with that one."""
        kept = [label for label in range(len(self.tasks)) if label != left_out]
        place = {label: index for index, label in enumerate(kept)}
        draws = [
            [
                dataclasses.replace(
                    sequence,
                    label=place[sequence.label],
                    label_changes=tuple((position, place[label]) for position, label in sequence.label_changes),
                )
                for sequence in sequences
                if {sequence.label, *(label for _, label in sequence.label_changes)} <= set(kept)
            ]
            for sequences in self.draws
        ]
        names = [self.tasks[label] for label in kept]
        return fit_prompt_gate(self.embeddings, draws, self.frame, first_slot=0, names=names, seed=self.seed)


def gather(config: ServerConfig, data: Sequence[Path], settings: TrainingConfig, rows: int) -> Material:
    """The mixes that a training run with these settings fits its prompt gate on, and the first `rows` validation chats
    of every task."""
    names = [spec.name for spec in config.adapters if spec.routed]
    tasks = [*([BASE_TASK] if settings.null_expert else []), *names]
    splits = read_splits(data, tasks)
    mixes = draw_question_mixes(splits["train"], settings)
    whole = question_settings(settings)
    loaded = load_base_model(config.base_model, device="cpu", cache_folder=cache_folder(), root=config.root)
    labels = {task: label for label, task in enumerate(tasks)}
    frame = chat_frame(loaded.tokenizer)
    model: Any = loaded.model
    return Material(
        embeddings=model.get_input_embeddings().weight.detach(),
        frame=frame,
        tasks=tuple(tasks),
        draws=[encode_mix(mix, labels, loaded.tokenizer, loaded.eos_token_ids, whole) for mix in mixes],
        examples={name: _examples(splits["train"][name], loaded) for name in names},
        validation={
            task: _questions(encode_chats(chats[:rows], labels, loaded.tokenizer, loaded.eos_token_ids), frame)
            for task, chats in splits["validation"].items()
        },
        seed=settings.seed,
    )


def measure(material: Material, whole: PromptGate, name: str) -> dict[str, Any]:
    """One adapter held out: what the gate gives of its questions and of each other task's, per count of examples."""
    label = material.tasks.index(name)
    gate = material.fit(label)
    others = [task for task in material.tasks if task != name]
    cases = {}
    for count in COUNTS:
        prompts = material.examples[name][:count]
        _, verdict = make_column(prompts, gate, others)
        assert gate.statistics is not None
        # The canary's verdict stands beside what the column would do, not in its place.
        spans = [(prompt, material.frame.question(prompt)) for prompt in prompts]
        questions = [prompt[span[0] : span[1]] for prompt, span in spans if span is not None]
        column = column_from_questions(questions, gate, gate.statistics)
        cases[str(count)] = {
            "tokens": _given_to(gate, column, others, name, material.validation),
            "canary": verdict.facts(),
        }
    return {
        "trained": given(whole, None, material.validation[name], label, base_place(material.tasks)),
        "without": _given_to(gate, None, others, name, material.validation),
        "examples": cases,
    }


def given(
    gate: PromptGate, column: Tensor | None, questions: Sequence[Sequence[int]], own: int | None, base: int | None
) -> Given:
    """`own` is a place among the gate's choices and behind them the column's; None for a task with neither. `base` is
    the base model's place."""
    found = shares(gate, column, questions, base)
    mine = 0.0 if own is None else found[own]
    return {"own": mine, "others": sum(found) - mine, "router": 1 - sum(found)}


def table(record: dict[str, Any]) -> str:
    """Own, others' and router's share in percent, of the newcomer's questions and of the other tasks', the mean."""
    header = ["held out", "trained", *(f"{count} ex." for count in COUNTS)]
    header += ["others before", *(f"others, {count} ex." for count in COUNTS)]
    rows = []
    for name, case in record["adapters"].items():
        found = [case["examples"][str(count)] for count in COUNTS]
        marks = ["*" if one["canary"]["state"] == "refused" else "" for one in found]
        cells = [name, _cell(case["trained"])]
        cells += [_cell(one["tokens"][name]) + mark for one, mark in zip(found, marks, strict=True)]
        cells += [_cell(_mean_of_others(tokens, name)) for tokens in (case["without"], *(o["tokens"] for o in found))]
        rows.append(cells)
    return markdown_table(header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m router_training.prompt_leave_one_out", description=__doc__)
    add_sources(parser)
    add_settings(parser)
    parser.add_argument("--only", nargs="*", metavar="NAME", help="adapters to hold out (default: all)")
    parser.add_argument("--rows", type=int, default=60, help="validation chats of every task (default 60)")
    default = Path("benchmarks/results/prompt_leave_one_out.json")
    parser.add_argument("--out", type=Path, default=default, metavar="FILE")
    parser.add_argument("--document", type=Path, metavar="FILE", help="Markdown file whose table is replaced")
    options = parser.parse_args(arguments)
    settings = settings_from(options, TrainingConfig).model_copy(update={"prompt_gate": True})
    material = gather(config_from(options), options.data, settings, options.rows)
    record = json.loads(options.out.read_text()) if options.out.exists() else {"adapters": {}}
    record |= {"rows": options.rows, "settings": settings.record()}
    whole = material.fit(None)
    for name in material.examples:
        if not options.only or name in options.only:
            record["adapters"][name] = measure(material, whole, name)
            write_json(record, options.out)
            print(table(record), flush=True)
    if options.document is not None:
        replace_table(options.document, table(record), TABLE_START, TABLE_END)


def _examples(chats: Sequence[Chat], loaded: LoadedModel) -> list[tuple[int, ...]]:
    """Those that `leave_one_out` gives the server, encoded as the server does."""
    chosen = chats[CHATS_PER_ADAPTER:][: max(COUNTS)]
    raw = [{"messages": [dict(message) for message in chat.messages]} for chat in chosen]
    return [example.token_ids for example in encode_examples(raw, loaded.tokenizer)]


def _questions(sequences: Sequence[TokenSequence], frame: ChatFrame) -> list[tuple[int, ...]]:
    spans = [(sequence.token_ids, frame.question(sequence.token_ids)) for sequence in sequences]
    return [tokens[span[0] : span[1]] for tokens, span in spans if span is not None]


def _given_to(
    gate: PromptGate,
    column: Tensor | None,
    others: Sequence[str],
    name: str,
    validation: Mapping[str, Sequence[Sequence[int]]],
) -> dict[str, Given]:
    """By task; `others` are the gate's choices and `name` the column's."""
    places: dict[str, int | None] = {task: index for index, task in enumerate(others)}
    places[name] = None if column is None else len(others)
    base = base_place(others)
    return {task: given(gate, column, questions, places[task], base) for task, questions in validation.items()}


def _mean_of_others(tokens: Mapping[str, Given], name: str) -> Given:
    found = [values for task, values in tokens.items() if task != name]
    return {key: sum(values[key] for values in found) / len(found) for key in found[0]}


def _cell(values: Given) -> str:
    return " / ".join(f"{100 * abs(values[key]):.0f}" for key in ("own", "others", "router"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
