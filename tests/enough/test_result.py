"""What a study says in words, and the numbers in its file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_pmss.enough.curve import NoCurve
from lightning_pmss.enough.result import Result, result_of, sentences, write_result

SIZES = (50, 200, 800, 3200)


def study(
    sigma: float, *, seeds: int = 3, scale: float = 4.0, power: float = 0.5, sizes: tuple[int, ...] = SIZES, **more: Any
) -> Result:
    rng = np.random.default_rng(1)
    found = [(n, s, 1 + scale * n**-power + rng.normal(0, sigma)) for n in sizes for s in range(seeds)]
    options: dict[str, Any] = {"monitor": "val/loss", "mode": "min", "which": "last", "missing": 0, **more}
    return result_of(found, **options)


def said(result: Result) -> str:
    return " ".join(sentences(result))


def test_a_gain_that_stays_above_the_noise() -> None:
    text = said(study(0.003))
    assert "Doubling the data from 3,200 to 6,400 examples is expected to lower val/loss by 0.02" in text
    assert "The gain of a doubling stays above the noise (one run's standard deviation between seeds, 0.00" in text
    assert "up to 32,000 examples, 10 times the largest size, beyond which this curve says nothing." in text


@pytest.mark.parametrize(("sigma", "verb"), [(0.02, "falls"), (0.05, "has fallen")])
def test_a_gain_that_falls_under_the_noise(sigma: float, verb: str) -> None:
    result = study(sigma, seeds=8)
    text = said(result)
    assert f"The gain of a doubling {verb} under the noise" in text
    assert result.noise is not None
    expected = (4 * (1 - 2**-0.5) / result.noise) ** 2
    shown = int(text.split("at about ")[1].split(" examples")[0].replace(",", ""))
    assert shown == pytest.approx(expected, rel=0.5)
    assert (shown > 3200) == (verb == "falls")


def test_a_gain_under_the_noise_at_all_sizes(tmp_path: Path) -> None:
    """No curve is read below the smallest size either."""
    result = study(0.3, seeds=40, sizes=(200, 400, 800, 1600, 3200), scale=8.0)
    assert not isinstance(result.curve, NoCurve)
    assert result.curve.size_of_gain(result.noise or 0.0)[0] < 200
    text = said(result)
    assert "The gain of a doubling is under the noise (one run's standard deviation between seeds, 0.2" in text
    assert "at all sizes measured, from 200 examples on: one run on twice the data need not be better." in text
    assert "at about" not in text
    write_result(tmp_path / "enough.json", result, {})
    assert json.loads((tmp_path / "enough.json").read_text())["curve"]["gain_under_noise"] is None


def test_an_interval_that_begins_below_the_smallest_size() -> None:
    result = study(0.2, seeds=20, sizes=(200, 400, 800, 1600, 3200), scale=8.0)
    assert not isinstance(result.curve, NoCurve)
    size, (low, _) = result.curve.size_of_gain(result.noise or 0.0)
    assert low < 200 < size
    assert "(95 % interval below 200 to " in said(result)


def test_one_seed_and_no_noise() -> None:
    sizes = (50, 100, 200, 400, 800, 1600)
    assert "One seed shows no noise to compare this with; give --seeds 3." in said(study(0.001, seeds=1, sizes=sizes))
    assert "All seeds scored the same, so no gain falls under the noise." in said(study(0.0))


def test_without_a_curve_the_last_gain_is_said_as_measured() -> None:
    two = SIZES[2:]
    assert said(study(0.001, sizes=two)).startswith(
        "No curve: a curve with an asymptote needs at least 4 sizes, and there are 2"
    )
    assert "Measured: from 800 to 3,200 examples, val/loss fell by 0.07" in said(study(0.001, sizes=two))
    assert ", which is within the noise." in said(study(0.5, sizes=two, scale=0.0))
    assert "Measured with one seed: from 800 to 3,200 examples, val/loss fell by" in said(
        study(0.0, seeds=1, sizes=two)
    )
    assert "val/loss rose by 0.07" in said(study(0.0, seeds=1, sizes=two, scale=-4.0))
    accuracy = said(study(0.0, seeds=1, sizes=two, scale=-4.0, monitor="val/acc", mode="max"))
    assert "val/acc rose by 0.07" in accuracy
    assert "No curve" in said(study(0.1, seeds=1, sizes=(50,)))


def test_what_is_missing_and_what_was_chosen_is_said() -> None:
    text = said(study(0.01, which="best", missing=2))
    assert text.startswith("2 runs have no score; everything here is without them. Scores are the best of several")
    assert said(study(0.01, missing=1)).startswith("1 run has no score; everything here is without it.")
    assert sentences(result_of([], "val/loss", "min", "last", 3))[1] == "No curve: no run has finished."


def test_the_file(tmp_path: Path) -> None:
    result = study(0.01)
    write_result(tmp_path / "enough.json", result, {"equal": "steps"})
    found = json.loads((tmp_path / "enough.json").read_text())
    curve = found["curve"]
    at = curve["asymptote"] + curve["factor"] * 3200 ** -curve["exponent"]
    assert at == pytest.approx(found["sizes"][-1]["score"]["mean"], abs=0.02)
    doubled = curve["asymptote"] + curve["factor"] * 6400 ** -curve["exponent"]
    assert curve["doubling"]["gain"] == pytest.approx(at - doubled)
    assert curve["doubling"]["from"] == 3200
    assert math.isclose(found["noise"], result.noise or 0)
    assert found["sentences"] == sentences(result)
    write_result(tmp_path / "none.json", study(0.01, sizes=SIZES[:2]), {})
    assert json.loads((tmp_path / "none.json").read_text())["curve"]["fitted"] is False
