"""A part of the training examples: nested, in proportion to the kinds, with the validation examples where they were."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_pmss.cli import main
from lightning_pmss.datamodules import (
    ArithmeticDataModule,
    ChatDataModule,
    CommonsenseDataModule,
    DROPDataModule,
    Example,
    GSM8KDataModule,
)
from lightning_pmss.datamodules.base import TokenisedDataModule
from lightning_pmss.datamodules.instruction import InstructionDataModule
from lightning_pmss.datamodules.prompts import PromptEncoder
from lightning_pmss.datamodules.splits import in_proportion, shuffled
from tests.datamodules.resume_script import Recorder

COUNT, RARE = 80, 5  # one row in five is of the rare kind


def rare(number: int) -> bool:
    return number % RARE == 0


def gsm8k(n: int) -> Any:
    return {"question": f"{n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"}


def metamath(n: int) -> Any:
    return {"query": f"{n} + 1?", "response": f"The answer is: {n + 1}", "type": "MATH_SV" if rare(n) else "GSM_SV"}


def drop(n: int) -> Any:
    answer = {"number": "", "date": {}, "spans": ["Carr", "Smith"]} if rare(n) else {"number": str(n), "spans": []}
    return {"passage": f"P{n // 2}.", "question": f"Who, {n}?", "answer": answer}


def commonsense(n: int) -> Any:
    asked, answer = ("choose the correct solution to the question", "solution1") if rare(n) else (
        "answer the following question with true or false", "true",
    )  # fmt: skip
    return {"instruction": f"Please {asked}: {n}?", "input": "", "output": f"it is {answer}", "answer": answer}


def chat(n: int) -> Any:
    return {"prompt": f"Q{n}", "completion": "A", "topic": "law" if rare(n) else "art", "level": n % 2}


# The class, a row by its number, train_limit_by, and the kinds.
CASES: dict[str, tuple[Any, Callable[[int], Any], str | None, set[str]]] = {
    "GSM8K": (GSM8KDataModule, gsm8k, None, set()),
    "MetaMath": (GSM8KDataModule, metamath, "kind", {"GSM_SV", "MATH_SV"}),
    "DROP": (DROPDataModule, drop, "kind", {"number", "spans"}),
    "commonsense": (CommonsenseDataModule, commonsense, "kind", {"boolq", "piqa"}),
    "chat": (ChatDataModule, chat, "topic", {"law", "art"}),
    "chat by number": (ChatDataModule, chat, "level", {"0", "1"}),
    "arithmetic": (ArithmeticDataModule, gsm8k, "kind", {f"story {n}" for n in range(1, 8)}),
}


@pytest.fixture
def build(tiny_tokenizer: str, tmp_path: Path) -> Callable[..., TokenisedDataModule]:
    def make(case: str, **options: Any) -> TokenisedDataModule:
        kind, row, *_ = CASES[case]
        given: dict[str, Any] = {"val_size": 10, "cache_dir": str(tmp_path / "cache"), **options}
        if kind is ArithmeticDataModule:
            return ready(kind(tiny_tokenizer, train_size=70, test_size=4, **given))
        path = tmp_path / f"{case}.jsonl"
        path.write_text("".join(f"{json.dumps(row(n))}\n" for n in range(COUNT)))
        if kind is ChatDataModule and options.get("train_limit_by") is None:
            given["ignore_columns"] = ["topic", "level"]
        if options.get("train_limit_by") == "level":
            given["ignore_columns"] = ["topic"]
        if options.get("train_limit_by") == "topic":
            given["ignore_columns"] = ["level"]
        if kind is CommonsenseDataModule:
            given["test_path"] = str(path)
        return ready(kind(tiny_tokenizer, str(path), batch_size=4, **given))

    return make


def ready(module: TokenisedDataModule) -> TokenisedDataModule:
    module.prepare_data()
    module.setup("fit")
    return module


def ids(module: TokenisedDataModule, split: Any = "train") -> set[int]:
    return set(module.data[split]["id"][:])


@pytest.mark.parametrize("case", CASES)
def test_every_data_module(build: Callable[..., TokenisedDataModule], case: str) -> None:
    by, kinds = CASES[case][2:]
    everything = build(case)
    assert everything.has_kinds == bool(kinds) or case.startswith("chat")  # which a column names
    chosen: dict[int, list[set[int]]] = {}
    for seed in (0, 1):
        for size in (10, 25, 50):
            module = build(case, train_limit=size, seed=seed, split_seed=7, train_limit_by=by)
            assert len(module.data["train"]) == size
            assert module.available == len(everything.data["train"])
            assert ids(module, "val") == ids(build(case, split_seed=7), "val")
            assert not ids(module) & ids(module, "val") or case == "arithmetic"  # whose sets are numbered apart
            assert set(module.kinds) == kinds
            if by is not None:
                assert module.has_kinds
                all_kinds = Counter(str(module._kind_of[n]) for n in ids(build(case, split_seed=7, train_limit_by=by)))
                for kind, count in module.kinds.items():
                    assert abs(count - size * all_kinds[kind] / module.available) < 1
                assert Counter(str(module._kind_of[n]) for n in ids(module)) == Counter(module.kinds)
            chosen.setdefault(seed, []).append(ids(module))
        small, middle, large = chosen[seed]
        assert small < middle < large
    assert chosen[0][0] != chosen[1][0]


def test_an_order_in_proportion() -> None:
    kinds = ["a"] * 70 + ["b"] * 28 + ["c"] * 2
    rows = shuffled(range(100), 3)
    order = in_proportion(rows, [kinds[row] for row in rows], 3)
    assert sorted(order) == list(range(100))
    for size in range(101):
        for kind in "abc":
            count = sum(kinds[row] == kind for row in order[:size])
            assert abs(count - size * kinds.count(kind) / 100) <= 1
    assert [row for row in order if row < 70] == [row for row in rows if row < 70]  # of one kind in the order given
    # Over the seeds no kind is favoured: ten rows have 0.2 of the rare kind.
    named = [kinds[row] for row in rows]
    counts = [sum(kinds[row] == "c" for row in in_proportion(rows, named, seed)[:10]) for seed in range(400)]
    assert sum(counts) / 400 == pytest.approx(0.2, abs=0.08)


def test_an_order_does_not_depend_on_that_of_its_rows() -> None:
    assert shuffled([5, 1, 9], 2) == shuffled([9, 5, 1], 2)
    assert len({tuple(shuffled(range(9), seed)) for seed in range(5)}) == 5


def test_without_a_seed_of_its_own_the_split_follows_seed(build: Callable[..., TokenisedDataModule]) -> None:
    """As before the option existed: rows in the order of the split."""
    assert ids(build("GSM8K", seed=3), "val") == ids(build("GSM8K", split_seed=3), "val")
    assert ids(build("GSM8K", seed=3), "val") != ids(build("GSM8K", seed=4), "val")
    assert ids(build("GSM8K", seed=3, train_limit=9)) == ids(build("GSM8K", seed=3, split_seed=3, train_limit=9))
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(3)).tolist()
    assert ids(build("GSM8K", seed=3, train_limit=9)) == set(order[10:19])


def test_worked_examples_stay(tiny_tokenizer: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{json.dumps(gsm8k(n))}\n" for n in range(30)))

    def shots(**options: Any) -> Any:
        return GSM8KDataModule(tiny_tokenizer, str(path), str(path), num_shots=3, val_size=5, **options)._shots()

    # The test rows are those of training here, so no worked example is left.
    with pytest.raises(ValueError, match="num_shots is 3, but only 0"):
        shots()
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps(gsm8k(99)))
    made = [
        GSM8KDataModule(tiny_tokenizer, str(path), str(test), num_shots=3, val_size=5, **options)._shots()
        for options in ({"seed": 1}, {"seed": 2, "split_seed": 1}, {"seed": 2})
    ]
    assert made[0] == made[1] != made[2]


def test_kinds_are_no_part_of_the_cache(tiny_tokenizer: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    encoder = PromptEncoder(AutoTokenizer.from_pretrained(tiny_tokenizer), "plain", "{question}")
    key = encoder.fingerprint([Example("Q", "A", kind="one")])
    assert key == encoder.fingerprint([Example("Q", "A")])
    assert key != encoder.fingerprint([Example("Q", "A", group="one")])


def test_all_subsets_read_one_cache(build: Callable[..., TokenisedDataModule], tmp_path: Path) -> None:
    build("DROP", split_seed=1)
    files = sorted(tmp_path.glob("cache/*"))
    for size in (10, 20):
        for seed in (1, 2):
            build("DROP", seed=seed, split_seed=1, train_limit=size, train_limit_by="kind")
    assert sorted(tmp_path.glob("cache/*")) == files


class Own(InstructionDataModule):
    def load_examples(self, split: Any) -> list[Example] | None:
        kinds = ["a", "b", None]
        return [Example(f"Q{n}", "A", kind=kinds[n % 3]) for n in range(12)] if split != "val" else None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda tok, path: Own(tok, val_size=0, train_limit_by="kind"),
            r"--data.train_limit_by kind: row 2 has no kind",
        ),
        (lambda tok, path: Own(tok, train_limit_by="task"), "give --data.train_limit_by kind, or null"),
        (lambda tok, path: Own(tok, split_seed=-1), r"split_seed=-1\)`: give an integer of at least 0 or null"),
        (lambda tok, path: ChatDataModule(tok, path, split_seed="a"), r"split_seed='a'\)`"),
        (
            lambda tok, path: ChatDataModule(tok, path, ignore_columns=["topic", "level"], train_limit_by="topics"),
            r"1: --data.train_limit_by topics: the value there is None; name a column .* This row has `completion`, `level`",
        ),
    ],
)
def test_refused(tiny_tokenizer: str, tmp_path: Path, make: Any, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{json.dumps(chat(n))}\n" for n in range(20)))
    with pytest.raises(ValueError, match=message):
        ready(make(tiny_tokenizer, str(path)))


def test_rows_without_the_column_can_be_skipped(tiny_tokenizer: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{n}", "completion": "A"} | ({"topic": "ab"[n % 2]} if n != 3 else {}) for n in range(20)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options: dict[str, Any] = {"train_limit_by": "topic", "train_limit": 8, "val_size": 0, "on_bad_row": "skip"}
    module = ChatDataModule(tiny_tokenizer, str(path), **options)
    with pytest.warns(UserWarning, match="1 of 20 rows"):
        ready(module)
    assert sum(module.kinds.values()) == 8
    assert all(module._kind_of[n] == rows[n + (n >= 3)]["topic"] for n in ids(module))


def test_resume_goes_on_with_the_same_examples(build: Callable[..., TokenisedDataModule], tmp_path: Path) -> None:
    def run(checkpoint: str | None, steps: int) -> Any:
        module = build("DROP", train_limit=21, seed=2, split_seed=1, train_limit_by="kind")
        model = Seen()
        saver = ModelCheckpoint(tmp_path / "checkpoints", "{step}", every_n_train_steps=4, save_top_k=-1)
        Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
            max_steps=steps, max_epochs=-1, callbacks=[saver],
        ).fit(model, module, ckpt_path=checkpoint)  # fmt: skip
        return model.seen

    whole = run(None, 15)
    assert run(str(tmp_path / "checkpoints" / "step=8.ckpt"), 15) == whole[8:]


class Seen(Recorder):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append((self.trainer.current_epoch, batch_idx, batch["input_ids"].tolist()))
        return self.layer(torch.ones(1, 1)).square().mean()


def test_preview_shows_it(tiny_tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{json.dumps(metamath(n))}\n" for n in range(COUNT)))
    main(
        [
            "preview", "--model=CausalLMModule", f"--model.model_name_or_path={tiny_tokenizer}", "--data=GSM8KDataModule",
            f"--data.path={path}", "--data.val_size=0", "--data.train_limit=20", "--data.train_limit_by=kind", "--rows=0",
        ]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "chosen by train_limit  20 of 80\n" in printed
    assert "of each kind           GSM_SV 16, MATH_SV 4\n" in printed
    assert "0 of 80 (0.0%), max_length 512" in printed
