"""From what a prompt gate reads to a prompt's course: which plan each of its tokens follows, and whose turn is next."""

from collections.abc import Mapping, Sequence, Set
from functools import cache
from itertools import groupby, pairwise, takewhile
from types import MappingProxyType

from torch import Tensor

from server.routing.plan_course import ENDLESS, NO_COURSE, NO_TURNS, AnswerTurns, PlanCourse, PlanSpan, Turn
from server.routing.policy import BASE_PLAN, BASE_SLOT, GatePlan, Policy, fixed_plan
from server.routing.prompt_gate import FAINT_NEWCOMER_SHARE, PromptGate


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
    header follows the first stretch with an adapter: the first task is answered first, and the line ends before the
    others' answers follow those (`AnswerTurns`); but no trained one where the question may be a newcomer's. A newcomer
    that has a question for certain answers it alone, up to the next one.

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
    owners: list[GatePlan] = []
    """Of each token so far."""
    turns = NO_TURNS
    answering: GatePlan | None = None

    @cache
    def plan_of(slot: int | None) -> GatePlan:
        if slot is None:
            return plan
        return BASE_PLAN if slot == BASE_SLOT else fixed_plan(Policy.PINNED, {slot: 1.0}, digest_of_slot)

    def fill(stop: int, owner: GatePlan) -> None:
        owners.extend([owner] * (stop - len(owners)))

    def fill_answer(stop: int) -> None:
        nonlocal turns
        if turns.frame is None:
            fill(stop, answering or plan)
        for token in token_ids[len(owners) : stop]:
            turns = turns.after(token)
            owners.append(turns.begun or plan)

    for index, (start, stop) in enumerate(gate.frame.user_messages(token_ids)):
        fill_answer(start - (len(gate.frame.header) if index else start))
        turns, answering = NO_TURNS, None
        if start == stop:
            continue
        question, is_first = token_ids[start:stop], not index
        reading = gate.decide(question, columns, newcomers=new_columns, base=base_column, base_takes_rest=is_first)
        own = [None if choice is None else slots[choice] for choice in reading.choices]
        follows = bool(index) or start <= gate.settings.max_opening_tokens
        fill(start, plan_of(own[0]) if follows else plan)
        owners += [plan_of(slot) for slot in own]
        tasks = [slot for slot, _ in groupby(slot for slot in own if slot not in (None, BASE_SLOT))]
        is_safe = tasks and (tasks[0] in newcomers or reading.newcomer_share <= FAINT_NEWCOMER_SHARE)
        if is_safe and gate.frame.is_answered(token_ids, stop):
            fill(stop, plan)
            fill(stop + len(gate.frame.answer), plan_of(tasks[0]))
            known = takewhile(lambda pair: pair[0] in answer_ends, pairwise(tasks))
            waiting = tuple(Turn(answer_ends[task], plan_of(following)) for task, following in known)
            turns = AnswerTurns(gate.frame, waiting) if waiting else NO_TURNS
        answering = None if reading.answers is None else plan_of(slots[reading.answers])
    fill_answer(len(token_ids))
    spans: list[PlanSpan] = []
    end = 0
    for _, group in groupby([*owners, answering or plan], key=id):  # equal plans are one object
        alike = list(group)
        end += len(alike)
        spans.append(PlanSpan(end, alike[0]))
    if answering is not None:
        spans[-1] = spans[-1]._replace(stop=ENDLESS)
    while spans and spans[-1].plan is plan:
        spans.pop()
    return PlanCourse(tuple(spans), turns)
