"""The tables of searches: early against final scores, and a Bayesian search against chance."""

from __future__ import annotations

from typing import Any

from experiments.searches import agreement_table, best_table


def trial(early: float | None, final: float | None) -> dict[str, Any]:
    """Without an early score it has diverged."""
    state = "done" if early is not None else "diverged"
    ended = "" if early is None else "done" if final is not None else "diverged"
    return {"early": early, "final": final, "state": state, "final_state": ended, "method": "LoRA"}


def study(sampler: str, trials: list[dict[str, Any]], seed: int = 0) -> dict[str, Any]:
    return {"sampler": sampler, "seed": seed, "trials": trials}


def test_agreement_is_of_searches_that_trained_all_to_their_end() -> None:
    final = [7.0, 2.0, 3.0, 4.0, 5.0, 1.0]  # the best early one ends last, the sixth first
    trials = [trial(float(i), score) for i, score in enumerate(final)] + [trial(None, None)]
    partly = [*trials[:2], trial(9.0, None) | {"final_state": ""}]
    lines = agreement_table({"whole": study("tpe", trials), "partly": study("random", partly)}).splitlines()
    assert len(lines) == 3
    assert [cell.strip() for cell in lines[2].split("|")[1:4]] == ["whole", "7", "1"]
    assert [cell.strip() for cell in lines[2].split("|")[6:8]] == ["4 of 5", "number 6"]


def test_a_trial_that_diverged_after_its_fraction_ends_last() -> None:
    trials = [trial(0.0, None), *(trial(float(i), float(i)) for i in range(1, 7))]
    (line,) = agreement_table({"a": study("tpe", trials)}).splitlines()[2:]
    assert [cell.strip() for cell in line.split("|")[3:8:4]] == ["1", "diverged"]


def test_the_best_after_some_trials_and_at_the_end() -> None:
    trials = [trial(float(20 - i), float(i)) for i in range(10)]  # later trials are better early, and worse at the end
    better = [trial(score["early"] - 1.0, score["final"]) for score in trials]
    record = {
        "x-tpe-0": study("tpe", trials),
        "x-tpe-1": study("tpe", better, 1),
        "x-random-0": study("random", trials),
        "x-random-1": study("random", trials, 1),
        "y-tpe-0": study("tpe", trials[:5]),
    }
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in best_table(record).splitlines()[2:]]
    assert [line[:2] for line in lines] == [["x", "tpe"], ["x", "random"], ["y", "tpe"], ["x", "tpe - random"]]
    assert lines[1][2:] == ["16.000 ± 0.000", "11.000 ± 0.000", "", "", "5.000 ± 0.000", "2"]
    assert lines[2][2:] == ["16.000", "", "", "", "0.000", "1"]
    assert [cell.split()[0] for cell in lines[3][2:4]] == ["-0.500", "-0.500"]
    assert lines[3][6] == "0.000 ± 0.000"
