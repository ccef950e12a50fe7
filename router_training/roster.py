"""The frozen side of training: base model and adapters on the server's routed layers, one slot per adapter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from router_training.forward import check_output_head, prepare_for_training
from router_training.settings import BASE_NAME
from server.adapters.router_swap import check_fit
from server.adapters.sources import local_folder
from server.adapters.weights import Adapter, AdapterLimits, load_adapter
from server.config import AdapterSpec, ServerConfig, cache_folder
from server.errors import ConfigError, LoraMixerError, RouterArtefactError
from server.model.loader import LoadedModel, load_base_model
from server.routing.attach import RoutedModel, attach_routing
from server.routing.bank import BankSnapshot, ProjectionInfo
from server.routing.policy import BASE_DIGEST, BASE_PLAN, BASE_SLOT, GatePlan, Policy, fixed_plan, routed_plan
from server.routing.router import RouterArtefact

FIRST_SLOT = 1
"""Adapter i of the roster sits in slot i + 1; slot 0 is the base model."""

BASE_TASK = BASE_NAME
"""Chats of this task belong to no adapter: the base model alone should answer them."""


@dataclass(frozen=True, eq=False)
class Roster:
    """Base model and adapters, frozen and attached. A label is a slot: 0 is the base model, i + 1 is adapter i."""

    loaded: LoadedModel
    routed: RoutedModel
    adapters: tuple[Adapter, ...]

    @property
    def names(self) -> list[str]:
        return [adapter.name for adapter in self.adapters]

    @property
    def label_of_task(self) -> dict[str, int]:
        return {name: label for label, name in enumerate(self.tasks)}

    @property
    def tasks(self) -> list[str]:
        """Task of each label."""
        return [BASE_TASK, *self.names]

    @property
    def slot_of_digest(self) -> dict[str, int]:
        return {adapter.digest: index + FIRST_SLOT for index, adapter in enumerate(self.adapters)}

    @property
    def digest_of_slot(self) -> dict[int, str]:
        return {slot: digest for digest, slot in self.slot_of_digest.items()}

    def gated_projections(self) -> list[ProjectionInfo]:
        """Projections that at least one adapter targets, in order of computation."""
        targeted = self.routed.bank.snapshot.projections
        return [info for name, info in self.routed.projections.items() if name in targeted]

    def base_plans(self) -> list[GatePlan]:
        """One plan per label: no adapter."""
        return [BASE_PLAN] * len(self.tasks)

    def own_adapter_plans(self) -> list[GatePlan]:
        """One plan per label: its own adapter at weight 1, the oracle of a router."""
        slots = self.digest_of_slot
        return [BASE_PLAN, *(fixed_plan(Policy.PINNED, {slot: 1.0}, slots) for slot in sorted(slots))]

    def uniform_plans(self) -> list[GatePlan]:
        """One plan per label: every adapter at weight 1/E."""
        slots = self.digest_of_slot
        plan = fixed_plan(Policy.WEIGHTED, dict.fromkeys(slots, 1 / len(slots)), slots)
        return [plan] * len(self.tasks)

    def routed_plans(self, artefact: RouterArtefact, *, generation: int = 1) -> list[GatePlan]:
        """One plan per label, all equal: routed by `artefact`, which is published on the way, over all adapters and
        the null expert if it has one."""
        routers = self.routed.routers
        staged = routers.stage(generation, artefact, self.slot_of_digest)
        routers.publish(staged)
        null_expert = {BASE_SLOT: BASE_DIGEST} if BASE_SLOT in staged.slots else {}
        plan = routed_plan(
            {**null_expert, **self.digest_of_slot},
            staged.row_digest_of_slot,
            generation,
            artefact.settings,
            artefact.top_k,
        )
        return [plan] * len(self.tasks)


def check_artefact(artefact: RouterArtefact, roster: Roster) -> None:
    """Refuse an artefact of another base or of other adapters. Raises RouterArtefactError naming each difference."""
    check_fit(artefact, roster.routed, roster.loaded.name, origin="the router")
    digests = {adapter.digest for adapter in artefact.adapters}
    if missing := [adapter.name for adapter in roster.adapters if adapter.digest not in digests]:
        raise RouterArtefactError(
            f"the router has no gate row for these adapters as they are now: {', '.join(missing)}"
        )


def load_roster(config: ServerConfig, *, least: int = 2, on_adapter: Callable[[str], None] = lambda _: None) -> Roster:
    """Load base model and all routed adapters of `config`, `least` at least, on CPU and attach them.

    Raises ModelLoadError, or ConfigError with every adapter that cannot be used and why.
    """
    specs = [spec for spec in config.adapters if spec.routed]
    if len(specs) < least:
        raise ConfigError("router training needs at least two adapters with `routed: true`")
    loaded, routed = load_routed_base(config, len(specs))
    adapters, problems = [], []
    for spec in specs:
        on_adapter(spec.name)
        try:
            adapters.append(_load(spec, config, routed))
        except LoraMixerError as error:
            problems.append(error.message)
    names: dict[str, str] = {}
    for adapter in adapters:
        if (first := names.setdefault(adapter.digest, adapter.name)) != adapter.name:
            problems.append(f"adapters {first!r} and {adapter.name!r} are one and the same; route to one of them")
    if problems:
        raise ConfigError("; ".join(problems))
    return attach_adapters(loaded, routed, adapters)


def load_routed_base(config: ServerConfig, num_adapters: int) -> tuple[LoadedModel, RoutedModel]:
    """The frozen base model on CPU with an empty bank for `num_adapters`. Raises ModelLoadError."""
    loaded = load_base_model(config.base_model, device="cpu", cache_folder=cache_folder(), root=config.root)
    loaded.quantized.clear()  # training computes with what they stand for
    check_output_head(loaded.model)
    prepare_for_training(loaded.model)
    return loaded, attach_routing(loaded.model, num_slots=num_adapters + FIRST_SLOT)


def attach_adapters(loaded: LoadedModel, routed: RoutedModel, adapters: Sequence[Adapter]) -> Roster:
    """Put each adapter into its slot; whatever was in the bank leaves it."""
    routed.bank.publish(BankSnapshot())
    for label, adapter in enumerate(adapters):
        routed.bank.publish(routed.bank.with_adapter(label + FIRST_SLOT, adapter.weights))
    return Roster(loaded, routed, tuple(adapters))


def _load(spec: AdapterSpec, config: ServerConfig, routed: RoutedModel) -> Adapter:
    folder = local_folder(spec, config.root)
    if folder is None or not folder.is_dir():
        where = spec.source if folder is None else folder
        raise ConfigError(f"adapter {spec.name!r}: {where} is not a local folder; training reads local adapters only")
    limits = AdapterLimits(config.server.max_adapter_rank, config.server.max_adapter_bytes)
    return load_adapter(
        folder,
        spec.name,
        projections=routed.projections,
        base_model_name=config.base_model.name,
        limits=limits,
        source=spec.source,
        revision=spec.revision,
    )
