"""From what a prompt gate reads to a prompt's course: which plan each of its tokens follows, and whose turn is next."""

from collections.abc import Mapping, Sequence, Set
from functools import cache, partial
from itertools import groupby, pairwise, takewhile
from types import MappingProxyType

from torch import Tensor

from server.routing.plan_course import ENDLESS, NO_COURSE, NO_TURNS, AnswerTurns, PlanCourse, PlanSpan, Turn
from server.routing.policy import BASE_PLAN, BASE_SLOT, GatePlan, Policy, fixed_plan, without
from server.routing.prompt_gate import MAX_NEWCOMER_FIRST, Mixture, PromptGate


def prompt_course(
    gate: PromptGate,
    plan: GatePlan,
    column_of_slot: Mapping[int, Tensor],
    digest_of_slot: Mapping[int, str],
    token_ids: Sequence[int],
    *,
    newcomers: Set[int] = frozenset(),
    answer_ends: Mapping[int, int] = MappingProxyType({}),
) -> PlanCourse:
    """Which plan the tokens of a prompt follow, and what those generated behind it may.

    Each question is decided by itself, so that later turns of a conversation change nothing before them. A first one
    that no choice is sure of is the base model's if it may be chosen: most such are nobody's, and an adapter finds its
    way back in the answer, which the router decides. (A later one may mean something in its conversation.) The answer's
    header follows whoever is likely first: the first task is answered first, and the line ends before the others'
    answers follow those (`AnswerTurns`); but no trained one where the question may be a newcomer's. A newcomer that has
    a question for certain answers it alone, up to the next one; one that hardly has a part in a question that is most
    likely nobody's has none in the answer.

    `column_of_slot` (V,) each. None at all where an allowed choice has no scores: the gate would give that one's
    prompts to others. `newcomers`: slots that the gate was not trained with. `answer_ends`: line ends in a row that end
    an answer, by slot; nobody has a turn behind a slot that is not among them.
    """
    slots = plan.allowed_slots
    if any(slot not in column_of_slot for slot in slots):
        return NO_COURSE
    columns = [column_of_slot[slot] for slot in slots]
    new_columns = [index for index, slot in enumerate(slots) if slot in newcomers]
    base_column = slots.index(BASE_SLOT) if BASE_SLOT in slots else None
    draft = _Draft(plan, token_ids)
    # Equal plans are one object.
    plan_of = cache(partial(_plan_of, digest_of_slot, slots))
    less = cache(lambda absent: without(plan, [slots[column] for column in absent], digest_of_slot))
    for index, (start, stop) in enumerate(gate.frame.user_messages(token_ids)):
        is_first = index == 0
        draft.answer(start - (start if is_first else len(gate.frame.header)))
        draft.expect()
        if start == stop:
            continue
        reading = gate.decide(
            token_ids[start:stop],
            columns,
            newcomers=new_columns,
            base=base_column,
            base_takes_rest=is_first,
            top_k=plan.top_k,
        )
        given = list(zip(reading.choices, reading.mixtures, strict=True))
        plans = [plan if choice is None else plan_of(mixture) for choice, mixture in given]
        leads = not is_first or start <= gate.settings.max_opening_tokens
        draft.fill(start, plans[0] if leads else plan)
        draft.owners += plans
        tasks = [choice for choice, _ in groupby(one for one in reading.choices if one not in (None, base_column))]
        begins = reading.first
        if reading.newcomer_first > MAX_NEWCOMER_FIRST and len(reading.absent) < len(new_columns):
            begins = _alone(tasks[0]) if tasks and tasks[0] in new_columns else None
        turns = NO_TURNS
        if begins is not None and gate.frame.is_answered(token_ids, stop):
            draft.fill(stop, plan)
            draft.fill(stop + len(gate.frame.answer), plan_of(begins))
            known = takewhile(lambda pair: slots[pair[0]] in answer_ends, pairwise(tasks))
            waiting = tuple(Turn(answer_ends[slots[task]], plan_of(_alone(following))) for task, following in known)
            turns = AnswerTurns(gate.frame, waiting) if waiting else NO_TURNS
        if reading.answers is not None:
            draft.expect(only=plan_of(_alone(reading.answers)))
        elif reading.absent and turns is NO_TURNS:
            draft.expect(only=less(reading.absent))
        else:
            draft.expect(turns=turns)
    draft.answer(len(token_ids))
    return draft.course()


def _alone(choice: int) -> Mixture:
    return ((choice, 1.0),)


def _plan_of(digest_of_slot: Mapping[int, str], slots: Sequence[int], mixture: Mixture) -> GatePlan:
    weights = {slots[choice]: weight for choice, weight in mixture if slots[choice] != BASE_SLOT}
    if not weights:
        return BASE_PLAN
    is_alone = list(weights.values()) == [1.0]
    return fixed_plan(Policy.PINNED if is_alone else Policy.WEIGHTED, weights, digest_of_slot)


class _Draft:
    """A course as it is made, from the first token on."""

    def __init__(self, plan: GatePlan, token_ids: Sequence[int]) -> None:
        """`plan` is the request's."""
        self.owners: list[GatePlan] = []
        """Plan of each token so far."""
        self._plan = plan
        self._token_ids = token_ids
        self.expect()

    def expect(self, *, turns: AnswerTurns = NO_TURNS, only: GatePlan | None = None) -> None:
        """What the next answer follows: turns, one plan, or the request's own."""
        self._turns, self._only = turns, only

    def fill(self, stop: int, owner: GatePlan) -> None:
        """Give the tokens before `stop` that nobody has yet."""
        self.owners.extend([owner] * (stop - len(self.owners)))

    def answer(self, stop: int) -> None:
        """Give those before `stop`, which are an answer's."""
        if self._turns.frame is None:
            self.fill(stop, self._only or self._plan)
        for token in self._token_ids[len(self.owners) : stop]:
            self._turns = self._turns.after(token)
            self.owners.append(self._turns.begun or self._plan)

    def course(self) -> PlanCourse:
        spans: list[PlanSpan] = []
        end = 0
        for _, group in groupby([*self.owners, self._only or self._plan], key=id):
            alike = list(group)
            end += len(alike)
            spans.append(PlanSpan(end, alike[0]))
        if self._only is not None:
            spans[-1] = spans[-1]._replace(stop=ENDLESS)
        while spans and spans[-1].plan is self._plan:
            spans.pop()
        return PlanCourse(tuple(spans), self._turns)
