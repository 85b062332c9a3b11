"""The Trainer of transformers, without Lightning's: `convert` before it, `save_adapter` behind it.

    pip install -c constraints.txt accelerate
    python examples/hf_trainer.py --model MODEL_DIR [--steps 20] [--rank 32]

Its own checkpoints would hold the whole merged model, from which it cannot resume, so none are written here; for adapter-only
checkpoints that resume exactly take Lightning's Trainer with `PMSSCallback`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from lightning_pmss import PMSSConfig, convert, merge, save_adapter
from lightning_pmss.datamodules import ArithmeticDataModule


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train and return the losses logged by the Trainer, the evaluation loss, and the same after merging."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of a causal language model, or its id on the hub")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--output", type=Path, default=Path("hf-trainer"), help="folder for the adapter")
    options = parser.parse_args(arguments)

    model = AutoModelForCausalLM.from_pretrained(options.model)
    print(convert(model, PMSSConfig(rank=options.rank)))

    data = ArithmeticDataModule(options.model, train_size=8 * options.steps, val_size=16, test_size=8, batch_size=8)
    data.prepare_data()
    data.setup("fit")
    train: Any = data.train_dataloader()
    evaluation: Any = data.val_dataloader()

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = train.collate_fn(rows)
        return {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=options.lr,
            weight_decay=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
        ),
        train_dataset=train.dataset,
        eval_dataset=evaluation.dataset,
        data_collator=collate,
    )
    trainer.train()
    save_adapter(model, options.output / "adapter", base=options.model, overwrite=True)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    before = trainer.evaluate()["eval_loss"]
    merge(model)
    after = trainer.evaluate()["eval_loss"]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; evaluation {before:.4f}, merged {after:.4f}")
    return {"losses": losses, "evaluation": before, "merged": after}


if __name__ == "__main__":
    main()
