"""Choice by likelihood: log-probabilities by hand, candidates, scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from handmade import collate
from torch.utils.data import DataLoader

from lightning_pmss.evaluation.likelihood import candidates, choose, log_likelihoods, offered
from lightning_pmss.metrics import CommonsenseAccuracy
from lightning_pmss.modules import CausalLMModule

ROWS = [
    ("Is it? Answer format: true/false\nAnswer:", "true", "boolq"),
    (
        "Which? Answer1: a Answer2: b Answer3: c\n\nAnswer format: answer1/answer2/answer3\nAnswer:",
        "answer2",
        "ARC-Easy",
    ),
    ("Which one of these? Answer1: x Answer2: y\nAnswer:", "answer1", "openbookqa"),
]


class Choices(L.LightningDataModule):
    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.pad = tokenizer.pad_token_id
        self.rows = [
            {
                "id": number,
                "prompt": prompt,
                "target": [task, label],
                "prompt_ids": tokenizer(prompt).input_ids,
                "response_ids": [*tokenizer(f" the correct answer is {label}").input_ids, tokenizer.eos_token_id],
            }
            for number, (prompt, label, task) in enumerate(ROWS)
        ]

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, batch_size=2, collate_fn=lambda rows: collate(rows, self.pad))


@pytest.fixture(scope="module")
def module(tiny_llama: str) -> CausalLMModule:
    made = CausalLMModule(tiny_llama, metric=CommonsenseAccuracy(by_task=True), answer_by="likelihood")
    made.configure_model()
    with torch.no_grad():  # larger weights: the labels differ by more than rounding
        for parameter in made.model.parameters():
            parameter.mul_(3)
    return made.eval()


def by_hand(module: CausalLMModule, prompt: list[int], text: str) -> tuple[float, int]:
    """Log-probability of the text behind the prompt, one token at a time, without padding."""
    ids = module.tokenizer(text).input_ids
    total = 0.0
    for place, token in enumerate(ids):
        with torch.no_grad():
            logits = module.model(torch.tensor([prompt + ids[:place]])).logits[0, -1]
        total += logits.double().log_softmax(-1)[token].item()
    return total, len(ids)


def test_test_scores_labels_by_sum_and_by_mean(
    module: CausalLMModule, tmp_path: Path, trainer: Callable[..., L.Trainer]
) -> None:
    data = Choices(module.tokenizer)
    logged = trainer().test(module, data, verbose=False)[0]
    lines = [json.loads(line) for line in (tmp_path / "predictions-test.jsonl").read_text().splitlines()]
    right = []
    for line, row, names in zip(lines, data.rows, (2, 3, 2), strict=True):
        assert len(line["likelihoods"]) == names
        expected = {
            name: by_hand(module, row["prompt_ids"], f" the correct answer is {name}") for name in line["likelihoods"]
        }
        for name, (value, tokens) in line["likelihoods"].items():
            assert (value, tokens) == (pytest.approx(expected[name][0], rel=1e-4), expected[name][1])
        best = max(expected, key=lambda name: expected[name][0])
        best_mean = max(expected, key=lambda name: expected[name][0] / expected[name][1])
        assert (line["output"], line["extracted"], line["gold"]) == (best, best, row["target"][1])
        assert line["score"] == float(best == row["target"][1])
        assert line["score_normalised"] == float(best_mean == row["target"][1])
        assert line["group"] == row["target"][0]
        right.append((line["score"], line["score_normalised"]))
    assert logged["test/accuracy"] == pytest.approx(sum(a for a, _ in right) / 3)
    assert logged["test/exact_match_normalised"] == pytest.approx(sum(b for _, b in right) / 3)
    told = json.loads((tmp_path / "summary-test.json").read_text())
    assert set(told["groups"]) == {"boolq", "ARC-Easy", "openbookqa"}
    assert told["identity"]["answer_by"] == "likelihood"


def test_padding_changes_nothing(module: CausalLMModule) -> None:
    data = Choices(module.tokenizer)
    batch = collate(data.rows, data.pad)
    made = candidates(module.metric, module.tokenizer, batch)
    # Two turns: the second must not see what the first has read.
    names = [[list(labels)[turn] for labels in made] for turn in (0, 1)]
    turns = [[labels[name] for labels, name in zip(made, row, strict=True)] for row in names]
    together = log_likelihoods(module.model, batch["prompt_ids"], batch["prompt_mask"], turns, data.pad)
    assert together.shape == (2, 3)
    for turn in (0, 1):
        for place, row in enumerate(data.rows):
            text = f" the correct answer is {names[turn][place]}"
            expected = by_hand(module, row["prompt_ids"], text)[0]
            assert together[turn, place].item() == pytest.approx(expected, rel=1e-4)


def test_only_offered_labels_are_candidates_and_normalising_matters() -> None:
    labels = ("answer1", "answer2", "answer3", "answer4", "answer5")
    assert offered(ROWS[2][0], labels) == ["answer1", "answer2"]
    assert offered("Which?", labels) == list(labels)
    assert choose({"a": (-4.0, 2), "b": (-5.0, 4)}) == ("a", "b")
    assert choose({"a": (-4.0, 2), "b": (-4.0, 2)}) == ("a", "a")


def test_data_without_labels_is_refused(module: CausalLMModule) -> None:
    from lightning_pmss.metrics import GSM8KAccuracy

    data = Choices(module.tokenizer)
    batch = collate(data.rows, data.pad)
    with pytest.raises(ValueError, match="needs targets with labels"):
        candidates(GSM8KAccuracy(), module.tokenizer, batch)
    data.rows[0]["response_ids"] = module.tokenizer("who knows").input_ids
    with pytest.raises(ValueError, match="does not end in its label 'true'"):
        candidates(module.metric, module.tokenizer, collate(data.rows, data.pad))
