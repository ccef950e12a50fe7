"""Routers in memory: gate rows of each loaded artefact laid out by slot, one generation per artefact load.

A hot swap adds a generation; requests keep the one they were admitted under, and it is dropped after the last of them.
Staging is pure and may run on any thread; `publish` belongs to the thread that runs the model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor

from server.errors import RouterArtefactError
from server.routing.bank import ProjectionInfo
from server.routing.plan_course import NO_COURSE, PlanCourse
from server.routing.policy import BASE_DIGEST, BASE_SLOT, GatePlan
from server.routing.prompt_course import prompt_course
from server.routing.prompt_gate import PromptGate
from server.routing.prototypes import HotRow
from server.routing.router import Granularity, RouterArtefact, gate_key

EMPTY_LINE = 2
"""Line ends in a row."""


@dataclass(frozen=True, eq=False)
class RouterGeneration:
    """One loaded router. Slots without a gate row have zero rows and must never be allowed."""

    id: int
    granularity: Granularity
    temperature: float
    rows: Mapping[str, Tensor]
    """gate key -> (E, d) float32."""
    slots: frozenset[int]
    """Slots that have a gate row; holds `BASE_SLOT` when the router has a null expert."""
    artefact: RouterArtefact
    row_digest_of_slot: Mapping[int, str] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    """gate key -> (E,) float32, added to the logits; empty while no row has a bias."""
    digest_of_slot: Mapping[int, str] = field(default_factory=dict)
    """Slot -> digest of the adapter in it, of every slot with a gate row."""
    column_of_slot: Mapping[int, Tensor] = field(default_factory=dict)
    """Slot -> scores (V,) of the prompt gate, if the router has one: of trained adapters and of hot ones."""
    answer_ends_of_slot: Mapping[int, int] = field(default_factory=dict)
    """Slot -> line ends in a row that end its answers, of those where any do."""
    newcomers: frozenset[int] = frozenset()
    """Slots of the hot ones."""
    packed: object | None = None
    """What `RouterBank.pack` made of it."""

    def prompt_course(self, plan: GatePlan, token_ids: Sequence[int]) -> PlanCourse:
        """Plans of a prompt's tokens, if the router has a prompt gate: see `prompt_course.prompt_course`."""
        gate = self.artefact.prompt_gate
        if gate is None:
            return NO_COURSE
        columns, digests, ends = self.column_of_slot, self.digest_of_slot, self.answer_ends_of_slot
        return prompt_course(gate, plan, columns, digests, token_ids, newcomers=self.newcomers, answer_ends=ends)

    def key(self, info: ProjectionInfo) -> str:
        """Which gate decides for this projection; where `rows` lacks it, routed tokens stay on the base."""
        return gate_key(self.granularity, info)


def check_base(artefact: RouterArtefact, *, base_model: str, hidden_size: int, num_layers: int) -> None:
    """Refuse an artefact trained for another base model. Raises RouterArtefactError naming each difference."""
    expected = {"base model": base_model, "hidden size": hidden_size, "number of layers": num_layers}
    found = {
        "base model": artefact.base_model,
        "hidden size": artefact.hidden_size,
        "number of layers": artefact.num_layers,
    }
    differences = [
        f"{what} {found[what]!r}, this server has {expected[what]!r}"
        for what in expected
        if found[what] != expected[what]
    ]
    if differences:
        raise RouterArtefactError("the router was trained for another base: " + "; ".join(differences))


class RouterBank:
    """Owner of the loaded generations. `generations` is replaced as a whole, never changed in place."""

    def __init__(self, *, num_slots: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.device = device
        self.generations: Mapping[int, RouterGeneration] = MappingProxyType({})
        self.pack: Callable[[RouterGeneration], object] | None = None
        """Set before the first router comes: what a native step reads is made when a router is staged."""

    def stage(
        self,
        generation_id: int,
        artefact: RouterArtefact,
        slot_of_digest: Mapping[str, int],
        hot_rows: Mapping[int, HotRow] = MappingProxyType({}),
    ) -> RouterGeneration:
        """Lay out an artefact's rows by slot. Adapters of the artefact that hold no slot are left out.

        Compare `check_base` first. The null expert's row goes to the base slot. `hot_rows` (slot -> row) are those of
        adapters that the artefact does not know; they leave every other row as it is, bit for bit. Where
        `slot_of_digest` lacks such an adapter, its row stands for it.
        """
        slots = {**slot_of_digest, BASE_DIGEST: BASE_SLOT}
        placed = [(index, slots[a.digest]) for index, a in enumerate(artefact.adapters) if a.digest in slots]
        rows = {}
        for key, values in artefact.rows.items():
            by_slot = torch.zeros(self.num_slots, values.shape[1])
            for index, slot in placed:
                by_slot[slot] = values[index]
            for slot, hot in hot_rows.items():
                by_slot[slot] = hot.columns[key].row
            rows[key] = by_slot.to(self.device)
        row_digests = artefact.row_digests()
        trained = {slot: row_digests[artefact.adapters[index].digest] for index, slot in placed}
        digest_of_slot = {slot: digest for digest, slot in slots.items() if slot in trained or slot in hot_rows}
        generation = RouterGeneration(
            id=generation_id,
            granularity=artefact.granularity,
            temperature=artefact.temperature,
            rows=rows,
            slots=frozenset(trained) | frozenset(hot_rows),
            artefact=artefact,
            row_digest_of_slot={**trained, **{slot: hot.digest for slot, hot in hot_rows.items()}},
            biases=self._biases(hot_rows),
            digest_of_slot={**{slot: hot.digest for slot, hot in hot_rows.items()}, **digest_of_slot},
            column_of_slot=_prompt_columns(artefact.prompt_gate, placed, hot_rows),
            answer_ends_of_slot=_answer_ends(artefact.prompt_gate, placed, hot_rows),
            newcomers=frozenset(hot_rows),
        )
        return generation if self.pack is None else replace(generation, packed=self.pack(generation))

    def _biases(self, hot_rows: Mapping[int, HotRow]) -> dict[str, Tensor]:
        """Zero for every trained row, so that their logits keep their bits; nothing at all without hot rows."""
        biases: dict[str, Tensor] = {}
        for slot, hot in hot_rows.items():
            for key, column in hot.columns.items():
                biases.setdefault(key, torch.zeros(self.num_slots))[slot] = column.bias
        return {key: bias.to(self.device) for key, bias in biases.items()}

    def prompt_course(self, plan: GatePlan, token_ids: Sequence[int]) -> PlanCourse:
        """Which plans a request's tokens follow where it is not its own: none, unless it is routed by a router with a
        prompt gate. On any thread; the request must hold `plan`."""
        if plan.router_generation is None:
            return NO_COURSE
        return self.generations[plan.router_generation].prompt_course(plan, token_ids)

    def publish(self, generation: RouterGeneration) -> None:
        """Add or replace one generation. Only between two steps, on the thread that runs the model."""
        self.generations = MappingProxyType({**self.generations, generation.id: generation})

    def drop(self, generation_id: int) -> None:
        """Remove a generation that no request holds any more. Same thread as `publish`."""
        kept = {key: value for key, value in self.generations.items() if key != generation_id}
        self.generations = MappingProxyType(kept)


def _prompt_columns(
    gate: PromptGate | None, placed: Sequence[tuple[int, int]], hot_rows: Mapping[int, HotRow]
) -> dict[int, Tensor]:
    """slot -> column of the gate, of the trained choices (index, slot) and of the newcomers that have one."""
    if gate is None:
        return {}
    trained = gate.columns({slot: index for index, slot in placed})
    return {**trained, **{slot: hot.prompt_column for slot, hot in hot_rows.items() if hot.prompt_column is not None}}


def _answer_ends(
    gate: PromptGate | None, placed: Sequence[tuple[int, int]], hot_rows: Mapping[int, HotRow]
) -> dict[int, int]:
    """slot -> line ends that end its answers. Of newcomers too little is known: an empty line, as of most."""
    if gate is None or not gate.answer_ends:
        return {}
    trained = gate.ends_of_answers({slot: index for index, slot in placed})
    return {**trained, **dict.fromkeys(hot_rows, EMPTY_LINE)}
