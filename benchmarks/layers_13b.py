"""Two decoder layers of LLaMA-2-13B's real size, trained for some steps on two processes under FSDP2 and ZeRO-3 (CPU, gloo).

    python -m benchmarks.layers_13b --output benchmarks/results/layers_13b.json

Makes a checkpoint with random bfloat16 weights (hidden 5120, intermediate 13824, 2 layers; 1.9 GB in a temporary folder), its
skeleton file by `select_files`, and runs `CausalLMModule` with `PMSSCallback` from both. Prints losses, seconds per step and
each rank's peak memory, which shows that only rank 0 holds the model whole while it loads under FSDP2.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import lightning as L
import torch
from torch.utils.data import DataLoader

ARCHITECTURE = Path(__file__).parents[1] / "tests" / "fixtures" / "architectures" / "llama-2-13b.json"


def make_checkpoint(folder: Path, layers: int) -> None:
    """A random model of the real width, with a small vocabulary's tokenizer left out: the data are token numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**json.loads(ARCHITECTURE.read_text()), "num_hidden_layers": layers})
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)


class Steps(L.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.started = 0.0
        self.built_gb = 0.0

    def on_fit_start(self, *args: Any) -> None:
        self.built_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

    def on_train_batch_start(self, *args: Any) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        self.seconds.append(time.perf_counter() - self.started)


def worker(task: dict[str, Any]) -> None:
    """One rank."""
    from lightning_pmss import PMSSCallback
    from lightning_pmss.modules import CausalLMModule
    from tests.distributed.strategies import make_strategy
    from tests.leaving import leave

    class Untokenized(CausalLMModule):
        """The checkpoint has no tokenizer."""

        def configure_model(self) -> None:
            import lightning_pmss.modules.causal_lm as module

            module.load_tokenizer = lambda *args, **kwargs: None
            super().configure_model()

    torch.set_num_threads(1)
    steps = Steps()
    callback = PMSSCallback(
        rank=task["rank"],
        skeleton_file=task["skeleton"],
        output_dir=Path(task["folder"]) / "out",
        merge_on_save=None,
    )
    batches = torch.randint(0, 32000, (2 * task["steps"], task["tokens"]), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in batches]
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=make_strategy(task["strategy"]),
        precision="bf16-true",
        max_steps=task["steps"],
        inference_mode=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=task["folder"],
        callbacks=[callback, steps],
    )
    module = Untokenized(task["model"], warmup_ratio=0.0, gradient_checkpointing=True)
    trainer.fit(module, DataLoader(rows, batch_size=1))  # type: ignore[arg-type]
    record = {
        "losses": steps.losses,
        "seconds": steps.seconds,
        "built_gb": steps.built_gb,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    (Path(task["folder"]) / f"{task['strategy']}-{trainer.global_rank}.json").write_text(json.dumps(record))
    leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="per example; one example per process and step")
    parser.add_argument("--output", default="benchmarks/results/layers_13b.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(options.worker))
        return
    from lightning_pmss import PMSSConfig
    from lightning_pmss.files.select import select_files

    results: dict[str, Any] = {"options": vars(options), "torch": torch.__version__, "runs": {}}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_checkpoint(folder / "model", options.layers)
        print(select_files(folder / "model", folder / "skeleton.safetensors", PMSSConfig(rank=options.rank)))
        for strategy in ("fsdp2", "zero3"):
            task = vars(options) | {
                "strategy": strategy,
                "folder": place,
                "model": str(folder / "model"),
                "skeleton": str(folder / "skeleton.safetensors"),
            }
            command = [sys.executable, "-m", "benchmarks.layers_13b", "--worker", json.dumps(task)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            runs = [json.loads((folder / f"{strategy}-{rank}.json").read_text()) for rank in (0, 1)]
            results["runs"][strategy] = runs
            for rank, run in enumerate(runs):
                losses = " ".join(f"{x:.4f}" for x in run["losses"])
                steps = " ".join(f"{x:.1f}" for x in run["seconds"])
                print(
                    f"{strategy} rank {rank}: losses {losses}; s/step {steps}; peak {run['built_gb']:.1f} GB"
                    f" when built, {run['peak_gb']:.1f} GB in all"
                )
    Path(options.output).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
