"""One run: from its specification (plain values) to its record (plain values), by our own module, data and callback."""

from __future__ import annotations

import gc
import math
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.nn import functional as F

from benchmarks.machine import machine
from experiments.cloze import cloze_accuracy
from experiments.flatness import SIZES, noisy
from experiments.methods import callbacks
from experiments.optimizers import OPTIMIZERS
from experiments.spectrum import spectra, summary
from experiments.tasks import data_module, prose
from experiments.watch import Watch
from lightning_pmss.callbacks import FlatLoRA, SharpnessPasses
from lightning_pmss.datamodules.instruction import IGNORED
from lightning_pmss.modules import CausalLMModule


@dataclass(frozen=True)
class Places:
    """Where this machine keeps what runs read. Nothing of it enters a record."""

    models: tuple[str, ...]
    data: str
    cache: str
    device: str = "cpu"

    def model(self, name: str) -> Path:
        """Folder of a model.

        Raises:
            FileNotFoundError: It is in none of the folders.
        """
        for folder in self.models:
            if (Path(folder) / name / "config.json").is_file():
                return Path(folder) / name
        raise FileNotFoundError(
            f"no model {name!r} in {', '.join(self.models)}; give its parent folder with --models"
            " (SmolLM2-135M-Instruct: `python examples/smollm2.py`)."
        )


def run(spec: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """Train and evaluate.

    Returns:
        The record: ``spec``, ``status`` (``"finished"`` or ``"diverged"``), ``scores``, ``train_loss``, sizes, seconds,
        machine.
    """
    gc.collect()  # a module and its trainer refer to one another: the last run's weights would stay for a while
    clock = (
        time.perf_counter if places.device == "cuda" else time.process_time
    )  # other work on the machine is not the run's
    start = clock()
    L.seed_everything(spec["seed"], verbose=False)
    folder = str(places.model(spec["model"]))
    cache = Path(places.cache)
    data = data_module(spec["task"], Path(places.data), folder, spec["seed"], cache)
    module = CausalLMModule(
        folder,
        optimizer=partial(OPTIMIZERS[spec.get("optimizer", "adamw")], lr=spec["lr"], weight_decay=0.0),
        warmup_ratio=0.1,
        dtype=spec["dtype"],
        generate_in=(),
    )
    watch = Watch()
    with tempfile.TemporaryDirectory() as work, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calibration = partial(_calibration, data)
        added = callbacks(spec["method"], spec["seed"], Path(work), calibration) if spec["steps"] else []
        trainer = make_trainer(spec, places.device, [*added, *_flat(spec), watch])
        status = "finished"
        if spec["steps"]:
            try:
                trainer.fit(module, data)
            except (ValueError, RuntimeError):
                if watch.losses and not math.isfinite(watch.losses[-1]):
                    status = "diverged"  # what refuses NaN at the end of training
                else:
                    raise
        if watch.losses and not math.isfinite(watch.losses[-1]):
            status = "diverged"
        scores = {} if status == "diverged" else evaluated(spec, places, trainer, module, data)
    steps = sorted(watch.seconds)
    return {
        "spec": dict(spec),
        "status": status,
        "scores": scores,
        "train_loss": watch.losses,
        "gradient_norms": watch.gradient_norms,
        "trainable": watch.trainable,
        "saved_bytes": watch.saved_bytes,
        "seconds_per_step": round(steps[len(steps) // 2], 4) if steps else None,
        "seconds": round(clock() - start, 1),
        "spectra": _spectra(module.model, folder) if spec.get("spectra") and status == "finished" else None,
        "machine": machine(),
    }


def _spectra(model: Any, folder: str) -> dict[str, Any] | None:
    values = spectra(model, folder)
    return summary(values) if values else None


def _flat(spec: Mapping[str, Any]) -> list[Any]:
    """What looks for flat minima; AdapterCallback runs the passes of SAM by itself, and peft's callback does not."""
    noise = [FlatLoRA(sigma=spec["flat"], seed=spec["seed"])] if "flat" in spec else []
    return [*noise, SharpnessPasses()] if spec["steps"] else []


def make_trainer(spec: Mapping[str, Any], device: str, added: list[Any]) -> L.Trainer:
    """A Trainer for a run's ``precision``, ``steps`` and ``clip``."""
    return L.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        precision=spec["precision"],
        max_steps=spec["steps"] or 1,
        max_epochs=-1,
        gradient_clip_val=spec.get("clip", 1.0),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=10**9,
        callbacks=added,
    )


def _calibration(data: Any) -> list[dict[str, Any]]:
    """The first batches of training, as it will see them."""
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    return [batch for batch, _ in zip(loader, range(16), strict=False)]


def evaluated(spec: Mapping[str, Any], places: Places, trainer: L.Trainer, module: Any, data: Any) -> dict[str, Any]:
    """The scores that a run's ``evaluate`` names."""
    scores: dict[str, Any] = {}
    task = spec["task"]["name"]
    silent: dict[str, Any] = {"verbose": False}
    if "val" in spec["evaluate"]:
        scores["val/loss"] = trainer.validate(module, data, **silent)[0]["val/loss"]
    if "test" in spec["evaluate"]:
        scores["test/loss"] = trainer.test(module, data, **silent)[0]["test/loss"]
        if task in ("cloze", "pairs"):
            module.to("cuda" if places.device == "cuda" else "cpu").eval()
            loader = data._eval_dataloader("test", by_length=False)
            if task == "cloze":
                right = cloze_accuracy(module.model, module.tokenizer, loader, module.device)
            else:
                right = recalled(module, loader)
            scores["test/accuracy"] = sum(right) / len(right)
            scores["test/right"] = "".join(str(int(x)) for x in right)  # per question, for paired comparisons
    if "noise" in spec["evaluate"]:
        with noisy(module.model) as size:
            for size[0] in SIZES:
                scores[f"noise/{size[0]}"] = trainer.test(module, data, **silent)[0]["test/loss"]
    if "prose" in spec["evaluate"]:
        drop = prose(Path(places.data), data.tokenizer_name, Path(places.cache))
        scores["prose/loss"] = trainer.test(module, drop, **silent)[0]["test/loss"]
    return scores


@torch.no_grad()
def recalled(module: Any, batches: Any) -> list[bool]:
    """Whether greedy decoding would give each whole response: each of its tokens is the likeliest after the right ones."""
    found = []
    for batch in batches:
        logits = module(batch["input_ids"].to(module.device), batch["attention_mask"].to(module.device))
        labels = F.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:].to(module.device)
        found += ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1).tolist()
    return found
