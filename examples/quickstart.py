"""The quickstart: exact match before, PMSS fine-tuning, exact match after, and the merged model in plain transformers.

    python examples/quickstart.py [OPTIONS OF THE COMMAND LINE, such as --pmss.rank 64 --trainer.max_steps 50]

It runs ``configs/quickstart.yaml`` in steps; ``python -m lightning_pmss fit --config configs/quickstart.yaml`` is the
training alone.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from lightning_pmss import PMSSCallback
from lightning_pmss.callbacks.loss_curve import LossCurve
from lightning_pmss.cli import PMSSCLI
from lightning_pmss.modules import CausalLMModule

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
COMPARED = 8  # prompts whose greedy texts are compared


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
    print(f"{batch['prompt'][0]}{' ' * (not batch['prompt'][0].endswith(' '))}{plain[0]}")

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
    return 0 if equal == len(ours) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
