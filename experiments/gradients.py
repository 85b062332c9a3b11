"""How much of a task's gradient the selected rows and columns hold: what the first steps of PMSS can follow.

``python -m experiments gradients`` writes ``gradients.json``, which the page shows as a table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import machine
from benchmarks.measure import table
from experiments.calibrated import calibrate, choose
from experiments.run import Places
from experiments.tasks import data_module
from lightning_pmss.methods.pmss.selection import SELECTORS, select_skeleton
from lightning_pmss.modules import CausalLMModule

RECORD = Path(__file__).parent / "gradients.json"
MODEL, TASK = "SmolLM2-135M-Instruct", {"name": "gsm8k", "batch_size": 4, "val_size": 40, "max_length": 320}
RULES = ("lupp", "random", "gradient")


def share(gradient: Tensor, weight: Tensor, rows: Tensor, cols: Tensor) -> float:
    """The share of the squares of G [out, in] within the spans of W's columns and rows: ``|Q_C^T G Q_R|^2 / |G|^2``."""
    q_c, q_r = torch.linalg.qr(weight[:, cols]).Q, torch.linalg.qr(weight[rows].T).Q
    return float((q_c.T @ gradient @ q_r).square().sum() / gradient.square().sum())


def measure(places: Places, blocks: tuple[int, ...] = (0, 14, 29), rank: int = 76, batches: int = 4) -> dict[str, Any]:
    """Shares by layer: of the first singular direction, and within the skeletons of each rule; not of LoRA, whose A turns."""
    folder = str(places.model(MODEL))
    data = data_module(TASK, Path(places.data), folder, 0, Path(places.cache))
    data.prepare_data()
    data.setup("fit")
    module = CausalLMModule(folder, dtype="bfloat16", generate_in=())
    module.configure_model()
    model: Any = module.model
    model.requires_grad_(False)
    layers: dict[str, nn.Module] = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and any(f".{block}." in name for block in blocks)
    }
    seen = islice(data.train_dataloader(), batches)
    moments = calibrate(layers, model.get_input_embeddings(), lambda batch: module.response_loss(batch)[0], seen)
    found: dict[str, dict[str, float]] = {}
    for name, layer in layers.items():
        stored: Any = layer.weight
        weight, gradient = stored.detach().float(), moments[name].gradient
        values = torch.linalg.svdvals(gradient).square()
        found[name] = {"first": float(values[0] / values.sum())}
        for rule in RULES:
            if rule in SELECTORS:
                skeleton = select_skeleton(weight, rank, selection=rule, name=name)
            else:
                skeleton = choose(weight, moments[name], rank, rule)
            found[name][rule] = share(gradient, weight, *skeleton)
    rounded = {name: {k: round(v, 4) for k, v in values.items()} for name, values in found.items()}
    return {"model": MODEL, "task": TASK, "rank": rank, "batches": batches, "layers": rounded, "machine": machine()}


def write(places: Places) -> Path:
    """Measure and keep the record."""
    RECORD.write_text(json.dumps(measure(places), indent=1) + "\n", encoding="utf-8")
    return RECORD


def gradient_table(record: Mapping[str, Any]) -> str:
    """Median over the blocks by kind of layer."""
    kinds: dict[str, list[Mapping[str, float]]] = {}
    for name, shares in record["layers"].items():
        kinds.setdefault(name.rpartition(".")[2], []).append(shares)
    head = ["share of the gradient's squares", "in its first direction", *(f"held by {rule}" for rule in RULES)]
    rows: list[list[object]] = [
        [kind, *(f"{median(shares[key] for shares in found):.3f}" for key in ("first", *RULES))]
        for kind, found in kinds.items()
    ]
    return table(head, rows)
