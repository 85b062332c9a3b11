"""SmolLM2-135M-Instruct on ARC-Easy, GSM8K and DROP, zero-shot and after a short PMSS run: score, interval, seconds.

    python -m benchmarks.evaluation_smollm2 --data ../shared/data [--output runs/evaluation_smollm2] [--json FILE] [--table]

DATA is a folder with ``commonsense``, ``gsm8k`` and ``drop``. Each cell is the ``fit`` or ``test`` command that it prints, in
a process of its own; one whose result is in OUTPUT is not run again, and a ``test`` that was stopped goes on. Seconds are
those of the evaluation, with its losses, without loading the model; "answers read" counts the texts in which the metric
finds an answer. ``--table`` only prints what is there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lightning_pmss.evaluation import read_records

TASKS: dict[str, list[str]] = {
    "arc_easy": ["--data.path", "{data}/commonsense"],
    "gsm8k": ["--data.path", "{data}/gsm8k"],
    "drop": [
        "--data.path",
        "{data}/drop/drop_v0_train_from_dev_2000.jsonl",
        "--data.test_path",
        "{data}/drop/drop_v0_dev_250.jsonl",
    ],
}
WAYS = {"arc_easy": ("likelihood", "generation"), "gsm8k": ("generation",), "drop": ("generation",)}


def command(verb: str, task: str, data: Path, output: Path, *more: str) -> list[str]:
    """One command line, as a user types it."""
    files = [word.format(data=data) for word in TASKS[task]]
    logger = ["--trainer.logger.save_dir", str(output), "--trainer.logger.name", task, "--trainer.logger.version", verb]
    return ["-m", "lightning_pmss", verb, "--config", f"configs/smollm2/{task}.yaml", *files, *logger, *more]


def run(words: list[str]) -> float:
    """Run it with this Python and return the seconds it took."""
    print("python", *words, flush=True)
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True)
    return time.perf_counter() - start


def fit(task: str, data: Path, output: Path) -> Path:
    """Train, unless there is a finished checkpoint; return it."""
    checkpoint, told = output / task / "fit" / "checkpoints" / "last.ckpt", output / task / "fit.json"
    if not told.is_file():
        seconds = run(command("fit", task, data, output))
        told.write_text(json.dumps({"seconds": round(seconds, 1)}) + "\n", encoding="utf-8")
    return checkpoint


def test(task: str, way: str, data: Path, output: Path, checkpoint: Path | None) -> None:
    """Evaluate, unless there is a summary."""
    folder = output / task / f"{way}-{'zero-shot' if checkpoint is None else 'trained'}"
    if not (folder / "summary-test.json").is_file():
        trained = [] if checkpoint is None else ["--ckpt_path", str(checkpoint)]
        options = ["--model.answer_by", way, "--model.predictions_dir", str(folder)]
        run(command("test", task, data, output, *options, *trained))


def results(output: Path) -> list[dict[str, Any]]:
    """What is there, in the order of the table."""
    rows = []
    for task, ways in WAYS.items():
        for way in ways:
            for when in ("zero-shot", "trained"):
                path = output / task / f"{way}-{when}" / "summary-test.json"
                if not path.is_file():
                    continue
                found = json.loads(path.read_text(encoding="utf-8"))
                row = {"task": task, "way": way, "when": when, "scores": found["scores"], "logged": found["logged"]}
                answers = read_records(path.with_name("predictions-test.jsonl"))
                tokens = sum(answer["tokens"] for answer in answers)
                row["response_loss"] = round(sum(answer["loss"] * answer["tokens"] for answer in answers) / tokens, 3)
                row["answers_read"] = sum(answer["extracted"] is not None for answer in answers)
                if not found["answered_before"]:  # else the seconds are those of a part
                    row["seconds_per_100"] = round(100 * found["seconds"] / found["n"], 1)
                rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    columns = ("task", "answered by", "model", "score", "mean, %", "items", "answers read", "loss", "s / 100 items")
    lines = ["| " + " | ".join(columns) + " |", "|---|---|---|---|---|--:|--:|--:|--:|"]
    for row in rows:
        for name, part in row["scores"].items():
            mean = f"{100 * part['mean']:.1f} [{100 * part['low']:.1f}, {100 * part['high']:.1f}]"
            cells = [row["task"], row["way"], row["when"], name, mean, part["n"], row["answers_read"]]
            cells += [row["response_loss"], row.get("seconds_per_100", "")]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/evaluation_smollm2"))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    for task in () if arguments.table else arguments.tasks:
        for way in WAYS[task]:
            test(task, way, arguments.data, arguments.output, None)
        checkpoint = fit(task, arguments.data, arguments.output)
        for way in WAYS[task]:
            test(task, way, arguments.data, arguments.output, checkpoint)
    rows = results(arguments.output)
    fits = {path.parent.name: json.loads(path.read_text()) for path in sorted(arguments.output.glob("*/fit.json"))}
    print(table(rows))
    if arguments.json:
        text = json.dumps({"tests": rows, "fits": fits}, indent=2) + "\n"
        arguments.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
