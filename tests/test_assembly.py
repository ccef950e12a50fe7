"""What the composition root says before anything is loaded."""

from pathlib import Path

import pytest

from server.assembly import build_model
from server.config import ServerConfig, parse_config
from server.errors import ModelLoadError


@pytest.mark.parametrize(
    ("base_model", "missing"),
    [
        ({"source": "./none"}, "base_model.name"),
        ({"source": "./none", "dtype": "float32"}, "base_model.name"),
        ({"source": "./none", "name": "mine"}, None),
    ],
)
def test_a_base_model_that_the_config_does_not_name_is_told(
    base_model: dict[str, str], missing: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ModelLoadError):
        build_model(parse_config({"base_model": base_model}, root=tmp_path))
    default = ServerConfig().base_model.name
    expected = f"the config has no {missing}; taking the default: {default} from ./none"
    assert caplog.messages == ([expected] if missing else [])
