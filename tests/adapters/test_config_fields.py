"""The table of LoraConfig fields knows every field of the installed PEFT, with its default."""

import dataclasses
import json
from pathlib import Path

from peft import LoraConfig

from server.adapters.config_fields import LORA_CONFIG_FIELDS, Treatment


def test_the_table_holds_exactly_the_fields_of_the_installed_peft() -> None:
    assert sorted(entry.name for entry in LORA_CONFIG_FIELDS) == sorted(
        field.name for field in dataclasses.fields(LoraConfig)
    )


def test_the_table_states_pefts_defaults() -> None:
    saved = LoraConfig(target_modules=["q_proj"])
    for entry in LORA_CONFIG_FIELDS:
        if entry.name in ("peft_type", "peft_version", "target_modules"):
            continue  # filled in by PEFT itself, or by the line above
        value = getattr(saved, entry.name)
        assert (vars(value) if dataclasses.is_dataclass(value) else value) == entry.default, entry.name


def test_a_freshly_saved_config_has_no_field_away_from_the_table(tmp_path: Path) -> None:
    LoraConfig(target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    known = {entry.name: entry for entry in LORA_CONFIG_FIELDS}
    for name, value in content.items():
        if known[name].treatment is Treatment.DEFAULT_ONLY:
            assert value == known[name].default


def test_every_refused_field_has_a_code_and_a_reason() -> None:
    for entry in LORA_CONFIG_FIELDS:
        assert bool(entry.code and entry.why) is (entry.treatment is Treatment.DEFAULT_ONLY), entry.name
