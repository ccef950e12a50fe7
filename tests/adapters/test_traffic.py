"""Figures of traffic outlive the requests that made them."""

import math

from server.adapters.state import RegistryState


def test_a_mass_that_is_no_number_stays_in_no_share() -> None:
    state = RegistryState("base", alarm_factor=4.0, share_window=1000, hot_max_gate_share=None, on_excluded=print)
    state.record_traffic([(0, 1.0), (1, math.nan)], [(1, math.inf), (0, 1.0)])
    assert state._total_gate_mass == 1.0
    assert state._shares._unjudged == 1.0
