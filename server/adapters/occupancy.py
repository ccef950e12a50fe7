"""Who must stay in the bank, and what room that leaves, as the registry's state says. Calls hold its mutex."""

from server.adapters.records import AdapterState, Record
from server.adapters.room import Room, Seat
from server.adapters.state import RegistryState
from server.routing.router import RouterArtefact


def stays(state: RegistryState, record: Record) -> bool:
    """Whether it must not leave the bank once it is there: pinned, or the current router has, or is to have, a row
    for it.
    """
    router, adapter = state.router, record.adapter
    if record.spec.pinned or router is None or adapter is None:
        return record.spec.pinned
    return record.slot in router.slots or (record.spec.routed and has_row(record, adapter.digest, router.artefact))


def has_row(record: Record, digest: str, artefact: RouterArtefact) -> bool:
    """Whether a router of this artefact has a row for the adapter, trained or calibrated."""
    hot = record.calibration
    return digest in artefact.digests or (hot is not None and hot.artefact is artefact and not hot.problems)


def room_of(state: RegistryState, max_bytes: int | None, max_slots: int, leaving: Record | None = None) -> Room:
    """Room in the bank as it is now; `leaving` is about to be replaced, so it stays no longer."""
    return Room(
        (
            Seat(
                slot,
                record.memory_bytes,
                stays=record is not leaving and record.state is AdapterState.READY and stays(state, record),
                is_leased=state.holds_slot(slot) or record.state is not AdapterState.READY,
                last_use=0 if record is leaving else record.last_use,
            )
            for slot, record in state.seated.items()
        ),
        max_bytes=max_bytes,
        max_slots=max_slots,
    )


def wanted_by(state: RegistryState, artefact: RouterArtefact) -> list[str]:
    """Names of the READY adapters that a router of this artefact would route to. Needs no mutex."""
    return [
        name
        for name, served in state.roster.adapters.items()
        if served.wants_routing and served.digest in artefact.digests
    ]
