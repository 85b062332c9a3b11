"""`preview` shows the rows, the mask, the lengths and the steps of a run, and loads no model."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoTokenizer

from lightning_pmss.cli import main
from lightning_pmss.cli.preview_text import in_colour, text_of, visible
from lightning_pmss.datamodules import ChatDataModule
from lightning_pmss.datamodules.collate import IGNORED
from lightning_pmss.datamodules.sampler import LengthGroupedSampler
from lightning_pmss.datamodules.summary import Run, summarise, token_texts

SPANS = {"number": "", "date": {}, "spans": ["Carr"]}
TASK = {
    "instruction": "Please answer the following question with true or false, question: is it?",
    "input": "",
    "output": "the correct answer is true",
    "answer": "true",
}
MODULES: dict[str, tuple[dict[str, Any], str, str]] = {
    "GSM8KDataModule": ({"question": "1 + 1?", "answer": "So 2.\n#### 2"}, "Question: 1 + 1?\nAnswer:", " So 2.\n#### 2"),
    "DROPDataModule": ({"passage": "P.", "question": "Who?", "answer": SPANS}, "Question: Who?\nAnswer:", " Carr"),
    "CommonsenseDataModule": (TASK, "question: is it?\nAnswer:", " the correct answer is true"),
    "ChatDataModule": ({"prompt": "Q?", "completion": "It is."}, "<|im_start|>assistant\n", "It is."),
    "metamath": (
        {"query": "1 + 1?", "response": "The answer is: 2", "type": "GSM_SV"}, "Question: 1 + 1?\nAnswer:", " The answer is: 2",
    ),
}  # fmt: skip


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def talks(count: int) -> list[Any]:
    return [{"prompt": f"Q{n}", "completion": "A" * (n % 9 + 1)} for n in range(count)]


def preview(tok: str, path: str, tmp_path: Path, *more: str, data: str = "ChatDataModule") -> None:
    options = [f"--data.path={path}", f"--data.cache_dir={tmp_path / 'cache'}", "--trainer.accelerator=cpu", *more]
    main(["preview", "--model=CausalLMModule", f"--model.model_name_or_path={tok}", f"--data={data}", *options])


@pytest.mark.parametrize("name", MODULES)
def test_every_data_module(tiny_tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    row, asked, said = MODULES[name]
    path = write(tmp_path / "rows.jsonl", [row | ({"passage": f"P{n}."} if "passage" in row else {}) for n in range(6)])
    # The folder has a tokenizer and no model: nothing of one is loaded.
    kind = "GSM8KDataModule" if name == "metamath" else name
    preview(tiny_tokenizer, path, tmp_path, "--data.val_size=1", "--rows=1", data=kind)
    printed = capsys.readouterr().out
    assert f"{asked}⟦{said}<|endoftext|>⟧" in printed
    assert re.search(r"examples +5 to train on, 1 to validate on", printed)
    assert printed.count("--- ") == 1


def test_a_recipe(tiny_tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
    options = ["--data.train_size=40", "--data.val_size=8", "--data.test_size=8", f"--data.cache_dir={tmp_path}"]
    main(["preview", "--config", str(recipe), f"--model.model_name_or_path={tiny_tokenizer}", *options])
    printed = capsys.readouterr().out
    assert re.search(r"steps per epoch +5, from 5 batches per device", printed)
    assert re.search(r"steps in the run +5 \(1\.00 epochs\)", printed)
    assert "not estimated; type --tokens-per-second with pmss/tokens_per_second" in printed


class One(L.LightningModule):
    """One parameter, trained on any batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.weight.sum() * len(batch["input_ids"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"max_epochs": 3},
        {"max_epochs": 2, "accumulate_grad_batches": 3},
        {"max_epochs": 4, "max_steps": 5, "accumulate_grad_batches": 2},
        {"max_steps": 17},
        {"max_epochs": 2, "limit_train_batches": 4},
        {"max_epochs": 2, "limit_train_batches": 0.5},
    ],
)
def test_steps_are_those_of_a_trainer(
    tiny_tokenizer: str, tmp_path: Path, settings: dict[str, Any], packing: bool
) -> None:
    path = write(tmp_path / "rows.jsonl", talks(37))
    module = ChatDataModule(
        tiny_tokenizer, path, batch_size=4, packing=packing, max_length=128, cache_dir=str(tmp_path), val_size=0
    )
    module.setup("fit")
    names = {"accumulate_grad_batches": "accumulate", "limit_train_batches": "limit"}
    summary = summarise(module, 0, Run(**{names.get(name, name): value for name, value in settings.items()}))
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, **settings,
    )  # fmt: skip
    trainer.fit(One(), module)
    assert (summary.steps, summary.batches_per_epoch) == (trainer.global_step, trainer.num_training_batches)


def test_a_run_without_bounds(tiny_tokenizer: str, tmp_path: Path) -> None:
    module = ChatDataModule(tiny_tokenizer, write(tmp_path / "rows.jsonl", talks(37)), batch_size=4, val_size=0)
    module.setup("fit")
    assert summarise(module, 0, Run()).steps == 1000 * 10  # Lightning's default
    endless = summarise(module, 0, Run(max_epochs=-1))
    assert (endless.steps, endless.tokens_of_run) == (None, None)
    assert "none for a run without an end" in text_of(endless)


def test_figures_are_those_of_the_batches(tiny_tokenizer: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", talks(37))
    module = ChatDataModule(tiny_tokenizer, path, batch_size=4, cache_dir=str(tmp_path), val_size=0)
    module.setup("fit")
    summary = summarise(module, 2, Run(devices=2, max_epochs=1))
    batches = list(module.train_dataloader())
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    slots = sum(batch["input_ids"].numel() for batch in batches)
    assert sum(summary.lengths) == real
    assert sum(summary.trained) == sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
    assert summarise(module, 0, Run()).padding == pytest.approx(1 - real / slots)
    ranks = [LengthGroupedSampler(summary.lengths, 4, 0, 2, rank) for rank in (0, 1)]
    assert {-(-len(rank) // 4) for rank in ranks} == {summary.batches_per_epoch}
    assert summary.tokens_of_run == real
    ordered = sorted(summary.lengths)
    assert (summary.percentile(0.5), summary.percentile(1)) == (ordered[18], ordered[-1])
    bins = summary.histogram(5)
    assert [count for *_, count in bins] == [sum(low <= n <= high for n in ordered) for low, high, _ in bins]
    assert sum(count for *_, count in bins) == 37
    for row in summary.rows:
        assert "".join(token.text for token in row.tokens) == module.tokenizer.decode(
            [token.id for token in row.tokens]
        )


def test_what_is_left_out_and_skipped(tiny_tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*talks(8), {"prompt": "Q", "completion": "long " * 80}, {"prompt": "Q", "completion": ""}]
    options = ["--data.max_length=100", "--data.on_bad_row=skip", "--data.val_size=0", "--tokens-per-second=0.05"]
    with pytest.warns(UserWarning, match="bad and skipped"):
        preview(tiny_tokenizer, write(tmp_path / "a.jsonl", rows), tmp_path, *options, "--trainer.max_epochs=2")
    printed = capsys.readouterr().out
    assert re.search(r"left out, too long +1 of 9 \(11\.1%\), max_length 100", printed)
    assert re.search(r"bad rows, skipped +1\n", printed)
    tokens = int(re.search(r"tokens per epoch +([\d,]+)", printed)[1].replace(",", ""))  # type: ignore[index]
    minutes = round(2 * tokens / 0.05 / 60)
    assert f"{minutes // 60} h {minutes % 60} min of training, for {2 * tokens:,} tokens at 0 per second" in printed


def test_pairs(tiny_tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "Q", "chosen": "good", "rejected": "bad"}] * 3
    preview(tiny_tokenizer, write(tmp_path / "a.jsonl", rows), tmp_path, "--rows=1")
    printed = capsys.readouterr().out
    assert "a.jsonl:1, chosen: " in printed
    assert "a.jsonl:1, rejected: " in printed
    assert "⟦good<|endoftext|>⟧" in printed
    assert "⟦bad<|endoftext|>⟧" in printed


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour(tiny_tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert in_colour(Terminal())
    assert not in_colour(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not in_colour(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not in_colour(Terminal())
    row = {"prompt": "Q\x1b[31m", "completion": "A\x07b"}
    module = ChatDataModule(tiny_tokenizer, write(tmp_path / "a.jsonl", [row]), cache_dir=str(tmp_path), val_size=0)
    module.setup("fit")
    summary = summarise(module, 1, Run())
    text = text_of(summary, colour=True)
    green = "".join(re.findall(r"\x1b\[1;[39]2m(.*?)\x1b\[0m", text, re.DOTALL))
    assert green == "A\\x07b<|endoftext|>"
    assert "Q\\x1b[31m" in re.sub(r"\x1b\[[\d;]+m", "", text)
    plain = text_of(summary, encoding="ascii")
    assert plain.isascii()
    assert "[[A\\x07b<|endoftext|>]]" in plain
    assert visible("a\u202eb\n") == "a\\u202eb\n"


class Pieces(HTMLParser):
    """Collects the texts of the tokens, the trained ones apart, and all tags."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: dict[bool, list[str]] = {True: [], False: []}
        self.inside: bool | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.inside = dict(attrs).get("class") == "t" if tag == "span" else None

    def handle_endtag(self, tag: str) -> None:
        self.inside = None

    def handle_data(self, data: str) -> None:
        if self.inside is not None:
            self.texts[self.inside].append(data)


def test_page(tiny_tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "<script>alert('1')</script>", "completion": "<b>&amp; A"}
    path, page = write(tmp_path / "a.jsonl", [row, *talks(4)]), tmp_path / "page.html"
    preview(tiny_tokenizer, path, tmp_path, f"--html={page}", "--rows=1")
    assert f"written: {page}" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    parsed = Pieces()
    parsed.feed(text)
    assert "script" not in parsed.tags
    assert "b" not in parsed.tags
    assert not re.search(r"(src|href)=", text)  # nothing is fetched
    assert "".join(parsed.texts[True]) == "<b>&amp; A<|endoftext|>"
    assert "<script>alert('1')</script>" in "".join(parsed.texts[False])
    with pytest.raises(SystemExit):
        preview(tiny_tokenizer, path, tmp_path, f"--html={page}")
    assert "exists; type another --html or --overwrite" in capsys.readouterr().err
    preview(tiny_tokenizer, path, tmp_path, f"--html={page}", "--overwrite")
    page.write_text("mine")
    with pytest.raises(SystemExit):
        preview(tiny_tokenizer, path, tmp_path, f"--html={page}", "--overwrite")
    assert "is not a preview, and overwriting would destroy it" in capsys.readouterr().err
    assert page.read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows=-1"], "--rows -1: give a number of rows, 0 for none."),
        (["--tokens-per-second=0"], "--tokens-per-second 0.0: give a finite speed above 0."),
        (["--html=none/page.html"], "the folder none does not exist; make it first."),
        (["--data.batch=3"], "batch"),
        (["--trainer.mx_epochs=3"], "Did you mean --trainer.max_epochs?"),
        (["--data.path=none.jsonl"], "There is no file 'none.jsonl'"),
    ],
)
def test_refused(
    tiny_tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        preview(tiny_tokenizer, write(tmp_path / "a.jsonl", talks(4)), tmp_path, *options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_data_modules_of_others(tiny_tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    demo = "lightning.pytorch.demos.boring_classes."
    for data, message in (
        ([], "no --data was given"),
        ([f"--data={demo}BoringDataModule"], "BoringDataModule makes its batches"),
    ):
        with pytest.raises(SystemExit):
            main(["preview", f"--model={demo}BoringModel", *data])
        assert message in capsys.readouterr().err


def test_texts_of_tokens(tiny_tokenizer: str) -> None:
    made = AutoTokenizer.from_pretrained(tiny_tokenizer)
    for text in ("café 🙂 12 次", "  two  blanks\n\n", "\ufffd end \ufffd", ""):
        ids = made(text)["input_ids"]
        texts = token_texts(made, ids)
        assert "".join(texts) == made.decode(ids)
        assert len(texts) == len(ids)
