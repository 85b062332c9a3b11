"""A stopped `test` goes on where it was; predictions of another run are never mixed in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from handmade import EXAMPLES, EqualTexts, HandMade
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch import Tensor

from lightning_pmss.evaluation.identity import model_hash, tensor_hash
from lightning_pmss.modules import CausalLMModule

Trainers = Callable[..., L.Trainer]


class Counting(CausalLMModule):
    """Counts prompts, and stops like a kill after so many batches."""

    asked, stop_after = 0, 99

    def generate(self, prompt_ids: Tensor, prompt_mask: Tensor) -> list[str]:
        if self.stop_after == 0:
            raise KeyError("killed")
        self.stop_after -= 1
        self.asked += len(prompt_ids)
        return super().generate(prompt_ids, prompt_mask)


def module(folder: str, **options: Any) -> Counting:
    return Counting(folder, **{"metric": EqualTexts(), "max_new_tokens": 6, **options})


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_stopped_evaluation_goes_on_and_ends_as_if_never_stopped(
    tiny_llama: str, tmp_path: Path, trainer: Trainers
) -> None:
    data, options = HandMade(tiny_llama), {"predictions_dir": str(tmp_path / "p")}
    whole = module(tiny_llama, predictions_dir=str(tmp_path / "whole"))
    expected = trainer().test(whole, data, verbose=False)[0]
    first = module(tiny_llama, **options)
    first.stop_after = 2
    with pytest.raises(KeyError, match="killed"):
        trainer().test(first, data, verbose=False)
    part = tmp_path / "p" / "predictions-test.rank0.jsonl"
    assert [row["id"] for row in read(part)] == [0, 1, 2, 3]
    part.write_bytes(part.read_bytes()[:-9])  # the kill came in the middle of the last line
    second = module(tiny_llama, **options)
    found = trainer().test(second, data, verbose=False)[0]
    assert second.asked == 2
    assert found == pytest.approx(expected, rel=1e-6)
    for row, other in zip(
        read(tmp_path / "p" / "predictions-test.jsonl"),
        read(tmp_path / "whole" / "predictions-test.jsonl"),
        strict=True,
    ):
        assert row == {**other, "loss": pytest.approx(other["loss"], rel=1e-5)}
    assert not part.exists()
    told = json.loads((tmp_path / "p" / "summary-test.json").read_text())
    assert (told["n"], told["answered_before"]) == (5, 3)
    third = module(tiny_llama, **options)
    assert trainer().test(third, data, verbose=False)[0] == pytest.approx(expected, rel=1e-6)
    assert third.asked == 0


def test_other_model_or_options_are_refused_unless_asked_for(
    tiny_llama: str, tmp_path: Path, trainer: Trainers
) -> None:
    data, options = HandMade(tiny_llama), {"predictions_dir": str(tmp_path / "p")}
    trainer().test(module(tiny_llama, **options), data, verbose=False)
    before = (tmp_path / "p" / "predictions-test.jsonl").read_bytes()
    with pytest.raises(
        ValueError, match=r"another run \(max_new_tokens: 6 there, 4 now\).*existing_predictions replace"
    ):
        trainer().test(module(tiny_llama, max_new_tokens=4, **options), data, verbose=False)
    changed = module(tiny_llama, **options)
    changed.configure_model()
    with torch.no_grad():
        next(changed.model.parameters())[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"another run \(model: "):
        trainer().test(changed, data, verbose=False)
    assert (tmp_path / "p" / "predictions-test.jsonl").read_bytes() == before
    anew = module(tiny_llama, max_new_tokens=4, existing_predictions="replace", **options)
    trainer().test(anew, data, verbose=False)
    assert anew.asked == 5
    assert (tmp_path / "p" / "predictions-test.jsonl").read_bytes() != before


def test_other_questions_are_refused(tiny_llama: str, tmp_path: Path, trainer: Trainers) -> None:
    options = {"predictions_dir": str(tmp_path / "p")}
    trainer().test(module(tiny_llama, **options), HandMade(tiny_llama), verbose=False)
    data = HandMade(tiny_llama, targets=[*"abcd", EXAMPLES[4][1]])
    with pytest.raises(ValueError, match=r"another question with the id 0 \(other target\)"):
        trainer().test(module(tiny_llama, **options), data, verbose=False)


def test_answers_beyond_a_smaller_test_are_kept_for_a_larger_one(
    tiny_llama: str, tmp_path: Path, trainer: Trainers
) -> None:
    data, options = HandMade(tiny_llama), {"predictions_dir": str(tmp_path / "p")}
    trainer().test(module(tiny_llama, **options), data, verbose=False)
    trainer(limit_test_batches=1).test(module(tiny_llama, **options), data, verbose=False)
    assert [row["id"] for row in read(tmp_path / "p" / "predictions-test.jsonl")] == [0, 1]
    last = module(tiny_llama, **options)
    trainer().test(last, data, verbose=False)
    assert last.asked == 0
    assert [row["id"] for row in read(tmp_path / "p" / "predictions-test.jsonl")] == [0, 1, 2, 3, 4]


def test_a_model_trained_between_two_tests_is_tested_anew(tiny_llama: str, trainer: Trainers) -> None:
    one, data = module(tiny_llama), HandMade(tiny_llama)
    trainer().test(one, data, verbose=False)
    trainer(max_epochs=1).fit(one, data)
    one.asked = 0
    trainer().test(one, data, verbose=False)
    assert one.asked == 5


def test_summary_has_an_interval_per_score(tiny_llama: str, tmp_path: Path, trainer: Trainers) -> None:
    class Half(EqualTexts):
        def score_half(self, pred: str, target: str) -> float:
            return 0.5

    logged = trainer().test(module(tiny_llama, metric=Half()), HandMade(tiny_llama), verbose=False)[0]
    told = json.loads((tmp_path / "summary-test.json").read_text())
    assert told["scores"]["score"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 5}
    assert told["scores"]["score_half"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 5}
    assert told["logged"] == {"exact_match": logged["test/exact_match"]}
    assert told["identity"]["max_new_tokens"] == 6
    assert {row["run"] for row in read(tmp_path / "predictions-test.jsonl")} == {told["run"]}


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_progress_shows_the_score_so_far(tiny_llama: str, trainer: Trainers, bar: Any) -> None:
    told = []

    class Look(L.Callback):
        def on_test_batch_end(self, trainer: Any, *_: Any) -> None:
            shown = trainer.progress_bar_callback
            if bar is TQDMProgressBar:
                told.append(shown.test_progress_bar.postfix)
            else:
                told.append(shown.progress.tasks[shown.test_progress_bar_id].description)

    class All(EqualTexts):
        def score(self, pred: str, target: str) -> float:
            return float(target == "7")  # the third example

    options: dict[str, Any] = {"enable_progress_bar": True, "callbacks": [bar(), Look()]}
    trainer(**options).test(module(tiny_llama, metric=All()), HandMade(tiny_llama), verbose=False)
    assert [text.removeprefix("Testing, ") for text in told] == [
        "score 0.000 of 2",
        "score 0.250 of 4",
        "score 0.200 of 5",
    ]


def test_hash_sees_each_number_its_place_and_settings() -> None:
    values = torch.tensor([1.0, 2.0, 2.0, 3.0])
    base = tensor_hash(values)
    assert base == tensor_hash(values.clone().view(2, 2).t().contiguous().t())
    others = [values.flip(0), values + 1, values * torch.tensor([1, 1, 1, 1 + 1e-7]), values.bfloat16(), values[:3]]
    assert len({base, *map(tensor_hash, others)}) == 6
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.1))
    before = model_hash(model)
    assert model_hash(model.train(not model.training)) == before
    model[0].scale = 2.0  # type: ignore[assignment]
    assert model_hash(model) != before
