"""Generated problems are right, disjoint between the splits, repeatable, short; and a run on them resumes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_pmss.datamodules import ArithmeticDataModule, Example, arithmetic
from lightning_pmss.datamodules.arithmetic import calculation_split, generate
from lightning_pmss.metrics import GSM8KAccuracy

_CALCULATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (?:<<[^>]*>>)?(\d+)")


def _calculations(example: Example) -> list[tuple[str, str, str, str]]:
    return _CALCULATION.findall(example.response)


def _key(example: Example) -> tuple[Any, ...]:
    return tuple((frozenset((a, b)) if op in "+*" else (a, b), op) for a, op, b, _ in _calculations(example))


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("annotations", [False, True])
def test_answers_are_right(steps: int, annotations: bool) -> None:
    for example in generate("train", 300, seed=4, steps=steps, annotations=annotations):
        found = _calculations(example)
        assert len(found) == steps
        for left, operation, right, result in found:
            # S307: the text is two numbers and an operator, by the expression above
            assert eval(f"{left} {operation} {right}") == int(result)  # noqa: S307
            assert (f"<<{left}{operation}{right}={result}>>" in example.response) == annotations
            assert int(result) > 0
        assert GSM8KAccuracy.extract(example.response) == found[-1][3]
        assert example.response.splitlines()[-1] == f"#### {found[-1][3]}"
        given = set(re.findall(r"\d+", example.question))
        assert found[0][0] in given
        assert all(right in given for _, _, right, _ in found)


@pytest.mark.parametrize("steps", [1, 2])
def test_splits_share_no_calculation_whatever_the_seed(steps: int) -> None:
    keys = {}
    for split in ("train", "val", "test"):
        examples = [e for seed in (0, 1) for e in generate(split, 400, seed=seed, steps=steps)]
        keys[split] = {_key(example) for example in examples}
        assert len(keys[split]) > 30
    assert not keys["train"] & keys["test"]
    assert not keys["train"] & keys["val"]
    assert not keys["val"] & keys["test"]


def test_order_of_summands_does_not_move_a_calculation() -> None:
    for a in range(2, 30):
        assert calculation_split([(f"{a} + 17", a + 17)]) == calculation_split([(f"17 + {a}", a + 17)])
        assert calculation_split([(f"{a} * 7", 0)]) == calculation_split([(f"7 * {a}", 0)])
    assert len({calculation_split([(f"{a} - {b}", 0)]) for a in range(9) for b in range(9)}) == 3


@pytest.mark.parametrize("steps", [1, 2])
def test_problems_are_repeatable_different_and_varied(steps: int) -> None:
    examples = generate("train", 700, seed=2, steps=steps)
    torch.manual_seed(5)
    assert examples == generate("train", 700, seed=2, steps=steps)
    assert examples != generate("train", 700, seed=3, steps=steps)
    assert len({example.question for example in examples}) == 700
    stories = {re.sub(r"\d+|\b[A-Z]\w*\b", "", e.question).split()[-4:][0] for e in examples}
    assert len(stories) >= 4
    assert len({GSM8KAccuracy.extract(example.response) for example in examples}) > 30


def test_the_first_problems_stay_known() -> None:
    """Guards the generator: a change here changes every figure measured on it."""
    assert [GSM8KAccuracy.extract(e.response) for e in generate("test", 8)][:6] == ["29", "15", "37", "24", "22", "22"]


def test_too_many_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    small = arithmetic._Template("{a} + {b}?", (("+", "b", "{calculation}"),), (6, 6))
    monkeypatch.setitem(arithmetic._TEMPLATES, 1, (small,))
    with pytest.raises(ValueError, match=r"Found only \d+ different problems for the train set; ask for fewer than 26"):
        generate("train", 26)


@pytest.fixture
def build(tiny_tokenizer: str, tmp_path: Path) -> Any:
    def build(**kwargs: Any) -> ArithmeticDataModule:
        sizes = {"train_size": 40, "val_size": 8, "test_size": 9, "batch_size": 4}
        return ArithmeticDataModule(tiny_tokenizer, cache_dir=str(tmp_path / "cache"), **{**sizes, **kwargs})

    return build


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"steps": 3}, "--data.steps 1 or --data.steps 2"),
        ({"train_size": 0}, "train_size=0"),
        ({"test_size": 0}, "test_size=0"),
        ({"data_seed": -1}, "data_seed=-1"),
    ],
)
def test_arguments_are_checked(build: Any, argument: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**argument)


def test_sizes_and_seeds(build: Any) -> None:
    module, other = build(), build(seed=9)
    for each in (module, other):
        each.prepare_data()
        each.setup()
    assert {split: len(data) for split, data in module.data.items()} == {"train": 40, "val": 8, "test": 9}
    assert module.data["test"][:] == other.data["test"][:]  # the test set does not move with the seed of training
    assert next(iter(module.train_dataloader()))["input_ids"].tolist() != (
        next(iter(other.train_dataloader()))["input_ids"].tolist()
    )


class Seen(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.batches: list[list[list[int]]] = []
        self.evaluated: list[int] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.batches.append(batch["input_ids"].tolist())
        return self.layer(batch["labels"].float().mean().view(1, 1)).sum()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.evaluated += batch["id"].tolist()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[int]:
        return batch["id"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_fit_and_resume_in_a_trainer(build: Any, tmp_path: Path, num_workers: int) -> None:
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "max_epochs": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": tmp_path,
    }
    keep = ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1, save_on_train_epoch_end=False
    )
    whole = Seen()
    trainer = L.Trainer(callbacks=[keep], **options)
    trainer.fit(whole, build(num_workers=num_workers))
    assert len(whole.batches) == 20
    assert whole.evaluated[:8] == whole.evaluated[8:]  # by length, not by number
    assert sorted(whole.evaluated[:8]) == list(range(8))
    assert trainer.predict(whole, datamodule=build()) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    for step in (6, 12):
        rest = Seen()
        resumed = L.Trainer(**options, enable_checkpointing=False)
        resumed.fit(rest, build(num_workers=num_workers), ckpt_path=str(tmp_path / f"step={step}.ckpt"))
        assert rest.batches == whole.batches[step:]


def test_no_validation_in_a_trainer(build: Any, tmp_path: Path) -> None:
    seen = Seen()
    trainer = L.Trainer(accelerator="cpu", logger=False, fast_dev_run=2, default_root_dir=tmp_path)
    trainer.fit(seen, build(val_size=0))
    assert len(seen.batches) == 2
    assert seen.evaluated == []
