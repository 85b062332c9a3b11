"""Worked examples in front of questions, and validation sets of whole passages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_pmss.datamodules import CommonsenseDataModule, DROPDataModule, Example, GSM8KDataModule
from lightning_pmss.datamodules.splits import draw_shots, group_numbers, hold_out, read_shots


def _gsm8k(number: int) -> dict[str, str]:
    return {"question": f"Q{number}?", "answer": f"A{number}\n#### {number}"}


def _drop(passage: int, number: int) -> dict[str, Any]:
    answer = {"number": str(number), "date": {}, "spans": []}
    return {"passage": f"Passage {passage}.", "question": f"Q{number}?", "answer": answer}


def _write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def gsm8k(tiny_tokenizer: str, tmp_path: Path) -> Any:
    # The test set holds a training question too, as happens.
    train = _write(tmp_path / "train.jsonl", [_gsm8k(number) for number in range(12)])
    test = _write(tmp_path / "test.jsonl", [_gsm8k(number) for number in (100, 5, 101)])

    def build(**kwargs: Any) -> GSM8KDataModule:
        options: dict[str, Any] = {"val_size": 4, "cache_dir": str(tmp_path / "cache"), **kwargs}
        return GSM8KDataModule(tiny_tokenizer, train, test, **options)

    return build


@pytest.mark.parametrize("seed", range(5))
def test_shots_are_training_examples_that_are_not_evaluated(gsm8k: Any, seed: int) -> None:
    module = gsm8k(num_shots=3, seed=seed)
    module.prepare_data()
    module.setup()
    shots = module.eval_encoder.shots
    assert len({shot.question for shot in shots}) == 3
    questions = {f"Q{number}?" for number in (module.data["val"]["id"][:])} | {"Q5?"}
    assert not questions & {shot.question for shot in shots}
    worked = "".join(f"Question: {shot.question}\nAnswer: {shot.response}\n\n" for shot in shots)
    for split in ("val", "test"):
        for row in module.data[split]:
            assert row["prompt"].startswith(worked + "Question: ")
            assert module.encoder.tokenizer.decode(row["prompt_ids"]) == row["prompt"]
            assert row["prompt_length"] == len(row["prompt_ids"])
    assert {row["prompt"].count("Question: ") for row in module.data["train"]} == {1}  # training has none
    assert shots == gsm8k(num_shots=3, seed=seed).eval_encoder.shots
    batch = next(iter(module.test_dataloader()))
    assert batch["prompt"][0] == worked + "Question: Q100?\nAnswer:"


def test_more_shots_keep_the_first_ones(gsm8k: Any) -> None:
    assert gsm8k(num_shots=4).eval_encoder.shots[:2] == gsm8k(num_shots=2).eval_encoder.shots


def test_too_few_candidates(gsm8k: Any) -> None:
    with pytest.raises(ValueError, match=r"num_shots is 9, but only \d training examples are neither evaluated nor"):
        gsm8k(num_shots=9).prepare_data()


def test_shots_in_a_chat_are_earlier_turns(gsm8k: Any) -> None:
    module = gsm8k(num_shots=1, prompt_style="chat")
    shot = module.eval_encoder.shots[0]
    assert module.eval_encoder.prompt("Q?") == (
        f"<|im_start|>user\n{shot.question}<|endoftext|>\n<|im_start|>assistant\n{shot.response}<|endoftext|>\n"
        "<|im_start|>user\nQ?<|endoftext|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("style", "prompt"),
    [
        ("cot", "Q: a?\nA: One. The answer is 1.\n\nQ: b?\nA: Two.\n\nQ: Q100?\nA:"),
        (
            "minerva",
            "Problem:\na?\n\nSolution:\nOne. The answer is 1.\n\nProblem:\nb?\n\nSolution:\nTwo.\n\n"
            "Problem:\nQ100?\n\nSolution:",
        ),
        (
            "lm_eval",
            "Question: a?\nAnswer: One. The answer is 1.\n\nQuestion: b?\nAnswer: Two.\n\nQuestion: Q100?\nAnswer:",
        ),
    ],
)
def test_fixed_shots_from_a_file(gsm8k: Any, tmp_path: Path, style: str, prompt: str) -> None:
    rows = [{"question": "a?", "response": "One. The answer is 1."}, {"question": "b?", "response": "Two."}, {}]
    path = _write(tmp_path / "shots.jsonl", rows[:2])
    module = gsm8k(num_shots=2, shots=path, prompt_style=style)
    module.setup("test")
    assert module.data["test"][0]["prompt"] == prompt
    with pytest.raises(ValueError, match=r"shots\.jsonl: num_shots is 3, but there are 2 .*--data\.num_shots 2"):
        gsm8k(num_shots=3, shots=path).setup("test")
    _write(tmp_path / "shots.jsonl", rows)
    with pytest.raises(ValueError, match=r"shots\.jsonl:3: no column 'question' and 'response'"):
        read_shots(path, 2)
    with pytest.raises(FileNotFoundError, match=r"Give --data\.shots train, or a file"):
        gsm8k(num_shots=2, shots="nowhere.jsonl").setup("test")


def test_shots_count_in_max_length(gsm8k: Any) -> None:
    plain = gsm8k()
    plain.setup("test")
    limit = max(plain.data["test"]["prompt_length"])
    gsm8k(max_length=limit, too_long="error").setup("test")
    with pytest.raises(ValueError, match=rf"3 of 3 prompts of the test set are longer than max_length {limit} tokens"):
        gsm8k(max_length=limit, too_long="error", num_shots=2).setup("test")
    module = gsm8k(max_length=limit, too_long="cut_prompt", num_shots=2)
    with pytest.warns(UserWarning, match="3 of 3 prompts of the test set lose their beginning"):
        module.setup("test")
    batch = next(iter(module.test_dataloader()))
    assert batch["prompt_ids"].shape[1] == limit
    assert module.encoder.tokenizer.decode(batch["prompt_ids"][0]).endswith("Question: Q100?\nAnswer:")


def test_prompts_longer_than_the_model_takes_are_told(gsm8k: Any) -> None:
    module = gsm8k(num_shots=2)
    module.encoder.tokenizer.model_max_length = 40
    with pytest.warns(UserWarning, match=r"3 of 3 prompts of the test set are longer than the 40 tokens .*num_shots"):
        module.setup("test")


def test_commonsense_has_none(tiny_tokenizer: str) -> None:
    with pytest.raises(ValueError, match=r"CommonsenseDataModule\(num_shots=5\)`: its protocol has no worked examples"):
        CommonsenseDataModule(tiny_tokenizer, num_shots=5)
    with pytest.raises(ValueError, match="num_shots=-1"):
        CommonsenseDataModule(tiny_tokenizer, num_shots=-1)


@pytest.fixture
def drop(tiny_tokenizer: str, tmp_path: Path) -> Any:
    train = _write(tmp_path / "train.jsonl", [_drop(number % 8, number) for number in range(40)])
    test = _write(tmp_path / "test.jsonl", [_drop(passage, 90) for passage in (3, 20)])

    def build(**kwargs: Any) -> DROPDataModule:
        options: dict[str, Any] = {"val_size": 12, "cache_dir": str(tmp_path / "cache"), **kwargs}
        return DROPDataModule(tiny_tokenizer, train, test, **options)

    return build


@pytest.mark.parametrize("seed", range(4))
def test_passages_are_held_out_whole(drop: Any, seed: int) -> None:
    module = drop(seed=seed)
    module.prepare_data()
    module.setup("fit")
    train, val = ({prompt.split(".")[0] for prompt in module.data[split]["prompt"][:]} for split in ("train", "val"))
    assert len(module.data["val"]) == 15  # 12 rounded up to whole passages of 5
    assert len(module.data["train"]) == 25
    assert len(val) == 3
    assert not train & val
    again = drop(seed=seed)
    again.setup("fit")
    assert again.data["val"]["id"][:] == module.data["val"]["id"][:]


def test_other_seeds_hold_out_other_passages(drop: Any) -> None:
    held = []
    for seed in range(4):
        module = drop(seed=seed)
        module.setup("fit")
        held.append(tuple(module.data["val"]["id"][:]))
    assert len(set(held)) > 1


def test_shots_share_no_passage_with_what_is_evaluated(drop: Any) -> None:
    module = drop(num_shots=3)
    module.setup()
    passages = [shot.group for shot in module.eval_encoder.shots]
    assert len(set(passages)) == 3
    evaluated = {f"Passage {int(number) % 8}." for number in module.data["val"]["id"]} | {"Passage 3."}
    assert not evaluated & set(passages)
    with pytest.raises(ValueError, match="nor share a passage"):
        drop(num_shots=6).setup("test")


def test_one_passage_cannot_be_split(tiny_tokenizer: str, tmp_path: Path) -> None:
    path = _write(tmp_path / "train.jsonl", [_drop(0, number) for number in range(9)])
    with pytest.raises(ValueError, match=r"`val_size` is 2, but there are only 9 training rows .*whole passages"):
        DROPDataModule(tiny_tokenizer, path, val_size=2, cache_dir=str(tmp_path)).setup("fit")


def test_group_numbers_and_hold_out() -> None:
    examples = [Example("q", "a", None, group) for group in (None, "x", None, "x", "y")]
    assert group_numbers(examples) == [0, 1, 2, 1, 4]
    left, held = hold_out(group_numbers(examples), 0, 0)
    assert (sorted(left), held) == ([0, 1, 2, 3, 4], [])
    for seed in range(20):
        left, held = hold_out(group_numbers(examples), 2, seed)
        assert sorted(left + held) == [0, 1, 2, 3, 4]
        assert (1 in held) == (3 in held)
        assert 2 <= len(held) <= 3


def test_shots_differ_from_each_other() -> None:
    same = [Example("q", "a"), Example("q", "b"), Example("r", "c")]
    assert draw_shots(same, [], 2) == (same[0], same[2])
