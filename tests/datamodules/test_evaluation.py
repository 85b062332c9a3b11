"""Targets that are lists pass through generation, scoring and the predictions file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from lightning_pmss.datamodules import CommonsenseDataModule, DROPDataModule
from lightning_pmss.metrics import CommonsenseAccuracy, DROPScore
from lightning_pmss.modules import CausalLMModule

DROP = {"passage": "P", "question": "Q", "answer": {"number": "", "date": {}, "spans": ["a", "b"]}}
BOOLQ = {
    "instruction": "Please answer the following question with true or false, question: is it?",
    "input": "",
    "output": "the correct answer is true",
    "answer": "true",
}


@pytest.mark.parametrize(
    ("kind", "row", "metric", "target", "names"),
    [
        (
            DROPDataModule,
            DROP,
            DROPScore(separator="; ", by_type=True),
            [["a", "b"]],
            {"exact_match", "f1", "exact_match_spans", "f1_spans"},
        ),
        (
            CommonsenseDataModule,
            BOOLQ,
            CommonsenseAccuracy(by_task=True),
            ["boolq", "true"],
            {"accuracy", "average", "boolq"},
        ),
    ],
)
def test_test_in_a_trainer(
    tiny_llama: str, tmp_path: Path, kind: Any, row: dict[str, Any], metric: Any, target: Any, names: set[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 3)
    data = kind(tiny_llama, str(path), str(path), cache_dir=str(tmp_path / "cache"), eval_batch_size=2, val_size=0)
    model = CausalLMModule(tiny_llama, max_new_tokens=3, metric=metric, predictions_dir=str(tmp_path))
    # The quiet way: a model that answers rightly, whatever it has learnt.
    answer = {"text": data.load_examples("test")[0].response}
    model.generate = lambda ids, mask: [answer["text"]] * len(ids)  # type: ignore[method-assign]
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    (scores,) = trainer.test(model, data, verbose=False)
    assert {name.removeprefix("test/") for name in scores} == {"loss", *names}
    assert all(value in (1, 100) for name, value in scores.items() if name != "test/loss")
    lines = (tmp_path / "predictions-test.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["target"] for line in lines] == [target] * 3
    assert all(json.loads(line)["correct"] for line in lines)
    answer["text"] = "no"
    (scores,) = trainer.test(model, data, verbose=False)
    assert all(value == 0 for name, value in scores.items() if name != "test/loss")
