"""Keeps what left the routed pool out of it, across restarts, until an operator lets it in again.

`RegistryState` decides when an adapter has more than its cap; this module keeps disk and records in step afterwards.
"""

import logging
import threading

from server.adapters.exclusions import Exclusions
from server.adapters.records import AdapterInfo, AdapterState, Record
from server.adapters.state import RegistryState
from server.errors import LoraMixerError

logger = logging.getLogger(__name__)


class ShareGuard:
    """Every method may be called from any thread but the model's: it waits for the disk."""

    def __init__(self, state: RegistryState, exclusions: Exclusions) -> None:
        self._state = state
        self._exclusions = exclusions
        self._changes = threading.Lock()
        """Held while disk and record come to say the same. Taken before the state's mutex."""

    def keep(self, record: Record) -> None:
        """Have on disk that an adapter has left the routed pool, unless it is back, or gone, by now."""
        with self._changes:
            with self._state.mutex:
                is_current = self._state.records.get(record.spec.name) is record
                exclusion = record.exclusion if is_current and record.state is AdapterState.READY else None
            if exclusion is not None:
                self._exclusions.put(record.spec.name, exclusion)

    def readmit(self, record: Record) -> AdapterInfo:
        """Let an adapter into the routed pool again, if it is out. Raises LoraMixerError when that cannot be kept."""
        with self._changes:
            with self._state.mutex:
                is_current = self._state.records.get(record.spec.name) is record
            if is_current and record.exclusion is not None:
                self._exclusions.remove(record.spec.name)
            with self._state.mutex:
                if is_current and record.exclusion is not None:
                    logger.warning("adapter %s may be routed to again", record.spec.name)
                    self._state.readmit(record)
                return self._state.info(record)

    def restore(self, record: Record, digest: str) -> None:
        """Keep a loaded adapter out that had to leave, while content and cap are those that were judged."""
        known = self._exclusions.get(record.spec.name)
        if known is None or (known.generation, known.digest) != (record.generation, digest):
            return
        with self._state.mutex:
            if self._state.has_cap(record, known.max_gate_share):
                record.exclusion = known

    def forget(self, name: str) -> None:
        """The adapter was retired. One that comes back under its name is another generation."""
        with self._changes:
            try:
                self._exclusions.remove(name)
            except LoraMixerError as error:
                logger.warning("%s", error)
