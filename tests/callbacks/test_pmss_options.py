"""The options of the callback are those of the config."""

from __future__ import annotations

import dataclasses

import pytest

from lightning_pmss import PMSSCallback, PMSSConfig


def test_callback_takes_every_field_of_the_config() -> None:
    others = {
        "rank": 3,
        "rank_pattern": {"a": 2},
        "root": "policy",
        "target_parameters": ["down_proj"],
        "seed": 5,
        "dropout": 0.5,
        "scale": 2.0,
        "oversample": 1,
    }
    others |= {"selection": "norm", "row_mode": "nested", "coordinates": "raw", "edit": "input", "memory": "keep"}
    others |= {
        "columns": "selected",
        "target_modules": ["a"],
        "exclude_modules": ["b"],
        "also_train": ["c"],
        "skeleton_file": "file",
    }
    assert others.keys() == {field.name for field in dataclasses.fields(PMSSConfig)}
    assert PMSSCallback(**others).config == PMSSConfig(**others)  # type: ignore[arg-type]
    assert PMSSCallback().config == PMSSConfig()
    with pytest.raises(TypeError, match="rnak"):
        PMSSCallback(rnak=3)


def test_each_option_is_written_once_and_shown_wherever_it_can_be_given() -> None:
    for cls in (PMSSCallback, PMSSConfig):
        for option in ("target_modules", "also_train", "coordinates", "memory"):
            assert cls.__doc__.count(f"\n        {option}: ") == 1, option  # type: ignore[union-attr]
    assert "\n        merge_on_save: " in (PMSSCallback.__doc__ or "")
    assert "\n        rank: Rows and columns" in (PMSSConfig.__doc__ or "")
