"""The lowest loss on pairs that can be had with a frozen output head: what no adapter of the layers before it gets below.

``python -m experiments floor`` writes ``floor.json``, which the page tells.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import machine
from experiments.run import Places
from experiments.tasks import data_module
from lightning_pmss.datamodules.instruction import IGNORED

RECORD = Path(__file__).parent / "floor.json"
MODEL, TASK = "stories260K", {"name": "pairs", "size": 256, "batch_size": 32, "eval_batch_size": 64}


def token_floor(head: Tensor, norm: Tensor, token: int, eps: float = 1e-5, starts: int = 3) -> float:
    """Lowest ``-log p(token)`` over all hidden states z [d], for the logits ``head [v, d] @ (z / rms(z) * norm [d])``.

    L-BFGS from the token's own direction and ``starts - 1`` random ones, in float64; the least of what they end at.
    """
    head, norm = head.detach().double(), norm.detach().double()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(starts - 1, len(norm), generator=generator, dtype=torch.float64)
    found = []
    for start in (head[token] * norm, *drawn):
        z = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([z], max_iter=500, line_search_fn="strong_wolfe")

        def loss(z: Tensor = z) -> Tensor:
            hidden = F.rms_norm(z, z.shape, norm, eps)
            return -torch.log_softmax(head @ hidden, 0)[token]

        def closure(z: Tensor = z) -> float:
            z.grad = None
            value = loss()
            value.backward()
            return float(value.detach())

        optimizer.step(closure)
        found.append(float(loss().detach()))
    return min(found)


def measure(places: Places) -> dict[str, Any]:
    """The floor of each token of the pairs' responses, their mean as the loss counts them, and what the end mark is like."""
    folder = str(places.model(MODEL))
    data = data_module(TASK, Path(places.data), folder, 0, Path(places.cache))
    data.prepare_data()
    data.setup("fit")
    counts: Counter[int] = Counter()
    for batch in data.train_dataloader():
        counts.update(batch["labels"][batch["labels"] != IGNORED].tolist())
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    head, norm = model.get_output_embeddings().weight, model.model.norm
    floors = {token: token_floor(head, norm.weight, token, norm.variance_epsilon) for token in sorted(counts)}
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    likeness = F.cosine_similarity(head.detach(), head.detach()[end : end + 1])
    return {
        "model": MODEL,
        "task": TASK,
        "mean": sum(floors[token] * n for token, n in counts.items()) / counts.total(),
        "end_mark": floors[end],
        "largest_other": max(value for token, value in floors.items() if token != end),
        "tokens_alike": int((likeness > 0.99).sum()) - 1,
        "machine": machine(),
    }


def write(places: Places) -> Path:
    """Measure and keep the record."""
    RECORD.write_text(json.dumps(measure(places), indent=1) + "\n", encoding="utf-8")
    return RECORD


def floor_text(record: Mapping[str, Any]) -> str:
    """What the page says of it."""
    return (
        f"With the output head frozen the loss on pairs cannot fall below **{record['mean']:.3f}**: the end mark's row of"
        f" the head is like those of {record['tokens_alike']} tokens that the model never saw (cosine above 0.99), and"
        f" costs {record['end_mark']:.2f} whatever the layers do; no other token costs more than"
        f" {record['largest_other']:.0e}."
    )
