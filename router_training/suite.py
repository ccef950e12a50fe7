"""The whole evaluation: every policy on single-task, phrased, composite and off-domain chats, and task metrics of
answers."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from router_training.baselines import Candidate, fixed_baselines, opening_length, per_request, ready, routed_at
from router_training.calibration import CALIBRATION_SEED, Calibration, draw_calibration
from router_training.cells import CellCache
from router_training.composites import KINDS, encode_composite, pair_up
from router_training.data import Chat, data_digest
from router_training.encoding import TokenSequence, encode_chats
from router_training.evaluation import compare_policies, evaluate_batches
from router_training.fitted_baselines import gate_candidates, linear_candidates, score_candidates, static_candidates
from router_training.frozen import base_digest
from router_training.gate_shares import gate_shares, shares_along
from router_training.generation import generate_answers
from router_training.metrics import Answer, metric_of
from router_training.phrased import ask_anew, phrasings_digest
from router_training.phrasings import Phrasing
from router_training.progress import Progress
from router_training.roster import BASE_TASK, Roster
from server.routing.policy import GatePlan
from server.routing.router import RouterArtefact

COMPOSITE_SEED = 1
"""Which validation chats are joined; one fixed draw, so that records compare."""

GATE_CHATS = 16
"""Chats per task over which gates are averaged: enough for a picture, and no more than a few seconds."""


@dataclass(frozen=True)
class SuiteOptions:
    """How much of the evaluation to do."""

    baselines: bool = False
    """Every baseline beside base, own adapter, uniform mix and router."""
    calibration_chats: int = 16
    """Training chats per task that the baselines with something to fit see."""
    composites: int = 0
    """Composite chats; 0 leaves the set out."""
    phrasings: Mapping[str, Phrasing] | None = None
    """By task, other ways to ask its questions: the chats that they can read make a further set. None leaves it out."""
    generated_rows: int = 0
    """Chats per task that get an answer generated and scored; 0 leaves task metrics out."""
    max_new_tokens: int = 200
    cache: Path | None = None
    """Folder of finished measurements."""
    gates: bool = True
    """Where the router sends tokens: by layer, by position, along a chat."""


class Suite:
    """One roster, one router, and the policies to compare over them."""

    def __init__(self, roster: Roster, artefact: RouterArtefact, options: SuiteOptions) -> None:
        self._roster = roster
        self._artefact = artefact
        self._options = options
        self._cells = CellCache(options.cache)
        self._base = base_digest(roster)

    def run(self, chats: Mapping[str, Sequence[Chat]], train: Mapping[str, Sequence[Chat]] = {}) -> dict[str, Any]:
        """The record: the single-task comparison, and one key per further set. Off-domain chats are task `base`.

        `train` holds the training chats, which some baselines draw a few of.
        """
        rows = [chat for task in chats.values() for chat in task]
        sequences = self._encode(rows)
        options, record = self._options, dict[str, Any]()
        candidates = self._candidates()
        if options.baselines:
            calibration = draw_calibration(self._roster, train, options.calibration_chats)
            candidates = {**self._baselines(calibration), **candidates}
            record["calibration"] = {
                "chats_per_task": options.calibration_chats,
                "seed": CALIBRATION_SEED,
                "sha256": calibration.digest,
            }
        results = self._measure("single", sequences, candidates)
        counts = {task: len(list_of) for task, list_of in chats.items() if list_of}
        record |= {"chats": counts, "data_sha256": data_digest(rows), **compare_policies(results)}
        if BASE_TASK in record["ratio_to_own_adapter"]:
            record["off_domain"] = off_domain_summary(results)
        if options.phrasings is not None:
            record["phrased"] = self._phrased(chats, options.phrasings, candidates)
        if options.composites:
            record["composite"] = self._composites(chats, candidates)
        if options.generated_rows:
            record["metrics"] = self._metrics(chats)
        if options.gates:
            record["gates"] = self._gates(chats)
        return record

    def _candidates(self) -> dict[str, Candidate]:
        """What every evaluation compares."""
        makers = fixed_baselines(self._roster)
        makers = {name: makers[name] for name in ("base", "own_adapter", "uniform")}
        makers["routed"] = routed_at(self._roster, self._artefact)
        return {name: ready(maker) for name, maker in makers.items()}

    def _baselines(self, calibration: Calibration) -> dict[str, Candidate]:
        roster, artefact = self._roster, self._artefact
        makers = fixed_baselines(roster)
        router = routed_at(roster, artefact)
        num_choices = len(artefact.adapters)
        for top_k in sorted({k for k in (1, 2, 3, num_choices) if k <= num_choices} - {artefact.top_k}):
            makers[f"routed_k{top_k}"] = routed_at(roster, artefact, top_k)
        makers["per_request"] = per_request(roster, router)
        makers["per_request_opening"] = per_request(roster, router, opening_length(roster.loaded.tokenizer))
        return {
            **{name: ready(maker) for name, maker in makers.items()},
            **score_candidates(roster, calibration),
            **linear_candidates(roster, calibration, artefact.granularity),
            **static_candidates(roster, calibration, self._fit),
            **gate_candidates(roster, calibration, self._fit),
        }

    def _measure(
        self, name: str, sequences: Sequence[TokenSequence], candidates: Mapping[str, Candidate]
    ) -> dict[str, dict[str, dict[str, float]]]:
        results = {}
        content = [[s.token_ids, s.answer_start, s.label, s.label_changes, s.unscored] for s in sequences]
        with Progress(f"{name} chats", total=len(sequences) * len(candidates), unit="chat") as progress:
            for policy, candidate in candidates.items():

                def compute(candidate: Candidate = candidate) -> Any:
                    return evaluate_batches(
                        self._roster.routed, sequences, self._roster.tasks, candidate.make(), on_batch=progress.advance
                    )

                results[policy] = self._cells.get({**self._facts(policy, content), **candidate.facts}, compute)
        return results

    def _fit(self, name: str, facts: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """A long fit, kept beside the measurements."""
        return self._cells.get({**self._facts(name, "fit"), **facts}, compute)

    def _facts(self, policy: str, content: Any) -> dict[str, Any]:
        """What decides a measurement, with the candidate's own facts. Only routed policies depend on the router."""
        depends = policy.startswith(("routed", "per_request"))
        return {
            "policy": policy,
            "sequences": content,
            "base": self._base,
            "adapters": [adapter.digest for adapter in self._roster.adapters],
            "router": [self._artefact.settings, self._artefact.top_k, self._artefact.row_digests()]
            if depends
            else None,
            "dtype": str(next(self._roster.routed.model.parameters()).dtype),
            "torch": torch.__version__,
        }

    def _gates(self, chats: Mapping[str, Sequence[Chat]]) -> dict[str, Any]:
        """What `gate_shares` finds over a few chats of every task, and one composite chat of each kind."""
        roster = self._roster
        sequences = self._encode([chat for rows in chats.values() for chat in rows[:GATE_CHATS]])
        usable = {task: [chat for chat in rows if len(chat.messages) == 2] for task, rows in chats.items()}
        tasks = [task for task, rows in usable.items() if rows and task != BASE_TASK]
        composites: dict[str, TokenSequence] = {}
        if len(tasks) > 1:
            for kind, sequence in self._encode_composites(usable, 2 * len(KINDS) * len(tasks)):
                composites.setdefault(kind, sequence)

        def compute() -> dict[str, Any]:
            plans = roster.routed_plans(self._artefact)
            along = {kind: shares_along(roster, sequence, plans) for kind, sequence in composites.items()}
            return {**gate_shares(roster, sequences, plans), "along": along}

        content = [[s.token_ids, s.label, s.label_changes] for s in [*sequences, *composites.values()]]
        return dict(self._cells.get(self._facts("routed", ["gates", content]), compute))

    def _phrased(
        self,
        chats: Mapping[str, Sequence[Chat]],
        phrasings: Mapping[str, Phrasing],
        candidates: Mapping[str, Candidate],
    ) -> dict[str, Any]:
        """The comparison on chats asked anew, less those that the model cannot read."""
        rows = [chat for task in ask_anew(chats, phrasings).values() for chat in task]
        encoded = zip(rows, self._encode(rows), strict=True)
        fitting = [pair for pair in encoded if len(pair[1]) <= self._roster.loaded.max_model_len]
        counts = Counter(chat.task for chat, _ in fitting)
        return {
            "chats": dict(counts),
            "left_out": {task: len(chats[task]) - counts[task] for task in chats if task in phrasings},
            "data_sha256": data_digest([chat for chat, _ in fitting]),
            "phrasings_sha256": phrasings_digest(phrasings),
            **compare_policies(self._measure("phrased", [sequence for _, sequence in fitting], candidates)),
        }

    def _composites(self, chats: Mapping[str, Sequence[Chat]], candidates: Mapping[str, Candidate]) -> dict[str, Any]:
        fitting = [sequence for _, sequence in self._encode_composites(chats, self._options.composites)]
        return {"chats": len(fitting), **compare_policies(self._measure("composite", fitting, candidates))}

    def _encode_composites(self, chats: Mapping[str, Sequence[Chat]], count: int) -> list[tuple[str, TokenSequence]]:
        """(kind, sequence) of `count` composites of tasks with an adapter, less those that the model cannot read."""
        roster = self._roster
        usable = {task: rows for task, rows in chats.items() if task != BASE_TASK}
        pairs = pair_up(usable, count, COMPOSITE_SEED)
        tokenizer, ends = roster.loaded.tokenizer, roster.loaded.eos_token_ids
        encoded = [(pair.kind, encode_composite(pair, roster.label_of_task, tokenizer, ends)) for pair in pairs]
        return [(kind, sequence) for kind, sequence in encoded if len(sequence) <= roster.loaded.max_model_len]

    def _metrics(self, chats: Mapping[str, Sequence[Chat]]) -> dict[str, dict[str, Any]]:
        """policy -> task -> metric and value, for the policies that are plans."""
        roster = self._roster
        plans: dict[str, Sequence[GatePlan]] = {
            "base": roster.base_plans(),
            "own_adapter": roster.own_adapter_plans(),
            "uniform": roster.uniform_plans(),
            "routed": roster.routed_plans(self._artefact),
        }
        tasks = [task for task in chats if task != BASE_TASK and chats[task]]
        rows = {task: list(chats[task][: self._options.generated_rows]) for task in tasks}
        total = len(plans) * sum(map(len, rows.values()))
        with Progress("answers", total=total, unit="chat") as progress:
            return {
                policy: {task: self._score(policy, plan, task, rows[task], progress) for task in tasks}
                for policy, plan in plans.items()
            }

    def _score(
        self, policy: str, plans: Sequence[GatePlan], task: str, rows: Sequence[Chat], progress: Progress
    ) -> dict[str, Any]:
        loaded = self._roster.loaded
        sequences = self._encode(rows)

        def compute() -> list[list[int]]:
            return generate_answers(
                self._roster.routed,
                sequences,
                plans,
                loaded.eos_token_ids,
                self._options.max_new_tokens,
                on_batch=progress.advance,
            )

        # The plan goes by the label: tasks may ask the same.
        questions = [[s.label, *s.token_ids[: s.answer_start]] for s in sequences]
        content = [questions, self._options.max_new_tokens]
        generated = self._cells.get(self._facts(policy, ["answers", content]), compute)
        answers = [
            Answer(loaded.tokenizer.decode(tokens), chat.messages[-1]["content"], chat.tests)
            for tokens, chat in zip(generated, rows, strict=True)
        ]
        metric = metric_of(task)
        return {"metric": metric.name, "value": metric.compute(answers), "chats": len(answers)}

    def _encode(self, chats: Sequence[Chat]) -> list[TokenSequence]:
        loaded = self._roster.loaded
        return encode_chats(chats, self._roster.label_of_task, loaded.tokenizer, loaded.eos_token_ids)


def off_domain_summary(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Nats per answer token on chats that no adapter was trained for, by policy, and as ratio to the base model."""
    nll = {policy: measures[BASE_TASK]["nll"] for policy, measures in results.items()}
    return {"nll": nll, "ratio_to_base": {policy: value / nll["base"] for policy, value in nll.items()}}
