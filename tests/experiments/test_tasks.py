"""The tasks of the studies against brute force."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.cloze import ClozeDataModule, cloze_accuracy, parse
from experiments.pairs import PairsDataModule
from experiments.passages import PassagesDataModule
from lightning_pmss.datamodules.continuations import tokens_of

ROW = (
    "Please choose the correct answer to the question: Why is\n\nthe sky blue?\n\n"
    "Answer1: It is not Answer2: light scatters Answer3: a sea\n\nAnswer format: answer1/answer2/answer3"
)


def test_parse() -> None:
    assert parse(ROW, "answer2") == ("Why is\n\nthe sky blue?", ["It is not", "light scatters", "a sea"], 1)
    with pytest.raises(ValueError, match=r"offers the answers \[1, 2, 3\], and 'answer4'"):
        parse(ROW, "answer4")
    with pytest.raises(ValueError, match="not a question in LLM-Adapters' form"):
        parse("Why?", "answer1")


def test_all_real_rows_parse(shared: Path) -> None:
    for task in ("ARC-Easy", "ARC-Challenge", "openbookqa"):
        for file in ("train.json", "test.json"):
            rows = json.loads((shared / "data" / "commonsense" / task / file).read_text())
            for row in rows:
                question, answers, right = parse(row["instruction"], row["answer"])
                assert question
                assert all(answers)
                assert 0 <= right < len(answers)


def test_cloze_accuracy_is_that_of_whole_texts(tmp_path: Path, tiny_llama: str) -> None:
    folder = tmp_path / "ARC"
    folder.mkdir()
    answers = (
        ("answer2", ROW),
        ("answer1", ROW.replace("the sky", "all")),
        ("answer3", ROW.replace("blue", "so high")),
    )
    rows = [{"instruction": text, "answer": answer} for answer, text in answers]
    for name in ("train.json", "test.json"):
        (folder / name).write_text(json.dumps(rows))
    data = ClozeDataModule(tiny_llama, str(tmp_path), ["ARC"], batch_size=2, val_size=1, cache_dir=str(tmp_path))
    data.setup()
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    found = cloze_accuracy(model, tokenizer, data._eval_dataloader("test", by_length=False), torch.device("cpu"))

    model.requires_grad_(False)
    expected = []
    for row in rows:
        question, offered, right = parse(row["instruction"], row["answer"])
        prompt = tokenizer(f"Question: {question}\nAnswer:").input_ids
        scores = []
        for text in offered:
            response = tokenizer(f" {text}").input_ids
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            scores.append(float(logits[range(len(response)), response].sum()) / len(text.encode()))
        expected.append(scores.index(max(scores)) == right)
    assert found == expected


def test_pairs_are_the_same_for_all_splits_and_others_for_other_seeds(tmp_path: Path, tiny_llama: str) -> None:
    data = PairsDataModule(tiny_llama, size=8, letters=3, pairs_seed=1, cache_dir=str(tmp_path))
    pairs = data.load_examples("train")
    assert pairs == data.load_examples("test")
    assert len({p.question for p in pairs}) == 8
    assert all(len(p.question) == len(p.response) == 3 for p in pairs)
    assert pairs != PairsDataModule(tiny_llama, size=8, letters=3, pairs_seed=2).load_examples("train")
    with pytest.raises(ValueError, match="different keys need more than 1 letters"):
        PairsDataModule(tiny_llama, size=27, letters=1)


def test_passages_come_once_and_whole(tmp_path: Path, tiny_llama: str) -> None:
    lines = [{"context": f"Passage: Some text.\nQuestion: {i}?\nAnswer:"} for i in range(2)]
    file = tmp_path / "drop.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    data = PassagesDataModule(tiny_llama, str(file))
    examples = data.load_examples("test")
    assert examples is not None
    assert [e.response for e in examples] == ["Some text."]
    assert data.load_examples("train") is None


def test_tokens_of_the_records_are_kept(shared: Path, tiny_llama: str) -> None:
    """Responses were tokenised by themselves when the records were made; stories260K's tokenizer then adds a blank."""
    for folder, blank in ((str(shared / "models" / "stories260K"), " "), (tiny_llama, "")):
        for data in (
            PairsDataModule(folder, size=8),
            PassagesDataModule(folder, str(shared / "data" / "drop" / "drop_v0_dev_250.jsonl"), characters=80),
        ):
            examples = data.load_examples("test") or []
            encode = data.encoder
            rows = encode({"question": [e.question for e in examples], "response": [e.response for e in examples]})
            alone = tokens_of(encode.tokenizer, [f" {e.response.removeprefix(blank)}" for e in examples])
            assert [ids[:-1] for ids in rows["response_ids"]] == alone
            assert all(e.response.startswith(blank) for e in examples)
