"""Each DataModule on real files: rows, tokens, seconds first and cached, padding before and after packing; texts.

    python -m benchmarks.data_real --tokenizer models/SmolLM2-135M-Instruct --data ../shared/data [--json FILE] [--texts]

DATA is a folder with ``gsm8k``, ``drop``, ``commonsense`` and ``metamath`` as in the tests. Seconds are those of
``prepare_data`` and ``setup`` together, in this process, with 16 examples per batch. ``--texts`` prints the first training
and test text of each prompt style; nothing of the data goes into FILE.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from lightning_pmss.datamodules import (
    ArithmeticDataModule,
    CommonsenseDataModule,
    DROPDataModule,
    GSM8KDataModule,
    InstructionDataModule,
)


def cases(data: Path) -> dict[str, tuple[type[InstructionDataModule], dict[str, Any]]]:
    """The DataModules with the files they are given."""
    drop, sense = data / "drop", data / "commonsense"
    train, dev = drop / "drop_v0_train_from_dev_2000.jsonl", drop / "drop_v0_dev_250.jsonl"
    return {
        "gsm8k": (GSM8KDataModule, {"path": str(data / "gsm8k")}),
        "gsm8k_backward": (
            GSM8KDataModule,
            {"path": str(data / "gsm8k"), "test_path": str(data / "metamath" / "GSM8K_Backward.jsonl")},
        ),
        "drop": (DROPDataModule, {"path": str(train), "test_path": str(dev)}),
        "commonsense": (
            CommonsenseDataModule,
            {"path": str(sense / "train_mix_3000.json"), "test_path": str(sense), "tasks": TASKS, "max_length": 256},
        ),
        "arithmetic": (ArithmeticDataModule, {}),
    }


TASKS = ["boolq", "piqa", "social_i_qa", "hellaswag", "ARC-Easy", "ARC-Challenge", "openbookqa"]


def prepare(kind: type[InstructionDataModule], **options: Any) -> tuple[InstructionDataModule, float]:
    """The DataModule with its splits, and how long they took."""
    module = kind(batch_size=16, **options)
    start = time.perf_counter()
    module.prepare_data()
    module.setup()
    return module, time.perf_counter() - start


def measure(kind: type[InstructionDataModule], **options: Any) -> dict[str, Any]:
    """Sizes, seconds and padding of one DataModule."""
    module, first = prepare(kind, **options)
    _, cached = prepare(kind, **options)
    packed, _ = prepare(kind, packing=True, **options)
    packed.train_dataloader()
    report = packed.packing_report
    assert report is not None
    sizes = {split: len(data) for split, data in module.data.items()}
    tokens = {split: sum(data["length"]) for split, data in module.data.items()}
    return {
        "rows": sizes,
        "tokens": tokens,
        "longest": max(max(data["length"]) for data in module.data.values() if len(data)),
        "dropped": module.dropped,
        "max_length": module.max_length,
        "first_seconds": round(first, 2),
        "cached_seconds": round(cached, 2),
        "padding_before": round(report.before, 4),
        "padding_packed": round(report.after, 4),
        "packed_rows": report.rows,
    }


def print_texts(kind: type[InstructionDataModule], **options: Any) -> None:
    """The first texts of each prompt style, as Python writes them."""
    for style in ("plain", *kind.styles, "chat"):
        module, _ = prepare(kind, **(options | {"prompt_style": style, "train_limit": 1, "test_limit": 1}))
        for split in ("train", "test"):
            row = module.data[split][0]
            answer = module.encoder.tokenizer.decode(row["response_ids"])
            print(f"{kind.__name__} {style} {split}\n  {row['prompt']!r}\n  {answer!r}")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--texts", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    results = {}
    with tempfile.TemporaryDirectory() as cache:
        for name, (kind, options) in cases(arguments.data).items():
            options |= {"tokenizer": arguments.tokenizer, "cache_dir": f"{cache}/{name}"}
            results[name] = measure(kind, **options)
            print(name, json.dumps(results[name]), flush=True)
            if arguments.texts:
                print_texts(kind, **options)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
