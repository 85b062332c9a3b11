"""A hand-made data set in the form of the batch contract, and a metric: no data module is needed to test the module."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric

EXAMPLES = [
    ("Question: 3 pens?\nAnswer:", " #### 3"),
    ("Question: Ann has 3 boxes with 4 pens each.\nAnswer:", " 3 * 4 = 12 #### 12"),
    ("Q:", " 7"),
    ("Question: Tom had 17 eggs and sold 5. How many eggs are left?\nAnswer:", " 17 - 5 = 12 eggs are left. #### 12"),
    ("Question: A train travels 60 miles.\nAnswer:", " 60 * 3 = 180"),
]


class EqualTexts(Metric):
    """Share of texts equal to their targets."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, preds: list[str], targets: list[str]) -> None:
        self.right += sum(self.score(p, t) for p, t in zip(preds, targets, strict=True))
        self.total += len(preds)

    def compute(self) -> Tensor:
        return self.right / self.total

    def score(self, pred: str, target: str) -> float:
        return float(pred == target)


def collate(rows: list[dict[str, Any]], pad: int, prompts: bool = True) -> dict[str, Any]:
    """One batch of the contract."""

    def padded(values: list[list[int]], fill: int, left: bool = False) -> Tensor:
        width = max(map(len, values))
        return torch.tensor([[fill] * (width - len(v)) + v if left else v + [fill] * (width - len(v)) for v in values])

    full = [row["prompt_ids"] + row["response_ids"] for row in rows]
    batch: dict[str, Any] = {
        "input_ids": padded(full, pad),
        "attention_mask": padded([[1] * len(ids) for ids in full], 0),
        "labels": padded([[-100] * len(row["prompt_ids"]) + row["response_ids"] for row in rows], -100),
    }
    if prompts:
        batch |= {
            "prompt_ids": padded([row["prompt_ids"] for row in rows], pad, left=True),
            "prompt_mask": padded([[1] * len(row["prompt_ids"]) for row in rows], 0, left=True),
            "id": torch.tensor([row["id"] for row in rows]),
            "prompt": [row["prompt"] for row in rows],
            "target": [row["target"] for row in rows],
        }
    return batch


class HandMade(L.LightningDataModule):
    """The examples above in batches of two (the last one is smaller)."""

    def __init__(self, tokenizer: str, targets: list[str] | None = None, prompts: bool = True) -> None:
        super().__init__()
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(tokenizer)
        self.pad, self.prompts = loaded.pad_token_id, prompts
        self.rows = [
            {
                "id": number,
                "prompt": prompt,
                "target": targets[number] if targets else response.strip(),
                "prompt_ids": loaded(prompt, add_special_tokens=False).input_ids,
                "response_ids": [*loaded(response, add_special_tokens=False).input_ids, loaded.eos_token_id],
            }
            for number, (prompt, response) in enumerate(EXAMPLES)
        ]

    def batch(self, *numbers: int) -> dict[str, Any]:
        return collate([self.rows[number] for number in numbers], self.pad, self.prompts)

    def _loader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, batch_size=2, collate_fn=lambda rows: collate(rows, self.pad, self.prompts))

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _loader
