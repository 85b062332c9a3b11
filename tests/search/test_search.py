"""Searches whose trainings are a function: counts, failures, divergences, the best ones, refusals."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from optuna.trial import TrialState

from lightning_pmss.search.ranks import ranks
from lightning_pmss.search.records import Line, winner
from lightning_pmss.search.sampler import sampler
from lightning_pmss.search.search import SearchError, finals_name, read_search
from lightning_pmss.search.space import space_of
from lightning_pmss.search.storage import open_storage
from lightning_pmss.search.table import table
from lightning_pmss.search.trial import Assignment, Outcome
from lightning_pmss.search.workers import ATTEMPT, INSTEAD_OF, counted, put_back
from tests.search.fakes import SPACE, Trainings, loss, make


def test_a_search_and_its_best_trained_to_their_end(tmp_path: Path) -> None:
    run, said = Trainings(), list[str]()
    search = make(tmp_path, run, trials=8, finish=3, said=said)
    search.search()
    assert len(run.ran) == 8
    assert search.untrained == 9.0
    search.finish()
    assert len(run.ran) == 11
    lines = search.lines()
    order = sorted(lines, key=lambda line: line.early or 0.0)
    assert [line.final is not None for line in order] == [True] * 3 + [False] * 5
    for line in lines:
        assert line.early == pytest.approx(loss(search.plan.space.settings(line.params)))
    for line in order[:3]:
        assert line.final == pytest.approx((line.early or 0) / 2)
        assert (search.plan.space.settings(line.params), str(Path(line.folder) / "stopped.ckpt")) in run.ran[8:]
    best = winner(lines, "min")
    assert best == order[0]
    assert any("[8 of 8]" in line for line in said)
    assert any("[3 of 8" in line and "left" in line for line in said)
    again = make(tmp_path, run, trials=8, finish=3)
    again.search()
    again.finish()
    assert len(run.ran) == 11  # nothing was left to do
    more = make(tmp_path, run, trials=9, finish=3)
    more.search()
    assert len(run.ran) == 12
    shown, space, bound = read_search(f"sqlite:///{tmp_path / 'study.db'}", "study")
    assert (len(shown), bound["fraction"]) == (9, 0.2)
    text = table(shown, space, "min").splitlines()
    assert text[0].split() == ["trial", "state", "early", "final", "seconds", "settings"]
    assert text[1].split()[:3] == [str(best.number), "done", f"{best.early:.6g}"]


def test_the_whole_training_needs_no_second_part(tmp_path: Path) -> None:
    run = Trainings()
    search = make(tmp_path, run, fraction=1.0, finish=4)
    search.search()
    search.finish()
    assert len(run.ran) == 6
    assert all(line.final == line.early is not None for line in search.lines())


def test_more_is_better(tmp_path: Path) -> None:
    search = make(tmp_path, Trainings(), mode="max", finish=1)
    search.search()
    search.finish()
    best = winner(search.lines(), "max")
    assert best is not None
    assert best.early == max(line.early or 0.0 for line in search.lines())


def test_a_divergence_is_worse_than_all_and_no_crash(tmp_path: Path) -> None:
    def outcome(settings: Any, last: bool) -> Outcome | None:
        return Outcome("diverged", message="val/loss is nan", untrained=9.0) if settings["lr"] > 0.02 else None

    search = make(tmp_path, Trainings(outcome), trials=10)
    search.search()
    lines = search.lines()
    diverged = [line for line in lines if line.state == "diverged"]
    assert diverged
    assert all(line.early is None and line.message == "val/loss is nan" for line in diverged)
    assert {line.state for line in lines} == {"done", "diverged"}
    assert "diverged" in table(lines, search.plan.space, "min")


def test_the_sampler_avoids_where_trials_diverge() -> None:
    space = space_of(SPACE, "space")
    study = optuna.create_study(sampler=sampler("tpe", space, 0))
    for _ in range(40):
        trial = study.ask()
        settings = space.draw(trial)
        bad = settings["lr"] > 0.1
        study.tell(trial, None if bad else loss(settings), TrialState.PRUNED if bad else TrialState.COMPLETE)
    states = [trial.state for trial in study.trials]
    assert states[20:].count(TrialState.PRUNED) < states[:20].count(TrialState.PRUNED)


def test_a_crash_fails_one_trial_and_its_last_lines_are_shown(tmp_path: Path) -> None:
    def outcome(settings: Any, last: bool) -> Outcome | None:
        return (
            Outcome("failed", message="out of memory", lines=["step 3", "out of memory"])
            if settings["rank"] == 4
            else None
        )

    said = list[str]()
    search = make(tmp_path, Trainings(outcome), trials=12, said=said)
    search.search()
    states = [line.state for line in search.lines()]
    assert len(states) == 12
    assert 0 < states.count("failed") < 12
    assert "    step 3" in said
    assert any("failed (out of memory)" in line for line in said)


def test_the_same_failure_from_the_start_stops_the_search(tmp_path: Path) -> None:
    number = iter(range(100))
    broken = Trainings(lambda settings, last: Outcome("failed", message=f"no such file in run {next(number)}"))
    with pytest.raises(SearchError, match="the first 3 trials failed in the same way.*no such file in run 2"):
        make(tmp_path, broken).search()
    assert len(broken.ran) == 3
    mended = Trainings()
    search = make(tmp_path, mended)
    search.search()
    assert [settings for settings, _ in mended.ran[:3]] == [settings for settings, _ in broken.ran]
    assert len(mended.ran) == 6 == len(search.lines())
    assert {line.state for line in search.lines()} == {"done"}


def test_failures_behind_good_trials_do_not_stop_it(tmp_path: Path) -> None:
    """A continued study: the recipe is not at fault."""
    make(tmp_path, Trainings(), trials=2).search()
    broken = Trainings(lambda settings, last: Outcome("failed", message="out of memory"))
    search = make(tmp_path, broken, trials=6)
    search.search()
    assert [line.state for line in search.lines()] == ["done"] * 2 + ["failed"] * 4


def test_different_failures_do_not_stop_it(tmp_path: Path) -> None:
    kinds = iter("abcdefgh")
    search = make(tmp_path, Trainings(lambda settings, last: Outcome("failed", message=next(kinds))))
    search.search()
    assert [line.state for line in search.lines()] == ["failed"] * 6


def test_a_failure_at_the_end_is_tried_again_by_the_next_start(tmp_path: Path) -> None:
    fails = [True]
    run = Trainings(lambda settings, last: Outcome("failed", message="no space") if last and fails[0] else None)
    search = make(tmp_path, run, finish=2)
    search.search()
    search.finish()
    assert [line.final_state for line in search.lines()].count("failed") == 2
    fails[0] = False
    search.finish()
    assert [line.final_state for line in search.lines()].count("done") == 2


class Stop:
    """Interrupts a training."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, settings: Any, last: bool) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def test_an_interrupted_search_continues_with_the_trial_that_ran(tmp_path: Path) -> None:
    first, second, said = Trainings(Stop(2)), Trainings(), list[str]()
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, first, said=said).search()
    assert "trial 2 is put back; the same command continues" in said
    search = make(tmp_path, second)
    search.search()
    assert second.ran[0] == first.ran[2]
    assert len(search.lines()) == 6 == len({line.number for line in search.lines()})
    assert [line.state for line in search.lines()] == ["done"] * 6


def test_an_interrupted_end_continues(tmp_path: Path) -> None:
    first = Trainings(Stop(7))
    search = make(tmp_path, first, finish=3)
    search.search()
    with pytest.raises(KeyboardInterrupt):
        search.finish()
    second = Trainings()
    search = make(tmp_path, second, finish=3)
    search.search()
    search.finish()
    assert first.ran[7] in second.ran  # the one that was stopped
    assert first.ran[6] not in second.ran
    assert len(second.ran) == 2
    assert [line.final_state for line in search.lines()].count("done") == 3


def test_an_interrupted_end_goes_on_from_its_own_checkpoint(tmp_path: Path) -> None:
    search = make(tmp_path, Trainings(), finish=1)
    search.search()
    seen: list[Assignment] = []

    def stopped(assignment: Assignment) -> Outcome:
        seen.append(assignment)
        saved = Path(callbacks(assignment)[0]["dirpath"]) / "last.ckpt"
        saved.parent.mkdir(parents=True)
        saved.touch()
        torch.save({"global_step": 5}, saved.with_name("last-interrupted.ckpt"))  # all steps: of no use
        raise KeyboardInterrupt

    search.run = stopped
    with pytest.raises(KeyboardInterrupt):
        search.finish()
    (first,) = seen
    assert Path(str(first.checkpoint)).name == "stopped.ckpt"
    assert callbacks(first)[0]["every_n_train_steps"] < 5  # of five steps in all
    second = Trainings()
    search = make(tmp_path, second, finish=1)
    search.finish()
    ((_, checkpoint),) = second.ran
    assert checkpoint == str(first.folder / "checkpoints" / "last.ckpt")
    assert not Path(checkpoint).exists()  # it is of no use any more
    assert Path(str(first.checkpoint)).exists()


def callbacks(assignment: Assignment) -> list[Any]:
    """The options of those that a training gets."""
    return [each["init_args"] for each in yaml.safe_load(assignment.config)["trainer"]["callbacks"]]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"recipe": {"lr": 1, "model": {"width": 3}}}, "recipe.model was not there, is {'width': 3}"),
        ({"recipe": {"lr": 2}}, "recipe.lr was 1, is 2"),
        ({"fraction": 0.5}, "fraction was 0.2, is 0.5"),
        ({"mode": "max"}, "mode was min, is max"),
        ({"sampler": "random"}, "sampler was tpe, is random"),
        (
            {"space": space_of({"options": {"lr": {"choice": [1, 2]}}}, "x")},
            "space.options.lr.low was 1e-05, is not there",
        ),
    ],
)
def test_another_search_of_the_same_name_is_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    make(tmp_path, Trainings())
    make(tmp_path, Trainings(), trials=50, finish=9)  # more of the same
    with pytest.raises(ValueError, match="the study 'study' is of another search") as error:
        make(tmp_path, Trainings(), **changed)
    assert said in str(error.value)
    make(tmp_path, Trainings(), **changed, name="other")


def test_a_folder_of_another_study_is_not_mixed_up(tmp_path: Path) -> None:
    make(tmp_path, Trainings(), trials=1).search()
    with pytest.raises(FileExistsError, match="0000 exists, and is not of this study"):
        make(tmp_path, Trainings(), name="other").search()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "is no URL of a database"),
        ("sqlite://", "in memory is lost"),
        ("sqlite:////no/such/folder/study.db", "the folder /no/such/folder does not exist"),
        ("postgresql+psycopg2://user:secret@127.0.0.1:1/none", "the database cannot be used: .*(refused|connect)"),
        ("oracle+cx_oracle://x@127.0.0.1/none", "its driver is not installed"),
    ],
)
def test_a_database_that_cannot_be_used(url: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        open_storage(url)
    assert "secret" not in str(error.value)


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_text("no database at all, but a text that is long enough to be read as one" * 20)
    with pytest.raises(ValueError, match="the database cannot be used: file is not a database"):
        open_storage(f"sqlite:///{tmp_path / 'study.db'}")


def test_a_study_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    make(tmp_path, Trainings(), name="mine")
    with pytest.raises(ValueError, match="no study 'yours'. It has 'mine'"):
        read_search(f"sqlite:///{tmp_path / 'study.db'}", "yours")


def test_the_bayesian_sampler_finds_better_trials_than_chance() -> None:
    space, found = space_of(SPACE, "space"), dict[str, list[float]]()
    for name in ("tpe", "random"):
        for seed in range(3):
            study = optuna.create_study(sampler=sampler(name, space, seed))
            for _ in range(40):
                trial = study.ask()
                study.tell(trial, loss(space.draw(trial)))
            found.setdefault(name, []).extend(float(trial.value or 0.0) for trial in study.trials[20:])
    assert statistics.median(found["tpe"]) < 0.5 * statistics.median(found["random"])


def test_a_trial_too_many_is_taken_back(tmp_path: Path) -> None:
    """On two hosts no file is locked: another worker may take the last trial between counting and asking."""
    search = make(tmp_path, Trainings(), trials=1)
    ask, others = search.study.ask, []

    def late() -> Any:
        if not others:
            others.append(ask())
        return ask()

    search.study.ask = late  # type: ignore[method-assign]
    assert search._claim(1) is None
    assert [trial.number for trial in counted(search.study)] == [others[0].number]
    assert search.study.trials[1].state is TrialState.FAIL


def test_an_end_that_two_workers_asked_for_runs_once(tmp_path: Path) -> None:
    run = Trainings()
    search = make(tmp_path, run, finish=1)
    search.search()
    search.finish()
    best = next(line.number for line in search.lines() if line.final is not None)
    finals = optuna.load_study(storage=search.storage, study_name=finals_name("study"))
    finals.enqueue_trial({}, user_attrs={"of": best})
    finals.enqueue_trial({}, user_attrs={"of": best})
    before = len(run.ran)
    search.finish()
    assert len(run.ran) == before


def test_ranks_say_what_can_be_said() -> None:
    def line(number: int, early: float, final: float | None, state: str = "done") -> Line:
        return Line(number, "done", early, final, state, 1.0, {}, "", "", "")

    ten = [line(n, float(n), float(n)) for n in range(10)]
    found = ranks(ten, "min")
    assert (found.finished, found.spearman, found.kendall, found.top, found.stayed) == (
        10,
        pytest.approx(1.0),
        pytest.approx(1.0),
        5,
        5,
    )
    assert "5 of the 5 best early trials are among the 5 best at the end (by chance: 2.5)" in found.text()
    turned = ranks([line(n, float(n), float(-n)) for n in range(10)], "min")
    assert (turned.spearman, turned.kendall, turned.stayed) == (pytest.approx(-1.0), pytest.approx(-1.0), 0)
    # 4 of 5, as in the paper: number 4 falls behind number 5
    paper = [line(n, float(n), float({4: 5, 5: 4}.get(n, n))) for n in range(10)]
    assert ranks(paper, "min").stayed == 4
    assert ranks(paper, "max").stayed == 4
    late = [line(0, 0.0, None, "diverged"), *ten[1:]]
    assert ranks(late, "min").stayed == 4  # a late divergence is the last at the end
    assert ranks(late, "min").finished == 10
    assert math.isclose(ranks(late, "min").spearman or 0, 1 - 6 * (81 + 9) / (10 * 99))
    few = ranks([*ten[:4], *(line(n, float(n), None) for n in range(4, 30))], "min")
    assert "Only the best 4 of 30 trials" in few.text()
    assert few.top == 0
    assert "too few" in ranks(ten[:2], "min").text()
    assert "equal scores" in ranks([line(n, 1.0, 2.0) for n in range(5)], "min").text()


def test_attempts_and_repeats_are_recorded(tmp_path: Path) -> None:
    search = make(tmp_path, Trainings())
    trial = search._claim(6)
    assert trial is not None
    search.plan.space.draw(trial)
    known = search.study.get_trials()[trial.number]
    assert put_back(search.study, known, 2)
    assert not put_back(search.study, known, 2)  # another worker was faster
    (waiting,) = counted(search.study)
    assert (waiting.user_attrs[INSTEAD_OF], waiting.user_attrs[ATTEMPT]) == (0, 2)
    assert waiting.system_attrs["fixed_params"] == known.params
