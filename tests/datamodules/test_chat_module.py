"""`ChatDataModule` in a run: splits, lengths, packing, cache, exact resume, and a fit from the command line."""

from __future__ import annotations

import csv
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from chat_templates import CHATML, GEMMA, MARKED, QWEN3, tokenizer
from test_chat_masks import TALK, turn
from test_chat_rows import SHAREGPT, chatml, write  # noqa: F401  (a fixture)

from lightning_pmss.cli import main
from lightning_pmss.datamodules import ChatDataModule
from lightning_pmss.datamodules.collate import IGNORED
from lightning_pmss.modules import CausalLMModule


def talk(number: int, exchanges: int = 1) -> dict[str, Any]:
    pairs = [(turn("user", f"Q{number}.{n}"), turn("assistant", "A" * (number % 7 + 1))) for n in range(exchanges)]
    return {"messages": [message for pair in pairs for message in pair]}


def trained(module: ChatDataModule, batch: dict[str, Any]) -> list[str]:
    return [module.tokenizer.decode(labels[labels != IGNORED]) for labels in batch["labels"]]


def module_of(tok: str, path: str | Path, tmp_path: Path, **options: Any) -> ChatDataModule:
    module = ChatDataModule(tok, str(path), **{"cache_dir": str(tmp_path / "cache"), "val_size": 0, **options})
    module.prepare_data()
    module.setup("fit")
    return module


def test_batches(chatml: str, tmp_path: Path) -> None:  # noqa: F811
    module = module_of(chatml, write(tmp_path / "a.jsonl", *(talk(n, 2) for n in range(9))), tmp_path, val_size=3)
    batch = next(iter(module.train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    for text in trained(module, batch):
        assert text.count("<|im_end|>") == 2
        assert set(text.replace("<|im_end|>", "")) == {"A"}
    # The padding token is the end-of-sequence token of this tokenizer; the mask still tells padding from text.
    assert torch.equal(batch["attention_mask"].sum(1), (batch["input_ids"] != module.tokenizer.pad_token_id).sum(1))
    batch = next(iter(module.val_dataloader()))
    assert len(batch["id"]) == 3
    assert all(prompt.endswith("<|im_start|>assistant\n") and prompt.count("A") for prompt in batch["prompt"])
    assert set("".join(batch["target"])) == {"A"}
    assert batch["end_id"].tolist() == [module.tokenizer.convert_tokens_to_ids("<|im_end|>")] * 3
    copy = pickle.loads(pickle.dumps(module))  # noqa: S301
    assert torch.equal(next(iter(copy.val_dataloader()))["labels"], batch["labels"])


def test_pad_that_is_the_end_of_the_turn(tmp_path: Path) -> None:
    made = tokenizer(CHATML, eos="<|im_end|>")
    made.pad_token = "<|im_end|>"  # noqa: S105
    made.save_pretrained(tmp_path / "tok")
    module = module_of(str(tmp_path / "tok"), write(tmp_path / "a.jsonl", *(talk(n) for n in range(6))), tmp_path)
    batch = next(iter(module.train_dataloader()))
    assert all(text == "A" * (len(text) - 10) + "<|im_end|>" for text in trained(module, batch))
    assert not (batch["labels"][batch["attention_mask"] == 0] != IGNORED).any()


def test_what_is_recognised_is_said(chatml: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    tokenizer(MARKED).save_pretrained(tmp_path / "marked")
    path = write(tmp_path / "a.jsonl", *({"conversations": SHAREGPT} for _ in range(3)))
    texts = write(tmp_path / "t.jsonl", {"text": "a"})
    pairs = write(tmp_path / "p.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    with caplog.at_level(logging.INFO):
        for tok, file, options in (
            (chatml, path, {}),
            (tmp_path / "marked", path, {"train_on": "last"}),
            (chatml, path, {"template": "zephyr", "train_on": "all"}),
            (chatml, texts, {}),
            (chatml, pairs, {}),
        ):
            module_of(str(tok), file, tmp_path, **options)
    by_message = "found by rendering message by message"
    assert [record.message for record in caplog.records if " rows of " in record.message] == [
        f"{path}: 3 rows of ShareGPT; the tokenizer's chat template; loss on the assistant's turns, {by_message}.",
        f"{path}: 3 rows of ShareGPT; the tokenizer's chat template; loss on the last answer, found by the template's"
        " {% generation %} marks.",
        f"{path}: 3 rows of ShareGPT; the template 'zephyr'; loss on everything, {by_message}.",
        f"{texts}: 1 rows of plain texts; the texts as they are; loss on them.",
        f"{pairs}: 1 rows of preferences; the tokenizer's chat template; loss on the last answer, {by_message}.",
    ]


def test_splits(chatml: str, tmp_path: Path) -> None:  # noqa: F811
    path = write(tmp_path / "train.jsonl", *(talk(n) for n in range(40)))
    module = module_of(chatml, path, tmp_path, val_size=0.1)
    assert (len(module.data["train"]), len(module.data["val"])) == (36, 4)
    assert set(module.data["train"]["id"][:]).isdisjoint(module.data["val"]["id"][:])
    module = module_of(chatml, path, tmp_path, val_size=0.001)
    assert len(module.data["val"]) == 1
    with pytest.raises(ValueError, match="has no test examples"):
        module.setup("test")
    write(tmp_path / "validation.jsonl", *(talk(n) for n in range(3)))
    write(tmp_path / "test.jsonl", {"conversations": SHAREGPT})
    module = module_of(chatml, tmp_path, tmp_path)
    module.setup("test")
    assert {split: len(rows) for split, rows in module.data.items()} == {"train": 40, "val": 3, "test": 1}
    module = module_of(chatml, path, tmp_path, val_path=str(tmp_path / "validation.jsonl"))
    assert len(module.data["val"]) == 3
    with pytest.raises(ValueError, match=r"val_size. is 1, but there are only 1 training rows"):
        module_of(chatml, tmp_path / "test.jsonl", tmp_path, val_size=1)
    with pytest.raises(ConnectionError, match=r"Could not load 'some/data' from the hub .*: --data\.path FILE\.jsonl"):
        module_of(chatml, "some/data", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"There is no file .*none\.jsonl.*Give --data\.path a file \(\.jsonl"):
        module_of(chatml, tmp_path / "none.jsonl", tmp_path)


def test_each_answer_is_an_example_of_its_own(tmp_path: Path) -> None:
    tokenizer(QWEN3).save_pretrained(tmp_path / "tok")
    path = write(tmp_path / "a.jsonl", *(talk(n, 3) for n in range(5)))
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the chat template .* Give --data\.train_on each"):
        module_of(str(tmp_path / "tok"), path, tmp_path)
    module = module_of(str(tmp_path / "tok"), path, tmp_path, train_on="each", val_size=0.2)
    assert (len(module.data["train"]), len(module.data["val"])) == (12, 3)  # one conversation is held out as a whole
    assert len({prompt.split("Q")[1][0] for prompt in module.data["val"]["prompt"][:]}) == 1
    for text in trained(module, next(iter(module.train_dataloader()))):
        assert text.startswith("<think>\n\n</think>\n\nA")


def test_too_long(chatml: str, tmp_path: Path) -> None:  # noqa: F811
    path = write(tmp_path / "a.jsonl", talk(1), {"messages": [turn("system", "S"), *talk(2, 6)["messages"]]})
    with pytest.warns(
        UserWarning, match="1 of 2 training examples are longer than max_length 80 tokens and are left out"
    ):
        assert len(module_of(chatml, path, tmp_path, max_length=80).data["train"]) == 1
    with pytest.raises(
        ValueError, match=r"max_length 80 tokens, .*a\.jsonl:2 the first with \d+; raise --data\.max_length"
    ):
        module_of(chatml, path, tmp_path, max_length=80, too_long="error")
    with pytest.warns(UserWarning, match=r"1 of 2 conversations of .* lose their earliest exchanges, to fit into"):
        module = module_of(chatml, path, tmp_path, max_length=80, too_long="cut_turns")
    assert module.cut["train"] == 1
    assert module.dropped == 0
    text = module.tokenizer.decode(module.data["train"][1]["input_ids"])
    assert len(module.data["train"][1]["input_ids"]) <= 80
    assert text.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ2.")
    assert text.endswith("Q2.5<|im_end|>\n<|im_start|>assistant\nAAA<|im_end|>")
    assert "Q2.0" not in text


def test_both_of_a_pair_lose_the_same_exchanges(chatml: str, tmp_path: Path) -> None:  # noqa: F811
    """The rejected answer alone is too long: the chosen one must answer the same turns."""
    prompt = [*talk(1, 4)["messages"], turn("user", "Last?")]
    row = {"prompt": prompt, "chosen": "Yes.", "rejected": "No. " * 20}
    path = write(tmp_path / "p.jsonl", row)
    whole = module_of(chatml, path, tmp_path).data["train"][0]
    assert len(whole["input_ids"]) < len(whole["rejected_ids"]) - 20
    limit = len(whole["rejected_ids"]) - 10
    with pytest.warns(UserWarning, match="1 of 1 conversations of .* lose their earliest exchanges"):
        module = module_of(chatml, path, tmp_path, max_length=limit, too_long="cut_turns")
    cut = module.data["train"][0]
    ids, rejected = cut["input_ids"], cut["rejected_ids"]
    assert len(rejected) <= limit
    sides = (ids, cut["trained"]), (rejected, cut["rejected_trained"])
    prompts = [module.tokenizer.decode(tokens[: borders[0]]) for tokens, borders in sides]
    assert prompts[0] == prompts[1]
    assert prompts[0].startswith("<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\nQ1.1")
    assert module.cut["train"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"val_split": "validation"},
            r"--data\.val_split validation names a split on the hub, .*Give --data\.val_path FILE",
        ),
        ({"split": "train[:3]"}, r"--data\.split train\[:3\] names a split on the hub, .*Give --data\.train_limit N"),
    ],
)
def test_a_file_has_no_splits(chatml: str, tmp_path: Path, options: Any, message: str) -> None:  # noqa: F811
    """They would be ignored: the training rows would validate."""
    for path in (write(tmp_path / "train.jsonl", talk(1), talk(2)), tmp_path):
        with pytest.raises(ValueError, match=message):
            module_of(chatml, path, tmp_path, **options)


def test_packed_rows_train_the_same_tokens(chatml: str, tmp_path: Path) -> None:  # noqa: F811
    path = write(tmp_path / "a.jsonl", *(talk(n, 2) for n in range(20)))
    plain = module_of(chatml, path, tmp_path, batch_size=20)
    packed = module_of(chatml, path, tmp_path, batch_size=20, packing=True, max_length=200)
    (whole,), rows = list(plain.train_dataloader()), list(packed.train_dataloader())
    assert sum(len(batch["input_ids"]) for batch in rows) < 20
    joined = [text for batch in rows for text in trained(packed, batch)]
    assert sorted("".join(joined).split("<|im_end|>")) == sorted("".join(trained(plain, whole)).split("<|im_end|>"))
    with pytest.raises(ValueError, match="rows of preferences cannot be packed"):
        module_of(
            chatml, write(tmp_path / "p.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"}), tmp_path, packing=True
        )


def test_cache(chatml: str, tmp_path: Path) -> None:  # noqa: F811
    path = write(tmp_path / "a.jsonl", *(talk(n, 2) for n in range(4)))
    tokenizer(GEMMA).save_pretrained(tmp_path / "gemma")
    cases: list[tuple[Any, dict[str, Any]]] = [
        (chatml, {}),
        (chatml, {"train_on": "last"}),
        (chatml, {"template": "zephyr"}),
        (chatml, {"too_long": "cut_turns"}),
        (tmp_path / "gemma", {}),
    ]
    made = []
    for tok, options in cases * 2:
        module_of(str(tok), path, tmp_path, **options)
        made.append(len(list((tmp_path / "cache").glob("*.arrow"))))
    assert made == [1, 2, 3, 4, 5] + 5 * [5]
    # Another place of the same rows is the same data.
    other = write(tmp_path / "b.jsonl", *(talk(n, 2) for n in range(4)))
    module_of(chatml, other, tmp_path)
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 5


def test_preferences(chatml: str, tmp_path: Path) -> None:  # noqa: F811
    rows = [{"prompt": [*TALK[:3]], "chosen": "Yes, 12.", "rejected": "No" * (n + 1)} for n in range(3)]
    module = module_of(chatml, write(tmp_path / "p.jsonl", *rows), tmp_path, val_size=1)
    for loader, size in ((module.train_dataloader(), 2), (module.val_dataloader(), 1)):
        (batch,) = loader
        assert set(batch) == {"chosen", "rejected"}
        assert trained(module, batch["chosen"]) == ["Yes, 12.<|im_end|>"] * size
        assert all(set(text.removesuffix("<|im_end|>")) == {"N", "o"} for text in trained(module, batch["rejected"]))
        prompts = [
            [
                ids[: (row != IGNORED).nonzero()[0]].tolist()
                for ids, row in zip(part["input_ids"], part["labels"], strict=True)
            ]
            for part in batch.values()
        ]
        assert prompts[0] == prompts[1]
    with pytest.raises(
        ValueError, match=r"This batch has preferences, `chosen` and `rejected`, and the model asks for"
    ):
        batch["input_ids"]


def test_base_tokenizers(tmp_path: Path) -> None:
    tokenizer(None).save_pretrained(tmp_path / "tok")
    path = write(tmp_path / "a.jsonl", talk(1))
    with pytest.raises(ValueError, match=r"has no chat template, as those of base models, and none is guessed\. Give"):
        module_of(str(tmp_path / "tok"), path, tmp_path)
    with pytest.raises(ValueError, match=r"There is no chat template 'chatlm', by name or as a file\. Give"):
        module_of(str(tmp_path / "tok"), path, tmp_path, template="chatlm")
    with pytest.raises(FileNotFoundError, match=r"There is no chat template 'mine\.jinja'"):
        module_of(str(tmp_path / "tok"), path, tmp_path, template="mine.jinja")
    (tmp_path / "mine.jinja").write_text(CHATML)
    module = module_of(str(tmp_path / "tok"), path, tmp_path, template=str(tmp_path / "mine.jinja"))
    assert trained(module, next(iter(module.train_dataloader()))) == ["AA<|im_end|>"]
    with pytest.raises(ValueError, match="--data.template plain has no form for messages"):
        module_of(str(tmp_path / "tok"), path, tmp_path, template="plain")
    path = write(tmp_path / "c.jsonl", {"prompt": "Q:", "completion": " A"})
    module = module_of(str(tmp_path / "tok"), path, tmp_path, template="plain")
    assert trained(module, next(iter(module.train_dataloader()))) == [" A</s>"]
    assert module.data["train"]["prompt"][0] == "Q:"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_on": "user"}, r"`ChatDataModule\(train_on='user'\)`: give --data\.train_on assistant or"),
        ({"val_size": 1.5}, r"give a number of conversations or a share below 1"),
        ({"columns": {"question": "q"}}, r"'question' is no column of ours; give ours first"),
        ({"roles": {"bot": "helper"}}, r"'bot' is 'helper'; give one of system, user, assistant, tool"),
        ({"batch_size": 0}, r"batch_size=0"),
        ({"too_long": "cut_prompt"}, r"give --data\.too_long drop or --data\.too_long cut_turns"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatDataModule("tok", "a.jsonl", **options)


class Seen(L.Callback):
    """Keeps the batches that were trained on, and checkpoints of the steps."""

    def __init__(self) -> None:
        self.batches: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.batches.append(torch.cat([batch["input_ids"].flatten(), batch["labels"].flatten()]))


@pytest.mark.parametrize("packing", [False, True])
def test_resume_is_exact(tiny_llama: str, tmp_path: Path, packing: bool) -> None:
    path = write(tmp_path / "a.jsonl", *(talk(n, n % 3 + 1) for n in range(24)))

    def fit(checkpoint: Path | None = None) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        L.seed_everything(0)
        seen = Seen()
        keep = L.pytorch.callbacks.ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=2, save_top_k=-1)
        trainer = L.Trainer(
            max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, callbacks=[seen, keep],
            enable_model_summary=False, limit_val_batches=0,
        )  # fmt: skip
        model = CausalLMModule(tiny_llama, warmup_ratio=0, lr_schedule="constant")
        data = ChatDataModule(
            tiny_llama,
            path,
            batch_size=4,
            val_size=0,
            packing=packing,
            max_length=150,
            cache_dir=str(tmp_path / "cache"),
        )
        trainer.fit(model, data, ckpt_path=checkpoint)
        return seen.batches, {name: value.detach().clone() for name, value in model.state_dict().items()}

    whole, weights = fit()
    rest, again = fit(tmp_path / "ckpt" / "epoch=0-step=2.ckpt")
    assert len(rest) == len(whole) - 2
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[2:], strict=True))
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_fit_from_the_command_line_lowers_the_loss(tiny_llama: str, tmp_path: Path) -> None:
    path = write(tmp_path / "my.jsonl", *(talk(n, 2) for n in range(32)))
    command = [
        "fit", "--model", "CausalLMModule", f"--model.model_name_or_path={tiny_llama}", "--model.optimizer.lr=0.2",
        "--data", "ChatDataModule", f"--data.path={path}", f"--data.cache_dir={tmp_path / 'cache'}", "--data.batch_size=8",
        "--data.val_size=0.25", "--trainer.accelerator=cpu", "--trainer.max_epochs=6", "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false", "--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}",
        "--pmss.rank=8", "--pmss.also_train=[model.norm]",
    ]  # fmt: skip
    cli = main(command)
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert losses[-1] < 0.9 * losses[0]
    assert isinstance(cli.datamodule, ChatDataModule)
    assert cli.datamodule.tokenizer_name == tiny_llama
    settings = json.dumps(dict(cli.datamodule.hparams), default=str)
    assert str(path) in settings


def test_the_example_conversations(chatml: str, tmp_path: Path) -> None:  # noqa: F811
    path = Path(__file__).resolve().parents[2] / "examples" / "conversations.jsonl"
    module = module_of(chatml, path, tmp_path)
    assert len(module.data["train"]) == 10
    for batch in module.train_dataloader():
        assert all(text.endswith("Mind the steps!<|im_end|>") for text in trained(module, batch))
