"""Memory and time of the loss: logits of the whole batch beside logits of some tokens at a time.

    python -m benchmarks.loss [--model models/SmolLM2-135M-Instruct] [--tokens 512 2048 8192] [--chunk 512] [--labelled 0.5]
        [--rank 64] [--dtype bfloat16] [--repeats 3] [--json FILE]

One row of so many tokens, of which the last share has labels; the model converted at that rank, activations checkpointed;
forward and backward. Each way runs in a fresh process: the growth of its peak resident memory from before the first step (on
a GPU: peak allocated bytes above those of the model), seconds, and the loss. "head alone" is the same on the output head
with random hidden states: what the loss itself needs. Linux, or CUDA with --device cuda.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import peak_memory, reset_peak_memory, spread, table, write_result
from lightning_pmss import PMSSConfig, convert
from lightning_pmss.modules import CausalLMModule


class HeadAlone(nn.Module):
    """Gives the output head hidden states of its own, which want a gradient."""

    def __init__(self, model: Any, tokens: int) -> None:
        super().__init__()
        self.config, self.head = model.config, model.get_output_embeddings()
        dtype = self.head.weight.dtype
        self.hidden = nn.Parameter(torch.randn(1, tokens, self.head.weight.shape[1]).to(dtype))

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, **_: Any) -> Any:
        return argparse.Namespace(logits=self.head(self.hidden))


def build(task: dict[str, Any]) -> CausalLMModule:
    """The converted module."""
    module = CausalLMModule(
        task["model"], dtype=task["dtype"], gradient_checkpointing=True, generate_in=(), loss_chunk=task["chunk"]
    )
    module.configure_model()
    if task["alone"]:
        module.model.requires_grad_(False)
        module.model = HeadAlone(module.model, task["tokens"])
    else:
        convert(module, PMSSConfig(rank=task["rank"], selection="random"))
        module.model.train()  # else nothing is checkpointed
    return module.to(task["device"])


def worker(task: dict[str, Any]) -> None:
    """One way, in this process; prints its figures."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = build(task)
    ids = torch.randint(0, module.model.config.vocab_size, (1, task["tokens"]), device=task["device"])
    labels = ids.clone()
    labels[:, : int(task["tokens"] * (1 - task["labelled"]))] = -100

    def step(batch: dict[str, Tensor]) -> float:
        module.zero_grad()
        loss, _ = module.response_loss(batch)
        loss.backward()
        return loss.item()

    short = {"input_ids": ids[:, :8], "attention_mask": torch.ones_like(ids[:, :8]), "labels": ids[:, :8]}
    if not task["alone"]:
        step(short)  # the libraries make their buffers
    cuda = task["device"] == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else reset_peak_memory()
    seconds, losses = [], []
    for _ in range(task["repeats"]):
        start = time.perf_counter() if cuda else time.process_time()
        losses.append(step({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}))
        seconds.append((time.perf_counter() if cuda else time.process_time()) - start)
    peak = torch.cuda.max_memory_allocated() if cuda else peak_memory()
    print(json.dumps({"bytes": peak - before, "seconds": spread(seconds), "loss": losses[0]}))


def run(task: dict[str, Any]) -> dict[str, Any]:
    """`worker` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.loss", "--worker", json.dumps(task)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--labelled", type=float, default=0.5, help="share of the tokens that have a label")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(options.worker))
        return
    kept = ("model", "labelled", "rank", "dtype", "device", "repeats")
    results, rows = [], []
    for tokens in options.tokens:
        for alone in (True, False):
            for chunk in (None, options.chunk):
                task = {name: getattr(options, name) for name in kept}
                found = run({**task, "tokens": tokens, "alone": alone, "chunk": chunk})
                case = {"tokens": tokens, "part": "head alone" if alone else "whole step", "chunk": chunk}
                results.append({**case, **found})
                rows.append([*case.values(), found["bytes"] / 1e6, *found["seconds"].values(), f"{found['loss']:.6f}"])
                print(rows[-1], file=sys.stderr, flush=True)
    print(table(["tokens", "part", "chunk", "peak MB", "s min", "median", "max", "n", "loss"], rows))
    about = {name: getattr(options, name) for name in kept} | {"model": Path(options.model).name}
    write_result(options.json, "loss", {**about, "cases": results})


if __name__ == "__main__":
    main()
