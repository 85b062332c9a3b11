"""The configuration of a run in a folder of its own, and in words where two differ."""

from __future__ import annotations

from pathlib import Path

from lightning_pmss.runs.configuration import differences, in_folder, made


def test_what_saves_elsewhere_is_left_out(tmp_path: Path) -> None:
    saver = made("lightning.pytorch.callbacks.ModelCheckpoint", dirpath="/gone")
    curve, own = made("lightning_pmss.callbacks.loss_curve.LossCurve"), made("lightning.pytorch.callbacks.Timer")
    recipe = {
        "trainer": {"callbacks": [saver, curve], "logger": made("x.Logger", save_dir="/gone"), "max_steps": 3},
        "pmss": {"rank": 4, "merge_on_save": "always"},
        "ckpt_path": "/gone/x.ckpt",
    }
    config = in_folder(recipe, tmp_path, [own])
    assert "/gone" not in str(config)
    assert config["trainer"]["callbacks"] == [curve, own]
    assert config["trainer"]["max_steps"] == 3
    assert config["pmss"] == {"rank": 4, "merge_on_save": None, "output_dir": str(tmp_path)}
    assert recipe["trainer"]["callbacks"] == [saver, curve]  # type: ignore[index]


def test_differences() -> None:
    before = {"a": {"b": 1, "c": [1, 2]}, "d": 3}
    assert differences(before, before) == []
    assert differences(before, {"a": {"b": 2, "c": [1, 3]}, "e": None}) == [
        "a.b was 1, is 2", "a.c was [1, 2], is [1, 3]", "d was 3, is not there", "e was not there, is None",
    ]  # fmt: skip
