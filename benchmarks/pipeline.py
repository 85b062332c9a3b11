"""Input pipeline: tokens per second of the collated loader beside what a training step consumes, and what is padding.

    python -m benchmarks.pipeline --data ../shared/data [--model models/SmolLM2-135M-Instruct] [--batch 4] [--rank 256]
        [--rows 3000] [--steps 3] [--json FILE]

DATA is a folder with ``gsm8k`` and ``commonsense`` as in the tests. Tokens are those of examples, padding not counted; a
step is forward and backward of MODEL in its own dtype, converted at that rank, on batches that the loader gives. Loader and
step run on one thread, without worker processes, in CPU time of this process. Three orders: "shuffled" (batches in random
order, as a plain DataLoader makes them), "grouped" (what the data modules do by themselves) and "packed" (``packing``: rows of
at most ``max_length`` tokens). The share of padding is over all training examples, the time over ROWS of them.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.measure import spread, table, write_result
from lightning_pmss import PMSSConfig, convert
from lightning_pmss.datamodules import CommonsenseDataModule, GSM8KDataModule, InstructionDataModule
from lightning_pmss.datamodules.packing import padding_share
from lightning_pmss.files.select import one_thread
from lightning_pmss.modules import CausalLMModule


def cases(data: Path) -> dict[str, tuple[type[InstructionDataModule], dict[str, Any]]]:
    """The data modules with the files they are given."""
    mix = data / "commonsense" / "train_mix_3000.json"
    tasks = sorted(folder.name for folder in mix.parent.iterdir() if folder.is_dir())  # those with a test file
    return {
        "gsm8k": (GSM8KDataModule, {"path": str(data / "gsm8k"), "max_length": 512}),
        "commonsense": (
            CommonsenseDataModule,
            {"path": str(mix), "test_path": str(mix.parent), "tasks": tasks, "max_length": 256},
        ),
    }


def orders(kind: type[InstructionDataModule], options: dict[str, Any], seed: int = 0) -> dict[str, tuple[Any, float]]:
    """Loader and share of padding of each order."""
    module, packed = kind(**options), kind(packing=True, **options)
    for each in (module, packed):
        each.prepare_data()
        each.setup("fit")
    grouped = module.train_dataloader()
    rows: Any = module.data["train"]
    lengths = rows["length"][:]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    batch = module.batch_size
    shuffled = DataLoader(rows, batch_size=batch, sampler=order, collate_fn=grouped.collate_fn)
    packed_loader = packed.train_dataloader()
    assert packed.packing_report is not None
    return {
        "shuffled": (shuffled, padding_share(order, lengths, batch)),
        "grouped": (grouped, packed.packing_report.before),
        "packed": (packed_loader, packed.packing_report.after),
    }


def tokens_of(batch: dict[str, Any]) -> int:
    """Tokens of examples: in a packed row the padding behind them is one more example, without labels."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    total = 0
    for labels, positions in zip(batch["labels"], batch["position_ids"], strict=True):
        last = int((positions == 0).nonzero()[-1])
        total += len(labels) if bool((labels[last:] >= 0).any()) else last
    return total


def loading(loader: Any, rows: int, batch_size: int) -> float:
    """Tokens per second of CPU time; the first batch, with what it sets up, is not counted."""
    batches = iter(loader)
    next(batches)
    taken, start = [], time.process_time()
    for batch in itertools.islice(batches, max(1, rows // batch_size)):
        taken.append(batch)
    seconds = time.process_time() - start
    return sum(map(tokens_of, taken)) / seconds


def stepping(module: CausalLMModule, loader: Any, steps: int) -> list[float]:
    """Tokens per second of some steps, after one that is not counted."""
    found = []
    for batch in itertools.islice(iter(loader), steps + 1):
        module.zero_grad()
        start = time.process_time()
        module.response_loss(batch)[0].backward()
        found.append(tokens_of(batch) / (time.process_time() - start))
    return found[1:]


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    for name, default in (("batch", 4), ("rank", 256), ("rows", 3000), ("steps", 3), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    module = CausalLMModule(options.model, dtype="float32", generate_in=())
    module.configure_model()
    convert(module, PMSSConfig(rank=options.rank, selection="random"))
    results: list[dict[str, Any]] = []
    with one_thread(), tempfile.TemporaryDirectory() as cache:
        for name, (kind, given) in cases(options.data).items():
            given = given | {"tokenizer": options.model, "batch_size": options.batch, "cache_dir": f"{cache}/{name}"}
            loaders = orders(kind, given)
            steps = stepping(module, loaders["grouped"][0], options.steps)
            for order, (loader, padding) in loaders.items():
                speed = [loading(loader, options.rows, options.batch) for _ in range(options.repeats)]
                ratio = spread(speed)["median"] / spread(steps)["median"]
                results.append({
                    "data": name, "order": order, "padding": padding, "loader_tokens_per_second": spread(speed),
                    "step_tokens_per_second": spread(steps), "loader / step": ratio,
                })  # fmt: skip
                print(results[-1], flush=True)
    rows = [
        (
            found["data"],
            found["order"],
            f"{found['padding']:.1%}",
            *(f"{found['loader_tokens_per_second'][key]:.0f}" for key in ("min", "median", "max")),
            *(f"{found['step_tokens_per_second'][key]:.0f}" for key in ("min", "median", "max")),
            f"{found['loader / step']:.0f}",
        )
        for found in results
    ]
    print(
        table(["data", "order", "padding", "loader min", "median", "max", "step min", "median", "max", "ratio"], rows)
    )
    about = {name: getattr(options, name) for name in ("batch", "rank", "rows")} | {"model": Path(options.model).name}
    write_result(options.json, "pipeline", {**about, "cases": results})


if __name__ == "__main__":
    main()
