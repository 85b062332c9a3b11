"""Tokens, labels, padding, splits, the cache and what is refused."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from transformers import AutoTokenizer

from lightning_pmss.datamodules import Example, InstructionCollator, InstructionDataModule
from lightning_pmss.datamodules.instruction import IGNORED, PromptEncoder, Split
from tests import forks


class Sums(InstructionDataModule):
    """Thirty sums of growing length to train on, five to test on, no validation set."""

    def load_examples(self, split: Split) -> list[Example] | None:
        if split == "val":
            return None
        count = 30 if split == "train" else 5
        return [Example(f"What is {i} + 1?{' Think.' * i}", f"{i + 1}\n#### {i + 1}") for i in range(count)]


@pytest.fixture
def build(tiny_tokenizer: str, tmp_path: Path) -> Any:
    def build(**kwargs: Any) -> Sums:
        options = {"val_size": 6, "batch_size": 4, "cache_dir": str(tmp_path / "cache"), **kwargs}
        return Sums(tiny_tokenizer, **options)

    return build


def _ready(module: InstructionDataModule) -> InstructionDataModule:
    module.prepare_data()
    module.setup("fit")
    module.setup("test")
    return module


@pytest.mark.parametrize("style", ["plain", "chat"])
def test_labels_are_the_response_and_its_end(build: Any, style: str) -> None:
    module = _ready(build(prompt_style=style))
    tokenizer = module.encoder.tokenizer
    for batch in module.test_dataloader():
        assert batch["input_ids"].dtype == batch["labels"].dtype == batch["prompt_ids"].dtype == torch.int64
        for row in range(len(batch["id"])):
            labels, ids, mask = (batch[key][row] for key in ("labels", "input_ids", "attention_mask"))
            wanted = labels[labels != IGNORED].tolist()
            # pad is eos here: the response's own eos is a label all the same
            assert tokenizer.pad_token_id == tokenizer.eos_token_id == wanted[-1]
            blank = " " if style == "plain" else ""
            assert tokenizer.decode(wanted[:-1]) == blank + batch["target"][row]
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
            assert ids[mask.bool()].tolist() == prompt + wanted  # one boundary for training and generation
            assert tokenizer.decode(prompt) == batch["prompt"][row]
            assert (labels[: len(prompt)] == IGNORED).all()
            assert (labels[~mask.bool()] == IGNORED).all()


def test_prompt_styles(build: Any) -> None:
    plain = build().encoder
    assert plain.prompt("What is 1 + 1?") == "Question: What is 1 + 1?\nAnswer:"
    assert plain.prompt("{braces}") == "Question: {braces}\nAnswer:"
    chat = build(prompt_style="chat").encoder
    assert chat.prompt("Hi") == "<|im_start|>user\nHi<|endoftext|>\n<|im_start|>assistant\n"


def test_padding_sides_and_widths(build: Any) -> None:
    module = _ready(build())
    batch = next(iter(module.test_dataloader()))
    mask, prompt_mask = batch["attention_mask"], batch["prompt_mask"]
    assert (mask.diff(dim=1) <= 0).all()  # ones, then zeros
    assert (prompt_mask.diff(dim=1) >= 0).all()  # zeros, then ones
    assert mask.sum(1).max() == mask.shape[1]
    assert prompt_mask.sum(1).max() == prompt_mask.shape[1]
    train = next(iter(module.train_dataloader()))
    assert set(train) == {"input_ids", "attention_mask", "labels"}


@pytest.mark.parametrize(("add_bos", "add_eos"), [(False, False), (True, False), (True, True)])
def test_only_what_the_tokenizer_puts_in_front_is_kept(tiny_tokenizer: str, add_bos: bool, add_eos: bool) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    bos, eos = tokenizer.convert_tokens_to_ids("<|im_start|>"), tokenizer.eos_token_id
    template = f"{'<|im_start|> ' if add_bos else ''}$A{' <|endoftext|>' if add_eos else ''}"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<|im_start|>", bos), ("<|endoftext|>", eos)]
    )
    encoder = PromptEncoder(tokenizer, "plain", "Q: {question}\nA:")
    row = encoder({"question": ["1 + 1"], "response": ["2"]})
    assert encoder.prefix == ([bos] if add_bos else [])
    assert row["prompt_ids"][0].count(bos) == int(add_bos)
    assert eos not in row["prompt_ids"][0]
    assert row["response_ids"][0].count(eos) == 1


def test_held_out_rows_are_not_trained_on(build: Any) -> None:
    module = _ready(build())
    train, val = set(module.data["train"]["id"]), set(module.data["val"]["id"])
    assert len(train) == 24
    assert len(val) == 6
    assert train | val == set(range(30))
    assert val == set(_ready(build()).data["val"]["id"])
    assert val != set(_ready(build(seed=1)).data["val"]["id"])
    # The validation set does not move with the amount of training data.
    small = _ready(build(train_limit=5))
    assert set(small.data["val"]["id"]) == val
    assert set(small.data["train"]["id"]) < train
    assert len(small.data["train"]) == 5


def test_limits_take_the_first_evaluation_rows(build: Any) -> None:
    module = _ready(build(test_limit=2, val_limit=3))
    assert list(module.data["test"]["id"]) == [0, 1]
    assert len(module.data["val"]) == 3
    assert [batch["id"].tolist() for batch in module.predict_dataloader()] == [[0, 1]]
    assert len(_ready(build(test_limit=100)).data["test"]) == 5


def test_no_validation(build: Any) -> None:
    module = _ready(build(val_size=0))
    assert module.val_dataloader() == []
    assert len(module.data["train"]) == 30


def test_long_examples_are_dropped_from_training_only(build: Any) -> None:
    lengths = _ready(build(val_size=0)).data["train"]["length"][:]
    limit = sorted(lengths)[9]
    module = build(val_size=0, max_length=limit)
    module.prepare_data()
    with pytest.warns(UserWarning, match=rf"20 of 30 training examples are longer than max_length {limit} tokens"):
        module.setup("fit")
    module.setup("test")
    assert module.dropped == 20
    assert max(module.data["train"]["length"]) == limit
    assert len(module.data["test"]) == 5
    with pytest.raises(ValueError, match=r"All 30 training examples are longer than max_length 3 .* raise --data"):
        build(val_size=0, max_length=3).setup("fit")


def test_second_setup_reads_the_cache(build: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = _ready(build())
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.arrow")}
    assert len(files) == 2  # train and test

    def refuse(*_: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(PromptEncoder, "__call__", refuse)
    second = _ready(build())
    assert second.data["train"][:] == first.data["train"][:]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.arrow")} == files
    # A tokenizer that has been used with padding and truncation is still the same tokenizer.
    used = build()
    used.encoder.tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    _ready(used)
    with pytest.raises(AssertionError, match="tokenised again"):
        _ready(build(prompt_style="chat"))


def test_fingerprint_is_equal_in_another_process(build: Any, tiny_tokenizer: str) -> None:
    examples = [Example("What is 1 + 1?", "#### 2")]
    code = (
        "import sys; from transformers import AutoTokenizer as T;"
        "from lightning_pmss.datamodules.instruction import *;"
        "t = InstructionDataModule.plain_template;"
        "print(PromptEncoder(T.from_pretrained(sys.argv[1]), 'plain', t)"
        ".fingerprint([Example('What is 1 + 1?', '#### 2')]))"
    )
    result = forks.run(["-c", code, tiny_tokenizer])
    assert result.stdout.strip() == build().encoder.fingerprint(examples), result.stderr
    assert build().encoder.fingerprint(examples) != build().encoder.fingerprint([Example("What is 1 + 1", "#### 2")])


def test_pickles(build: Any) -> None:
    module = _ready(build())
    copies = pickle.loads(pickle.dumps([InstructionCollator(0, True), module.encoder, module]))  # noqa: S301
    assert len(copies[2].data["train"]) == 24


def test_hyperparameters_are_kept(build: Any) -> None:
    assert build(batch_size=7).hparams["batch_size"] == 7
    assert build().hparams["max_length"] == 512


def test_workers_give_the_same_batches(build: Any) -> None:
    alone, workers = _ready(build()), _ready(build(num_workers=2))
    pairs = zip(alone.train_dataloader(), workers.train_dataloader(), strict=True)
    assert all(torch.equal(one["input_ids"], other["input_ids"]) for one, other in pairs)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"batch_size": 0}, r"`Sums\(batch_size=0\)`: give an integer of at least 1, for example --data.batch_size 1"),
        ({"batch_size": 2.5}, "batch_size=2.5"),
        ({"eval_batch_size": 0}, "eval_batch_size=0.* or null"),
        ({"max_length": 1}, "max_length=1"),
        ({"val_size": -1}, "val_size=-1"),
        ({"train_limit": 0}, "train_limit=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"seed": True}, "seed=True"),
        ({"prompt_style": "alpaca"}, "prompt_style='alpaca'.*--data.prompt_style chat"),
    ],
)
def test_arguments_are_checked(build: Any, argument: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**argument)


def test_other_refusals(build: Any, tiny_tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`val_size` is 30, but there are only 30 training rows"):
        build(val_size=30).setup("fit")
    with pytest.raises(ValueError, match="Could not load the tokenizer .*--data.tokenizer"):
        Sums(str(tmp_path / "nowhere")).prepare_data()
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template; use --data.prompt_style plain"):
        PromptEncoder(tokenizer, "chat", "")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        PromptEncoder(tokenizer, "plain", "{question}")


def test_nothing_is_said_when_nothing_is_dropped(build: Any) -> None:
    assert rank_zero_only.rank in (0, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert _ready(build()).dropped == 0
