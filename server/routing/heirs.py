"""The trained row of an adapter, for the next version of it, and the canary that judges whether it fits.

A next version does the same task with other weights. Its predecessor's row and scores know that task from training;
a row from a few examples would know it less, and would be fitted and judged against the predecessor's own tokens, which
the artefact still counts as somebody else's. The row stays as it is, so nothing is fitted here. Letters as in
`prototypes`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from torch import Tensor

from server.routing.background import Background
from server.routing.prompt_columns import (
    PromptReport,
    PromptVerdict,
    asked_in,
    base_place,
    joined,
    lost_share,
    most_taken,
    shares,
)
from server.routing.prompt_gate import PromptGate
from server.routing.prototypes import CanaryReport, GateColumn, HotRow, judge, win_rate
from server.routing.router import RouterArtefact

MIN_OWN_QUESTIONS = 0.5
"""Canary: the prompt gate must know at least so much of the examples' question tokens for the predecessor's."""


class HeirReport(CanaryReport):
    """As of any newcomer, but that what it takes from others it was trained to take."""

    @property
    def problems(self) -> tuple[str, ...]:
        """Why it may not be routed, with numbers; empty when it may."""
        return self.own_problems


@dataclass(frozen=True)
class HeirPromptReport(PromptReport):
    """As of any newcomer, and its questions must be its predecessor's."""

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the gate must not use it, with numbers; empty when it may."""
        if self.own_share >= MIN_OWN_QUESTIONS:
            return super().problems
        return (
            f"the prompt gate knows {100 * self.own_share:.0f} % of its examples' question tokens for its "
            f"predecessor's, less than {100 * MIN_OWN_QUESTIONS:.0f} %",
            *super().problems,
        )


def predecessor_of(artefact: RouterArtefact, name: str, digests: Collection[str]) -> int | None:
    """Place of the adapter that had this name when the router was trained, if its content is not among `digests`,
    those that are registered, and the router knows others too."""
    if len(artefact.adapters) < 2:
        return None
    for index, known in enumerate(artefact.adapters):
        if known.name == name and known.digest not in digests:
            return index
    return None


def inherited_row(artefact: RouterArtefact, index: int) -> HotRow:
    """The trained row at this place, and its scores in the prompt gate if there is one."""
    columns = {key: GateColumn(rows[index].clone(), 0.0) for key, rows in artefact.rows.items()}
    gate = artefact.prompt_gate
    return HotRow(columns, None if gate is None else gate.scores[:, index].contiguous())


def judge_heir(
    row: HotRow, artefact: RouterArtefact, background: Background, index: int, inputs: Mapping[str, Tensor]
) -> HeirReport:
    """The canary of the gate row, on inputs (N, d) per gate of the heir's examples. The adapter at `index` counts as
    gone."""
    kept = [place for place in range(len(artefact.adapters)) if place != index]
    rows = {key: values[kept] for key, values in artefact.rows.items()}
    is_others = background.domains != index
    domains = background.domains[is_others]
    others = Background(
        {key: replace(gate, states=gate.states[is_others]) for key, gate in background.gates.items()},
        domains - (domains > index).long(),
    )
    report = judge(
        row,
        rows,
        others,
        [artefact.adapters[place].name for place in kept],
        top_k=min(artefact.top_k, len(kept)),
        temperature=artefact.temperature,
        own_win_rate=win_rate(row, inputs, rows),
    )
    return HeirReport(**asdict(report))


def judge_heirs_column(
    gate: PromptGate, index: int, prompts: Sequence[Sequence[int]], names: Sequence[str]
) -> PromptVerdict:
    """The canary of the scores (V,) at `index`, on the questions of rendered chats; nothing is fitted, so all judge.
    `names` of the gate's choices."""
    kept = [place for place in range(len(names)) if place != index]
    others, column = gate.restricted(kept), gate.scores[:, index]
    remaining = [names[place] for place in kept]
    if not (examples := asked_in(prompts, gate)):
        return PromptVerdict(("none of its examples has a question for the prompt gate",))
    base = base_place(remaining)
    given = shares(others, column, joined(examples), base)
    known = [] if gate.statistics is None else gate.statistics.questions
    retained = [(tokens, choice - (choice > index)) for tokens, choice in known if choice != index]
    report = HeirPromptReport(given[-1], lost_share(given, base), *most_taken(others, column, retained, remaining))
    return PromptVerdict(report.problems, report)
