"""What a gate row without retraining is worth: each adapter in turn loses its trained row and is registered hot.

Trains nothing: the other rows stay as they are, the statistics are made from their own chats alone. An adapter of the
config that the router was not trained with is a true newcomer: nothing is taken away for it, and `--retrained` names a
router that was trained with it, to compare with. Run with `python -m router_training.leave_one_out --data DIR`; writes
JSON and renders the table of docs/hot-routing.md.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from router_training.background import (
    CHATS_PER_ADAPTER,
    QUESTIONS_PER_ADAPTER,
    encode,
    with_background,
    with_questions,
)
from router_training.data import Chat, Split, TrainingDataError, read_splits
from router_training.encoding import TokenSequence
from router_training.evaluation import evaluate_policy
from router_training.flags import add_sources, config_from
from router_training.report import markdown_table
from router_training.roster import FIRST_SLOT, Roster
from router_training.run import load_with_progress, write_json
from server.adapters.calibration import Calibration, Calibrator
from server.adapters.examples import encode_examples
from server.errors import ConfigError
from server.routing.policy import BASE_DIGEST, BASE_SLOT, GatePlan, routed_plan
from server.routing.prototypes import HotRow
from server.routing.router import RouterArtefact, load_artefact

COUNTS = (0, 4, 16, 64)
"""Examples given; 0: from the weights alone."""
SHORT_ANSWERS = 5.0
"""Tasks whose answers have fewer tokens on average get more chats: a label is one noisy token."""
Splits = Mapping[Split, dict[str, list[Chat]]]
TABLE_START, TABLE_END = "<!-- leave-one-out: begin -->\n", "<!-- leave-one-out: end -->\n"


@dataclass(frozen=True)
class Sizes:
    """Validation chats: of the held-out task and of each other one, and how many times more of short-answer tasks."""

    own: int
    others: int
    short_factor: int = 3


def without_row(artefact: RouterArtefact, index: int) -> RouterArtefact:
    """The artefact less one adapter, its rows and its column of the prompt gate; statistics knew the adapter and go."""
    kept = [position for position in range(len(artefact.adapters)) if position != index]
    adapters = tuple(artefact.adapters[position] for position in kept)
    rows = {key: values[kept].contiguous() for key, values in artefact.rows.items()}
    gate = None if artefact.prompt_gate is None else artefact.prompt_gate.restricted(kept)
    return dataclasses.replace(artefact, adapters=adapters, rows=rows, background={}, prompt_gate=gate)


class HeldOut:
    """One adapter of a roster without its trained row, if it had one, and the adapters that the router knows."""

    def __init__(self, roster: Roster, artefact: RouterArtefact, label: int, train: dict[str, list[Chat]]) -> None:
        self.roster = roster
        self.label = label
        self._train = train
        digest = roster.digest_of_slot[label]
        trained = [adapter.digest for adapter in artefact.adapters]
        self.trained_slots = {d: slot for d, slot in roster.slot_of_digest.items() if d in trained and d != digest}
        self.artefact = artefact
        if digest not in trained:
            return
        self.artefact = without_row(artefact, trained.index(digest))
        others = [train[self.roster.tasks[slot]] for slot in self.trained_slots.values()]
        asked = [chat for rows in others for chat in rows[:QUESTIONS_PER_ADAPTER]]
        self.artefact = with_questions(self.artefact, roster, encode(roster, asked))
        chats = [chat for rows in others for chat in rows[:CHATS_PER_ADAPTER]]
        self.artefact = with_background(self.artefact, roster, encode(roster, chats), self.plans(None))

    @property
    def name(self) -> str:
        return self.roster.tasks[self.label]

    def plans(self, row: HotRow | None) -> list[GatePlan]:
        """One plan per label, all equal: routed by the remaining rows, and by `row` if there is one."""
        routers = self.roster.routed.routers
        hot = {} if row is None else {self.label: row}
        staged = routers.stage(1, self.artefact, self.trained_slots, hot)
        routers.publish(staged)
        digests = {BASE_SLOT: BASE_DIGEST, **self.roster.digest_of_slot}
        allowed = {slot: digests[slot] for slot in staged.slots}
        plan = routed_plan(allowed, staged.row_digest_of_slot, 1, self.artefact.settings, self.artefact.top_k)
        return [plan] * len(self.roster.tasks)

    def calibrate(self, num_examples: int) -> Calibration:
        """As the server does it, with training chats that follow those of the statistics."""
        chats = self._train[self.name][CHATS_PER_ADAPTER:][:num_examples]
        if len(chats) < num_examples:
            wanted = CHATS_PER_ADAPTER + num_examples
            raise TrainingDataError([f"{self.name!r} has too few training chats: {wanted} are needed"])
        raw = [{"messages": [dict(message) for message in chat.messages]} for chat in chats]
        examples = encode_examples(raw, self.roster.loaded.tokenizer) if raw else ()
        calibrator = Calibrator(self.roster.routed, _inline)
        return calibrator.calibrate(self.label, examples, self.artefact, self.trained_slots)


def measure(
    roster: Roster,
    artefact: RouterArtefact,
    label: int,
    chats: Splits,
    sizes: Sizes,
    retrained: RouterArtefact | None = None,
) -> dict[str, Any]:
    """One adapter held out, or a newcomer: answer NLL before and after, per count of examples."""
    held_out = HeldOut(roster, artefact, label, chats["train"])
    name = held_out.name
    tasks = [name, *(roster.tasks[slot] for slot in held_out.trained_slots.values())]
    validation = {task: rows for task, rows in chats["validation"].items() if task in tasks}
    sequences = _validation(roster, validation, name, sizes)
    own = [sequence for sequence in sequences if sequence.label == label]
    pinned = evaluate_policy(roster.routed, own, roster.tasks, roster.own_adapter_plans())[name]["nll"]
    is_known = roster.digest_of_slot[label] in [adapter.digest for adapter in artefact.adapters]
    trained = _nll(roster, sequences, roster.routed_plans(artefact)) if is_known else None
    before = _nll(roster, sequences, held_out.plans(None))
    cases = {}
    for count in COUNTS:
        calibration = held_out.calibrate(count)
        after = _nll(roster, sequences, held_out.plans(calibration.row))
        cases[str(count)] = {
            "nll": after,
            "problems": list(calibration.problems),
            **dataclasses.asdict(calibration.report),
            "prompt_gate": None if calibration.prompt is None else calibration.prompt.facts(),
        }
    again = None if retrained is None else _nll(roster, sequences, roster.routed_plans(retrained))
    return {
        "pinned": pinned,
        "trained_row": trained,
        "without_row": before,
        "examples": cases,
        "retrained": again,
    }


def table(record: dict[str, Any]) -> str:
    """Per adapter: routed NLL over pinned, with the trained row and with each hot row, and what the others lose; if a
    router was trained with the newcomer, the same of that one."""
    is_compared = any(case.get("retrained") for case in record["adapters"].values())
    header = ["held out", "pinned", "trained row", "no row"]
    header += [text for count in COUNTS for text in (f"{count} ex.", "others")]
    header += ["retrained", "others"] * is_compared
    rows = []
    for name, case in record["adapters"].items():
        pinned = case["pinned"]
        known = case["trained_row"]
        cells = [name, f"{pinned:.3f}", f"{known[name] / pinned:.2f}" if known else "–"]
        cells.append(f"{case['without_row'][name] / pinned:.2f}")
        for count in COUNTS:
            found = case["examples"][str(count)]
            mark = "*" if found["problems"] else ""
            cells += [f"{found['nll'][name] / pinned:.2f}{mark}", f"{100 * _others(case, found, name):+.1f} %"]
        if is_compared:
            again = {"nll": case["retrained"]}
            cells += [f"{again['nll'][name] / pinned:.2f}", f"{100 * _others(case, again, name):+.1f} %"]
        rows.append(cells)
    return markdown_table(header, rows)


def replace_table(document: Path, content: str, start: str, end: str) -> None:
    """Put `content` between the marks `start` and `end` of a Markdown file."""
    text = document.read_text(encoding="utf-8")
    head, tail = text.index(start) + len(start), text.index(end)
    document.write_text(f"{text[:head]}{content}\n{text[tail:]}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m router_training.leave_one_out", description=__doc__)
    add_sources(parser)
    parser.add_argument("--only", nargs="*", metavar="NAME", help="adapters to hold out (default: all)")
    parser.add_argument("--retrained", type=Path, metavar="DIR", help="router that was trained with the newcomers too")
    parser.add_argument("--own-chats", type=int, default=12, help="validation chats of the held-out task (default 12)")
    parser.add_argument("--other-chats", type=int, default=5, help="validation chats of each other task (default 5)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/leave_one_out.json"), metavar="FILE")
    parser.add_argument("--document", type=Path, metavar="FILE", help="Markdown file whose table is replaced")
    options = parser.parse_args(arguments)
    config = config_from(options)
    if config.router_folder is None:
        raise ConfigError("the config names no router to leave adapters out of")
    artefact = load_artefact(config.router_folder)
    retrained = None if options.retrained is None else load_artefact(options.retrained)
    roster = load_with_progress(config)
    chats = read_splits(options.data, roster.names)
    sizes = Sizes(options.own_chats, options.other_chats)
    record = json.loads(options.out.read_text()) if options.out.exists() else {"adapters": {}}
    record["sizes"] = dataclasses.asdict(sizes)
    for label, name in enumerate(roster.names, start=FIRST_SLOT):
        if not options.only or name in options.only:
            record["adapters"][name] = measure(roster, artefact, label, chats, sizes, retrained)
            write_json(record, options.out)
            print(table(record), flush=True)
    if options.document is not None:
        replace_table(options.document, table(record), TABLE_START, TABLE_END)


def _others(case: dict[str, Any], found: dict[str, Any], name: str) -> float:
    """Mean over the other tasks of the relative change of NLL that the hot row makes."""
    changes: list[float] = [found["nll"][task] / nll - 1 for task, nll in case["without_row"].items() if task != name]
    return sum(changes) / len(changes)


def _nll(roster: Roster, sequences: Sequence[TokenSequence], plans: Sequence[GatePlan]) -> dict[str, float]:
    measures = evaluate_policy(roster.routed, sequences, roster.tasks, plans)
    return {task: measure["nll"] for task, measure in measures.items()}


def _validation(roster: Roster, chats: dict[str, list[Chat]], name: str, sizes: Sizes) -> list[TokenSequence]:
    sequences = []
    for task, rows in chats.items():
        count = sizes.own if task == name else sizes.others
        encoded = encode(roster, rows[: count * sizes.short_factor])
        is_short = sum(sequence.num_answer_tokens for sequence in encoded) < SHORT_ANSWERS * len(encoded)
        sequences += encoded if is_short else encoded[:count]
    return sequences


def _inline(step: Callable[[], None]) -> "Future[None]":
    """Runs at once: there is no engine whose steps it could disturb."""
    future: Future[None] = Future()
    step()
    future.set_result(None)
    return future


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
