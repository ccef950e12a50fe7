"""Makes the gate row of one adapter that the router was not trained with: from examples, or from its weights alone.

Runs examples through what computes the server's steps, on the model's thread, one chat at a time between two steps.
Decides nothing about names and states; `hot_rows` does.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from server.adapters.examples import Example
from server.adapters.publisher import RunBetweenSteps
from server.adapters.torch_states import TorchStates
from server.routing.attach import RoutedModel
from server.routing.background import Background, from_tensors
from server.routing.heirs import inherited_row, judge_heir, judge_heirs_column
from server.routing.policy import BASE_PLAN, GatePlan, Policy
from server.routing.prompt_columns import PromptVerdict, make_column
from server.routing.prototypes import (
    CanaryReport,
    GateColumn,
    HotRow,
    column_from_examples,
    column_from_weights,
    judge,
    win_rate,
)
from server.routing.recording import ExampleStates
from server.routing.router import RouterArtefact
from server.routing.router_bank import RouterBank

ROUNDS = 2
"""Passes over the examples: under the trained rows alone, then with the first row too, whose adapter leaves its mark
in the states of later layers. A row fitted on the first pass only does not know its own adapter's states."""
MAX_TOKENS_PER_PART = 24
"""Tokens kept of an example's prompt, and of its answer, evenly spread."""

NEVER = -1e4
"""Bias of a gate that an adapter without weights there must not win: no trained logit comes near."""
_GENERATION = 1
"""Id of the one generation in a calibration's private router bank."""

T = TypeVar("T")

PollCancelled = Callable[[], None]
"""Raises what the calibration should end with when nobody wants it any more."""

ReadStates = Callable[[Mapping[int, HotRow]], list[dict[str, Tensor]]]
"""Per example what each gate reads of its chosen tokens, (N, d), under the trained rows and these, by slot."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """A row with its canary's verdict."""

    row: HotRow
    report: CanaryReport
    method: str
    """`examples`, `weights`, or `inherited` where the row is a trained one of an earlier version."""
    num_examples: int
    artefact: RouterArtefact
    """What it was fitted against; under another artefact it means nothing."""
    prompt: PromptVerdict | None = None
    """Whether it may take part in the router's prompt gate; None where there is no such gate."""

    @property
    def problems(self) -> tuple[str, ...]:
        """Why `auto` must not choose the adapter, with numbers; empty when it may."""
        return (*self.report.problems, *(() if self.prompt is None else self.prompt.problems))


class Calibrator:
    """Rows for one model. Every method runs on a worker thread, one call at a time."""

    def __init__(
        self,
        routed: RoutedModel,
        run_between_steps: RunBetweenSteps,
        states: ExampleStates | None = None,
        *,
        reads_prompts: bool = True,
    ) -> None:
        """`states` are the torch model's own unless something else computes the steps. `reads_prompts`: prompt gates
        are obeyed.
        """
        self._reads_prompts = reads_prompts
        self._routed = routed
        self._run_between_steps = run_between_steps
        self._states = TorchStates(routed) if states is None else states

    def calibrate(
        self,
        slot: int,
        examples: Sequence[Example],
        artefact: RouterArtefact,
        trained_slots: Mapping[str, int],
        poll: PollCancelled = lambda: None,
        *,
        predecessor: int | None = None,
    ) -> Calibration:
        """The row of the adapter that stands in bank slot `slot`.

        `trained_slots` are the slots of the artefact's own adapters by digest: no other hot row takes part, so the
        result does not depend on who else is registered. `predecessor` is the place in the artefact of an earlier
        version of the adapter, whose row it gets if the examples fit it, and else one of its own. Raises
        RouterArtefactError when the artefact has no statistics, what `ExampleStates` raises, and what `poll` raises.
        """
        background = from_tensors(artefact.background, artefact.rows)
        read = functools.partial(self._states_of, examples, artefact, trained_slots, poll)
        if examples and predecessor is not None:
            heir = self._inherit(slot, examples, artefact, background, read, predecessor)
            if not heir.problems:
                return heir
        if examples:
            row, own = _from_examples(slot, artefact, background, read)
        else:
            row, own = self._from_weights(slot, artefact, background), None
        names = [adapter.name for adapter in artefact.adapters]
        prompt = None
        if artefact.prompt_gate is not None and self._reads_prompts:
            column, prompt = make_column([example.token_ids for example in examples], artefact.prompt_gate, names)
            row = replace(row, prompt_column=column)
        report = judge(
            row,
            artefact.rows,
            background,
            names,
            top_k=artefact.top_k,
            temperature=artefact.temperature,
            own_win_rate=own,
        )
        return Calibration(row, report, "examples" if examples else "weights", len(examples), artefact, prompt)

    def _inherit(
        self,
        slot: int,
        examples: Sequence[Example],
        artefact: RouterArtefact,
        background: Background,
        read: ReadStates,
        predecessor: int,
    ) -> Calibration:
        row = inherited_row(artefact, predecessor)
        inputs = _joined(read({slot: row}))
        report = judge_heir(row, artefact, background, predecessor, inputs)
        prompt = None
        if artefact.prompt_gate is not None and self._reads_prompts:
            names = [adapter.name for adapter in artefact.adapters]
            prompts = [example.token_ids for example in examples]
            prompt = judge_heirs_column(artefact.prompt_gate, predecessor, prompts, names)
        return Calibration(row, report, "inherited", len(examples), artefact, prompt)

    def _from_weights(self, slot: int, artefact: RouterArtefact, background: Background) -> HotRow:
        weights = self._between_steps(lambda: self._states.weights(slot, artefact))
        columns = {}
        for key, rows in artefact.rows.items():
            if readers := weights.get(key):
                columns[key] = column_from_weights(
                    readers, rows, background.gates[key], temperature=artefact.temperature
                )
            else:
                columns[key] = GateColumn(torch.zeros(rows.shape[1]), NEVER)
        return HotRow(columns)

    def _states_of(
        self,
        examples: Sequence[Example],
        artefact: RouterArtefact,
        trained_slots: Mapping[str, int],
        poll: PollCancelled,
        hot: Mapping[int, HotRow],
    ) -> list[dict[str, Tensor]]:
        """What the gates read of each example's chosen tokens under the trained rows and these."""
        routers, plan = self._routing(artefact, trained_slots, hot)
        found = []
        for example in examples:
            poll()
            read = functools.partial(
                self._states.inputs, example.token_ids, chosen_positions(example), plan, routers, artefact
            )
            found.append(self._between_steps(read))
        return found

    def _routing(
        self, artefact: RouterArtefact, trained_slots: Mapping[str, int], hot: Mapping[int, HotRow]
    ) -> tuple[RouterBank, GatePlan]:
        """A router bank of its own, so that nothing of it can reach a request, and a plan over all of its rows."""
        routers = RouterBank(num_slots=self._routed.num_slots, device=self._routed.bank.device)
        generation = routers.stage(_GENERATION, artefact, trained_slots, hot)
        routers.publish(generation)
        if not generation.slots:
            return routers, BASE_PLAN
        plan = GatePlan(
            Policy.ROUTED,
            fingerprint=b"",
            allowed_slots=tuple(sorted(generation.slots)),
            router_generation=_GENERATION,
            top_k=min(artefact.top_k, len(generation.slots)),
        )
        return routers, plan

    def _between_steps(self, work: Callable[[], T]) -> T:
        """What `work` gives on the model's thread. Raises what it raises; NotReadyError when the engine has stopped."""
        results: list[T] = []
        self._run_between_steps(lambda: results.append(work())).result()
        return results[0]


def chosen_positions(example: Example) -> Tensor:
    """(T,) bool: the last prompt token, and evenly spread others of what is the example's own."""
    chosen = torch.zeros(len(example.token_ids), dtype=torch.bool)
    last_prompt = example.answer_start - 1
    chosen[_spread(min(example.start, last_prompt), last_prompt)] = True
    chosen[_spread(last_prompt, len(example.token_ids))] = True
    chosen[last_prompt] = True
    return chosen


def _spread(start: int, stop: int) -> Tensor:
    length = stop - start
    if length <= MAX_TOKENS_PER_PART:
        return torch.arange(start, stop)
    return start + torch.arange(MAX_TOKENS_PER_PART) * length // MAX_TOKENS_PER_PART


def _from_examples(
    slot: int, artefact: RouterArtefact, background: Background, read: ReadStates
) -> tuple[HotRow, float]:
    """The row, and the win rate on examples that a row fitted without them has: two halves judge each other."""
    halves: list[list[dict[str, Tensor]]] = [[], []]
    row: HotRow | None = None
    for _ in range(ROUNDS):
        states = read({} if row is None else {slot: row})
        halves[0] += states[0::2]
        halves[1] += states[1::2]
        row = _fit(halves[0] + halves[1], artefact, background)
    assert row is not None
    rates = [
        win_rate(_fit(halves[fitted], artefact, background), _joined(halves[1 - fitted]), artefact.rows)
        for fitted in (0, 1)
    ]
    return row, sum(rates) / 2


def _fit(parts: Sequence[Mapping[str, Tensor]], artefact: RouterArtefact, background: Background) -> HotRow:
    inputs = _joined(parts)
    return HotRow(
        {
            key: column_from_examples(inputs[key], rows, background.gates[key], temperature=artefact.temperature)
            for key, rows in artefact.rows.items()
        }
    )


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
