"""Which settings are refused, and the prior they carry."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from router_training.settings import TrainingConfig, check_choices, prior_shares
from server.errors import ConfigError


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": -1},
        {"lambda_": -0.1},
        {"sign": 0},
        {"eta": -1},
        {"top_k": 0},
        {"temperature": 0},
        {"granularity": "head"},
        {"gate_mode": "unheard-of"},
        {"routed_from_layer": -1},
        {"prior": {"maths": 0}},
        {"learning_rate": 0},
        {"too_long": "ignore"},
        {"composite_fraction": 1.5},
        {"rephrase_fraction": -0.5},
        {"lm_weighting": "bits"},
        {"checkpoint_every": 0},
        {"nonsense": 1},
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        TrainingConfig.model_validate(wrong)


def test_a_prior_is_normalised_in_slot_order() -> None:
    config = TrainingConfig(prior={"code": 3.0}, null_expert=True)
    shares = prior_shares(config, ["maths", "code"])
    assert shares is not None
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.2, 0.6]))
    assert prior_shares(TrainingConfig(), ["maths", "code"]) is None


def test_a_prior_of_an_unknown_adapter_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"'poetry'; the choices are 'maths', 'code'$"):
        check_choices(TrainingConfig(prior={"poetry": 1.0}), ["maths", "code"])
    with pytest.raises(ConfigError, match="'base'"):
        check_choices(TrainingConfig(prior={"base": 1.0}), ["maths"])
    check_choices(TrainingConfig(prior={"base": 1.0, "maths": 2.0}, null_expert=True), ["maths"])


def test_every_choice_needs_a_chat_beside_the_composites() -> None:
    names = ["maths", "code", "poetry"]
    check_choices(TrainingConfig(samples=6, composite_fraction=0.5), names)
    with pytest.raises(ConfigError, match="samples is 6, of which 4 are composites, not one chat for each of the 3"):
        check_choices(TrainingConfig(samples=6, composite_fraction=0.7), names)
    with pytest.raises(ConfigError, match="prompt_gate_samples is 2, not one chat"):
        check_choices(TrainingConfig(samples=6, prompt_gate=True, prompt_gate_samples=2), names)


def test_settings_survive_their_record() -> None:
    config = TrainingConfig(prior={"maths": 2.0}, null_expert=True, lambda_=0.5)
    assert TrainingConfig(**config.record()) == config
