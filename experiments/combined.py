"""What adapters of three tasks keep of what they learnt when they are combined into one, by each rule of `combine`.

``python -m experiments combined`` trains a LoRA on GSM8K, one on ARC-Easy and one on OpenBookQA, combines them, and tests every
combination on all three. It writes ``combined.json`` after each test. An existing adapter or test is not run again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.machine import machine
from experiments.methods import callbacks
from experiments.run import Places, make_trainer
from experiments.tasks import data_module
from lightning_pmss import load_adapter, save_adapter
from lightning_pmss.modules import CausalLMModule
from lightning_pmss.named.combine_files import combine_files

RECORD = Path(__file__).parent / "combined.json"
MODEL, RANK, RATE, STEPS = "SmolLM2-135M-Instruct", 4, 3e-3, 75
_CLOZE = {
    "name": "cloze",
    "batch_size": 8,
    "eval_batch_size": 16,
    "val_size": 100,
    "test_limit": 150,
    "max_length": 160,
}
TASKS: dict[str, dict[str, Any]] = {
    "GSM8K": {
        "name": "gsm8k",
        "batch_size": 4,
        "eval_batch_size": 8,
        "val_size": 40,
        "test_limit": 50,
        "max_length": 320,
    },
    "ARC-Easy": _CLOZE | {"tasks": ["ARC-Easy"]},
    "OpenBookQA": _CLOZE | {"tasks": ["openbookqa"]},
}
RULES: dict[str, dict[str, Any]] = {
    "cat: the sum": {"rule": "cat"},
    "cat, weights 1/3: the mean": {"rule": "cat", "weights": [1 / 3] * 3},
    "svd, rank 4, of the sum": {"rule": "svd", "rank": RANK},
    "lego, rank 4": {"rule": "lego", "rank": RANK},
    "lego, rank 8": {"rule": "lego", "rank": 2 * RANK},
    "lego, rank 4, raw units": {"rule": "lego", "rank": RANK, "units": "raw"},
    "linear": {"rule": "linear"},
    "ties, density 0.5": {"rule": "ties", "density": 0.5},
    "dare_linear, density 0.5": {"rule": "dare_linear", "density": 0.5},
    "dare_ties, density 0.5": {"rule": "dare_ties", "density": 0.5},
    "magnitude_prune, density 0.5": {"rule": "magnitude_prune", "density": 0.5},
}


def measure(places: Places, work: Path) -> None:
    """Train what is missing in ``work``, test what is missing in the record."""
    adapters = {task: work / task for task in TASKS}
    for task, folder in adapters.items():
        if not folder.exists():
            _train(places, task, folder)
    combinations: dict[str, Path | None] = {
        "no adapter": None,
        **{f"{task} alone": folder for task, folder in adapters.items()},
    }
    for name, options in RULES.items():
        folder = combinations[name] = work / "combined" / name.replace("/", " of ")
        if not folder.exists():
            base = places.model(MODEL)
            report = combine_files(base, list(adapters.values()), folder, progress=False, **options)
            print(report, flush=True)
    for name, tested in combinations.items():
        for task in TASKS:
            record = _read()
            if task in record["scores"].setdefault(name, {}):
                continue
            record["scores"][name][task] = found = _test(places, task, tested)
            record |= {"rank": RANK, "rate": RATE, "steps": STEPS, "machine": machine()}
            print(name, task, found, flush=True)
            RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def combined_table(record: Mapping[str, Any]) -> str:
    """Test loss by task, and what is kept of the gain of the task's own adapter."""
    scores = record["scores"]
    lines = ["| adapter | " + " | ".join(f"{task}: loss | gain kept" for task in TASKS) + " | mean kept |"]
    lines.append("|---" * (2 * len(TASKS) + 2) + "|")
    for name, found in scores.items():
        cells, kept = [], []
        for task in TASKS:
            base, own = (scores[key][task] for key in ("no adapter", f"{task} alone"))
            kept.append((base - found[task]) / (base - own))
            cells.append(f"{found[task]:.3f} | {kept[-1]:.0%}")
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {sum(kept) / len(kept):.0%} |")
    return "\n".join(lines)


def _read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {"scores": {}}
    return found


def _module(places: Places) -> CausalLMModule:
    optimizer = partial(torch.optim.AdamW, lr=RATE, weight_decay=0.0)
    return CausalLMModule(
        str(places.model(MODEL)), optimizer=optimizer, warmup_ratio=0.1, dtype="bfloat16", generate_in=()
    )


def _data(places: Places, task: str) -> Any:
    return data_module(TASKS[task], Path(places.data), str(places.model(MODEL)), 0, Path(places.cache))


def _train(places: Places, task: str, folder: Path) -> None:
    L.seed_everything(0, verbose=False)
    module = _module(places)
    method = {"name": "our lora", "rank": RANK}
    spec = {"precision": "32-true", "steps": STEPS}
    trained = make_trainer(spec, places.device, callbacks(method, 0, folder.parent, None))
    trained.fit(module, _data(places, task))
    save_adapter(module.model, folder)


def _test(places: Places, task: str, folder: Path | None) -> float:
    module = _module(places)
    module.configure_model()
    if folder is not None:
        load_adapter(module.model, folder)
    tester = make_trainer({"precision": "32-true", "steps": 1}, places.device, [])
    return tester.test(module, _data(places, task), verbose=False)[0]["test/loss"]
