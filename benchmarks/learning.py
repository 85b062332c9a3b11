"""How fast PMSS and LoRA learn on real text: held-out response loss on GSM8K against learning rate and coordinates.

    python -m benchmarks.learning --model models/SmolLM2-135M-Instruct --data GSM8K_FOLDER --output runs/learning \
        --method orthonormal --rank 104 --lr 2e-3 5e-3 1e-2 2e-2
    python -m benchmarks.learning ... --method lora --rank 8 --lr 1e-3 2e-3 3e-3 5e-3
    python -m benchmarks.learning ... --plot             # curves of all finished runs -> learning.png and a table

One JSON a run; a run whose JSON exists is skipped, so a sweep can be interrupted. Plain torch on purpose: every method sees
the same base weights, examples, order and schedule (warm-up over a tenth of the steps, then cosine to zero; AdamW without
weight decay; bfloat16 autocast). LoRA is peft's, alpha = 2 x rank, on all linear layers of the body.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_pmss.config import PMSSConfig
from lightning_pmss.conversion import convert
from lightning_pmss.layers import COORDINATES

Example = tuple[list[int], int]  # token ids, length of the prompt


def read_examples(path: Path, tokenizer: Any, limit: int, max_length: int) -> list[Example]:
    """Examples of a GSM8K JSONL that fit into ``max_length`` tokens."""
    examples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
        ids = prompt + tokenizer(f" {row['answer']}").input_ids + [tokenizer.eos_token_id]
        if len(ids) <= max_length:
            examples.append((ids, len(prompt)))
        if len(examples) == limit:
            break
    return examples


def collate(examples: list[Example]) -> dict[str, Tensor]:
    width = max(len(ids) for ids, _ in examples)
    batch = {k: torch.zeros(len(examples), width, dtype=torch.int64) for k in ("input_ids", "attention_mask", "labels")}
    batch["labels"].fill_(-100)
    for i, (ids, prompt) in enumerate(examples):
        batch["input_ids"][i, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][i, : len(ids)] = 1
        batch["labels"][i, prompt : len(ids)] = torch.tensor(ids[prompt:])
    return batch


def response_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Summed cross-entropy over response tokens, and their number."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    keep = labels != -100
    return nn.functional.cross_entropy(logits[keep].float(), labels[keep], reduction="sum"), int(keep.sum())


@torch.no_grad()
def held_out_loss(model: nn.Module, examples: list[Example], batch_size: int = 10) -> float:
    model.eval()
    total, tokens = 0.0, 0
    ordered = sorted(examples, key=lambda example: len(example[0]))
    for start in range(0, len(ordered), batch_size):
        loss, count = response_loss(model, collate(ordered[start : start + batch_size]))
        total, tokens = total + float(loss), tokens + count
    model.train()
    return total / tokens


def batches(examples: list[Example], size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(examples), generator=generator).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield collate([examples[i] for i in order[start : start + size]])


def adapt(model: nn.Module, method: str, rank: int, seed: int, memory: str) -> nn.Module:
    if method in COORDINATES:
        convert(model, PMSSConfig(rank=rank, coordinates=method, seed=seed, memory=memory, scale=1.0))
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0))


def run(args: argparse.Namespace, lr: float) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train = read_examples(args.data / "train.jsonl", tokenizer, args.train_examples, args.max_length)
    test = read_examples(args.data / "test.jsonl", tokenizer, args.test_examples, args.max_length)
    model = adapt(
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        args.method,
        args.rank,
        args.seed,
        args.memory,
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    warmup = max(1, args.steps // 10)

    def schedule(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (args.steps - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    source = batches(train, args.batch_size, args.seed)
    curve: list[float] = []
    held_out: dict[int, float] = {}
    seconds = 0.0

    def mixed() -> torch.autocast:
        # One context per pass: autocast caches the casts of trained weights until the context ends.
        return torch.autocast("cpu", torch.bfloat16, enabled=not args.float32)

    with mixed():
        held_out[0] = held_out_loss(model, test)
    for step in (bar := tqdm(range(1, args.steps + 1), desc=f"{args.method} {lr:g}", disable=None)):
        start = time.perf_counter()
        with mixed():
            loss, tokens = response_loss(model, next(source))
        (loss / tokens).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - start
        curve.append(loss.item() / tokens)
        bar.set_postfix(loss=curve[-1])
        if not math.isfinite(curve[-1]):
            break
        if step % args.every == 0 or step == args.steps:
            with mixed():
                held_out[step] = held_out_loss(model, test)
    return {
        "method": args.method,
        "rank": args.rank,
        "lr": lr,
        "seed": args.seed,
        "steps": args.steps,
        "trainable": sum(p.numel() for p in trained),
        "train_loss": curve,
        "held_out": held_out,
        "seconds_per_step": seconds / max(1, len(curve)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def plot(folder: Path) -> None:
    """Table on the screen; held-out loss against learning rate and the training curves in ``learning.png``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = sorted(
        (json.loads(p.read_text()) for p in folder.glob("*.json")),
        key=lambda r: (r["steps"], r["method"], r["rank"], r["lr"]),
    )
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    groups: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    print(
        f"{'method':12} {'rank':>4} {'trainable':>10} {'steps':>5} {'lr':>8} {'before':>8} {'after':>8} {'s/step':>7}"
    )
    for r in records:
        last = r["held_out"].get(str(r["steps"]), math.nan)
        groups.setdefault((r["method"], r["rank"], r["steps"]), []).append(r)
        print(
            f"{r['method']:12} {r['rank']:4} {r['trainable']:10,} {r['steps']:5} {r['lr']:8.0e} {r['held_out']['0']:8.4f}"
            f" {last:8.4f} {r['seconds_per_step']:7.2f}"
        )
    for (method, rank, steps), runs in groups.items():
        label = f"{method} {rank}, {steps} steps"
        after = [r["held_out"].get(str(r["steps"]), math.nan) for r in runs]
        left.plot([r["lr"] for r in runs], after, "o-", label=label)
        best = min(runs, key=lambda r: r["held_out"].get(str(r["steps"]), math.inf))
        right.plot(
            *zip(*((int(k), v) for k, v in best["held_out"].items()), strict=True),
            "o-",
            label=f"{label}, lr {best['lr']:g}",
        )
    left.set(xscale="log", xlabel="learning rate", ylabel="held-out response loss after the run")
    left.set_ylim(top=min(1.4, left.get_ylim()[1]))
    right.set(xlabel="step", ylabel="held-out response loss", title="best learning rate of each")
    for axis in (left, right):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "learning.png", dpi=130)
    print(f"curves: {folder / 'learning.png'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a causal LM")
    parser.add_argument("--data", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--method", choices=(*COORDINATES, "lora"))
    parser.add_argument("--rank", type=int, default=104)
    parser.add_argument("--lr", type=float, nargs="+")
    parser.add_argument("--steps", type=int, default=75)
    parser.add_argument("--every", type=int, default=25, help="steps between evaluations")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--train-examples", type=int, default=-1)
    parser.add_argument("--test-examples", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", default="keep")
    parser.add_argument("--float32", action="store_true", help="no autocast")
    parser.add_argument("--plot", action="store_true")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for lr in args.lr or []:
        target = args.output / f"{args.method}-r{args.rank}-s{args.steps}-lr{lr:g}-seed{args.seed}.json"
        if target.exists():
            print(f"skipping {target}: finished before")
            continue
        record = run(args, lr)
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(record))
        partial.rename(target)
        print(f"{target}: {record['held_out']}")
    if args.plot:
        plot(args.output)


if __name__ == "__main__":
    main()
