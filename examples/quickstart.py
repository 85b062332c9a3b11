"""The quickstart: test, fine-tune with PMSS, test again, and load the merged model in plain transformers.

    python examples/quickstart.py [OPTIONS OF THE COMMAND LINE, such as --pmss.rank 64 --trainer.max_steps 50]

The script runs ``configs/quickstart.yaml`` in steps and ends with three test questions and their answers before and after.
``python -m lightning_pmss fit --config configs/quickstart.yaml`` is the training alone.
"""

from __future__ import annotations

import random
import sys
import textwrap
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lightning_pmss import PMSSCallback
from lightning_pmss.callbacks.loss_curve import LossCurve
from lightning_pmss.cli import PMSSCLI
from lightning_pmss.evaluation import read_records
from lightning_pmss.modules import CausalLMModule

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
COMPARED = 8  # prompts whose greedy texts are compared
SHOWN = 3  # test questions whose answers are shown at the end
Records = dict[int, dict[str, Any]]


def plain_texts(folder: Path, prompts: list[str], max_new_tokens: int) -> list[str]:
    """Greedy texts of the model in `folder`, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    tokens = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    new = tokens[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def adapter_texts(module: CausalLMModule, batch: dict[str, Any]) -> list[str]:
    """Greedy texts of the model that was trained, with its adapter."""
    module.eval()
    return module.generate(batch["prompt_ids"], batch["prompt_mask"])


def megabytes(folder: Path) -> str:
    """Size of the files in `folder`."""
    return f"{sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()) / 1e6:.1f} MB"


def exact_match(cli: PMSSCLI, folder: Path) -> str:
    """Exact match on the test split; the texts go into `folder`."""
    cli.model.predictions_dir = str(folder)
    scores = cli.trainer.test(cli.model, cli.datamodule, verbose=False)[0]
    return f"{scores['test/exact_match']:.1%}   (test loss {scores['test/loss']:.3f})"


def answers(folder: Path) -> Records:
    """The records of the test questions that `exact_match` wrote into `folder`, by their ids."""
    return {record["id"]: record for record in read_records(folder / "predictions-test.jsonl")}


def draw(ids: Iterable[int]) -> list[int]:
    """Draw the questions to show by a fixed seed, whatever their answers are."""
    candidates = sorted(ids)
    return random.Random(0).sample(candidates, min(SHOWN, len(candidates)))


def verdict(record: dict[str, Any]) -> str:
    """Whether the metric scored the answer of `record` as right."""
    return "right" if record["score"] == 1 else "wrong"


def comparison(drawn: list[int], before: Records, after: Records) -> str:
    """The drawn questions with their expected answer and the two models' answers, each marked right or wrong."""
    lines = []
    for number in drawn:
        lines.append(textwrap.fill(" ".join(before[number]["prompt"].split()).removesuffix(" Answer:"), 100))
        rows = {
            "expected": str(before[number]["target"]),
            f"before: {verdict(before[number])}": before[number]["output"],
            f"after:  {verdict(after[number])}": after[number]["output"],
        }
        for name, text in rows.items():
            lines.append(
                textwrap.fill(
                    " ".join(text.split()) or "(no text)",
                    100,
                    initial_indent=f"  {name:<15} ",
                    subsequent_indent=" " * 18,
                )
            )
        lines.append("")
    return "\n".join(lines)


def main(options: list[str]) -> int:
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning")  # advice about loader workers
    start = time.perf_counter()
    cli = PMSSCLI(args=["--config", str(CONFIG), *options], run=False)
    if not Path(cli.model.model_name_or_path).is_dir():
        print(f"error: no model in {cli.model.model_name_or_path!r}. Type: python examples/smollm2.py", file=sys.stderr)
        return 2
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    pmss = next(callback for callback in callbacks if isinstance(callback, PMSSCallback))
    curve = next((callback for callback in callbacks if isinstance(callback, LossCurve)), None)
    folder = pmss.output_folder(cli.trainer)

    print("\n== 1/4  before: U is zero, so this is the pretrained model\n", flush=True)
    before = exact_match(cli, folder / "before")
    answers_before = answers(folder / "before")
    drawn = draw(answers_before)
    print("\n== 2/4  training\n", flush=True)
    begin = time.perf_counter()
    cli.trainer.fit(cli.model, cli.datamodule)
    training = time.perf_counter() - begin
    print("\n== 3/4  after\n", flush=True)
    after = exact_match(cli, folder / "after")
    print("\n== 4/4  the merged model in plain transformers\n", flush=True)
    batch = next(iter(cli.datamodule.test_dataloader()))
    batch = {key: value[:COMPARED] for key, value in batch.items()}
    with torch.inference_mode():
        ours = adapter_texts(cli.model, batch)
        plain = plain_texts(folder / "merged", batch["prompt"], cli.model.max_new_tokens)
    equal = sum(a == b for a, b in zip(ours, plain, strict=True))

    rows = {
        "exact match before": before,
        "exact match after": after,
        "equal greedy texts": f"{equal} of {len(ours)}, merged model in plain transformers against the adapter model",
        "adapter": f"{folder / 'adapter'}   ({megabytes(folder / 'adapter')})",
        "merged model": f"{folder / 'merged'}   ({megabytes(folder / 'merged')})",
        "loss curve": str(curve.path if curve else "none (no LossCurve in the configuration)"),
        "texts": f"{folder / 'before'}, {folder / 'after'}",
        "wall time": f"{time.perf_counter() - start:.0f} s, of which training {training:.0f} s",
    }
    print()
    for name, value in rows.items():
        print(f"  {name:<20} {value}")
    print(
        f"\n{len(drawn)} of the {len(answers_before)} test questions, drawn at random with seed 0 before the training."
    )
    print(
        "An answer is right if the metric accepts it. GSM8K's metric reads `#### N` only, so it rejects right numbers"
    )
    print("in other forms, too.\n")
    print(comparison(drawn, answers_before, answers(folder / "after")), end="", flush=True)
    return 0 if equal == len(ours) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
