"""Which training chats baselines are fitted on."""

from collections import Counter
from pathlib import Path

import pytest

from router_training.calibration import Calibration, draw_calibration
from router_training.data import read_splits
from router_training.encoding import TokenSequence
from router_training.roster import Roster, load_roster
from server.config import load_config


@pytest.fixture
def project_roster(project: Path) -> Roster:
    return load_roster(load_config(project / "adapters.yaml"))


def test_the_draw_is_balanced_fixed_and_leaves_off_domain_chats_out(project: Path, project_roster: Roster) -> None:
    train = read_splits([project / "data"], project_roster.names, ("train",))["train"]
    calibration = draw_calibration(project_roster, {"base": train["letters"], **train}, 5)
    assert Counter(sequence.label for sequence in calibration.sequences) == {1: 5, 2: 5}
    assert Counter(sequence.label for sequence in calibration.beginning(2)) == {1: 2, 2: 2}
    assert {sequence.label for sequence in calibration.of_label(2)} == {2}
    again = draw_calibration(project_roster, train, 5)
    assert again.digest == calibration.digest
    assert draw_calibration(project_roster, train, 6).digest != calibration.digest


@pytest.mark.parametrize(
    "other",
    [TokenSequence((1, 2, 4), 2, 1), TokenSequence((1, 2, 3), 1, 1), TokenSequence((1, 2, 3), 2, 2)],
    ids=["tokens", "answer", "label"],
)
def test_the_digest_tells_apart_what_a_fit_would_see_differently(other: TokenSequence) -> None:
    assert Calibration([TokenSequence((1, 2, 3), 2, 1)]).digest != Calibration([other]).digest
