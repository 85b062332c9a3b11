"""Tokenising 100,000 rows of MetaMathQA's size: seconds at first and from the cache, memory, and what packing saves.

    python -m benchmarks.data --tokenizer models/SmolLM2-135M-Instruct --gsm8k ../shared/data/gsm8k [--rows 100000]
        [--folder DIR] [--json FILE]

The rows are made from GSM8K's training file, each with another number in its question, so that none are equal; a
response is GSM8K's without annotations with MetaMath's last line. That is a little shorter than MetaMathQA (whose mean
the project could not measure). Each measurement is a fresh process: ``prepare_data`` and ``setup`` as a trainer calls
them, hence reading, checking, hashing and tokenising, or reading it all from the cache. Peak memory is the process's
largest resident memory, its imports included, and what it grew by. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

_CHILD = """
import json, resource, sys, time, warnings
import lightning_pmss.datamodules as D, transformers, datasets
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
tokenizer, path, cache, packing = sys.argv[1:]
before = peak()
data = D.GSM8KDataModule(tokenizer, path, prompt_style="metamath", max_length=512, cache_dir=cache, packing=packing == "1",
                         batch_size=16)
start, cpu = time.perf_counter(), time.process_time()
data.prepare_data()
data.setup("fit")
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
start = time.perf_counter()
loader = data.train_dataloader()
next(iter(loader))
out = {"seconds": seconds, "cpu_seconds": cpu, "first_batch_seconds": time.perf_counter() - start,
       "peak_bytes": peak(), "peak_growth_bytes": peak() - before, "train_rows": len(data.data["train"]),
       "dropped": data.dropped, "tokens": sum(data.data["train"]["length"])}
report = data.packing_report
if report is not None:
    out["packing"] = {**vars(report), "told": str(report)}
print(json.dumps(out))
"""


def make_rows(gsm8k: Path, count: int, target: Path) -> None:
    """Write ``count`` rows in MetaMathQA's columns."""
    rows = [json.loads(line) for line in (gsm8k / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    from lightning_pmss.datamodules.gsm8k import strip_annotations

    with target.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = rows[number % len(rows)]
            work, _, answer = strip_annotations(row["answer"]).rpartition("\n#### ")
            made = {
                "query": f"{row['question']} (Variant {number // len(rows)}.)",
                "response": f"{work}\n#### {answer}\nThe answer is: {answer}",
                "type": "GSM_Rephrased",
            }
            file.write(json.dumps(made) + "\n")


def measure(tokenizer: str, path: Path, cache: Path, packing: bool) -> dict[str, object]:
    """Prepare the data in a fresh process."""
    command = [sys.executable, "-c", _CHILD, tokenizer, str(path), str(cache), str(int(packing))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return dict(json.loads(result.stdout.splitlines()[-1]))


def main() -> None:
    """Run the three measurements."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--gsm8k", type=Path, required=True, help="folder with GSM8K's train.jsonl")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="for the scratch files")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        path = Path(scratch) / "metamath.jsonl"
        make_rows(arguments.gsm8k, arguments.rows, path)
        cache = Path(scratch) / "cache"
        results: dict[str, object] = {
            "rows": arguments.rows,
            "source_bytes": path.stat().st_size,
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "tokenizer": Path(arguments.tokenizer).name,
        }
        for name, packing in (("first", False), ("cached", False), ("cached_packed", True)):
            results[name] = measure(arguments.tokenizer, path, cache, packing)
            print(name, json.dumps(results[name]), flush=True)
        results["cache_bytes"] = sum(file.stat().st_size for file in cache.glob("*.arrow"))
    text = json.dumps(results, indent=2) + "\n"
    print(text)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
