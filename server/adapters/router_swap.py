"""Judging a router artefact against the model and the resident adapters, and telling facts about the loaded one."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from server.adapters.records import AdapterState
from server.adapters.roster import Roster
from server.adapters.state import RegistryState
from server.errors import RouterArtefactError
from server.routing.attach import RoutedModel
from server.routing.policy import BASE_DIGEST
from server.routing.router import RouterArtefact, gate_key, load_artefact
from server.routing.router_bank import check_base


def load_checked_artefact(folder: Path, routed: RoutedModel, base_model_name: str) -> RouterArtefact:
    """Read an artefact for this model. Raises RouterArtefactError when it is damaged or belongs to another one."""
    artefact = load_artefact(folder)
    check_fit(artefact, routed, base_model_name, origin=f"the router in {folder}")
    return artefact


def check_fit(artefact: RouterArtefact, routed: RoutedModel, base_model_name: str, *, origin: str) -> None:
    """Refuse a router of another model. Raises RouterArtefactError naming each difference; `origin` is its subject."""
    check_base(artefact, base_model=base_model_name, hidden_size=routed.hidden_size, num_layers=routed.num_layers)
    # A per-layer gate reads the input of the layer's attention, which is as wide as the hidden state.
    widths = {gate_key(artefact.granularity, info): info.d_in for info in routed.projections.values()}
    if artefact.granularity == "layer":
        widths = dict.fromkeys(widths, routed.hidden_size)
    problems = [
        f"gate {key!r} belongs to no {artefact.granularity} of this model"
        if key not in widths
        else f"gate {key!r} reads {rows.shape[1]} values, here they are {widths[key]}"
        for key, rows in artefact.rows.items()
        if widths.get(key) != rows.shape[1]
    ]
    if problems:
        listed = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise RouterArtefactError(f"{origin} does not fit: {listed}")


def check_digests(artefact: RouterArtefact, state: RegistryState) -> None:
    """Refuse gate rows for an adapter whose weights are not those registered under its name.

    Rows for adapters that are not registered wait for them. What a client has put in the place of another adapter, or
    had registered before this start, is served by name or by a row of its own: that was acknowledged, whatever the
    router of then was trained with. Raises RouterArtefactError naming each difference.
    """
    with state.mutex:
        ready = {r.spec.name: r for r in state.records.values() if r.state is AdapterState.READY}
    digest_of = {name: record.adapter.digest for name, record in ready.items() if record.adapter is not None}
    registered = frozenset(digest_of.values())
    different = [
        f"{known.name!r} was trained for digest {known.digest[:12]}, registered is {digest_of[known.name][:12]}"
        for known in artefact.adapters
        if known.digest not in registered
        and digest_of.get(known.name, known.digest) != known.digest
        and not ready[known.name].is_acknowledged
    ]
    if different:
        raise RouterArtefactError("the router's gate rows belong to other adapters: " + "; ".join(different))


def router_facts(roster: Roster, folder: str) -> dict[str, Any]:
    """JSON-able facts of the roster's router."""
    router = roster.router
    if router is None:
        return {"loaded": False}
    artefact = router.artefact
    names = {adapter.digest: name for name, adapter in roster.adapters.items() if roster.is_routed(adapter)}
    return {
        "loaded": True,
        "source": folder,
        "generation": router.id,
        "base_model": artefact.base_model,
        "hidden_size": artefact.hidden_size,
        "num_layers": artefact.num_layers,
        "granularity": artefact.granularity,
        "gate_mode": artefact.gate_mode,
        "top_k": artefact.top_k,
        "temperature": artefact.temperature,
        "null_expert": any(known.digest == BASE_DIGEST for known in artefact.adapters),
        "prompt_gate": None if artefact.prompt_gate is None else asdict(artefact.prompt_gate.settings),
        "adapters": [
            {"name": known.name, "digest": known.digest, "rank": known.rank, "served_as": names.get(known.digest)}
            for known in artefact.adapters
            if known.digest != BASE_DIGEST
        ],
        "training": dict(artefact.training),
    }
