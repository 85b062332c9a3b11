"""Lightning Fabric: your own loop, PMSS's plain functions.

    python examples/fabric.py --model MODEL_DIR [--steps 20] [--rank 32]

`convert` comes before `fabric.setup`; the optimizer gets what requires grad; `save_adapter` comes at the end. Converts a
causal language model, trains U on generated word problems, and loads the adapter into a fresh model.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from transformers import AutoModelForCausalLM

from lightning_pmss import PMSSConfig, convert, load_adapter, save_adapter
from lightning_pmss.datamodules import ArithmeticDataModule


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train and return the losses of the first and last step, and of the last batch in a model loaded from the adapter."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of a causal language model, or its id on the hub")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--output", type=Path, default=Path("fabric-adapter"), help="adapter folder to write")
    options = parser.parse_args(arguments)

    fabric = Fabric(accelerator="auto", devices=1)
    fabric.seed_everything(0)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model)
    print(convert(model, PMSSConfig(rank=options.rank)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.lr, weight_decay=0.0)
    model, optimizer = fabric.setup(model, optimizer)

    data = ArithmeticDataModule(options.model, train_size=8 * options.steps, val_size=8, test_size=8, batch_size=8)
    data.prepare_data()
    data.setup("fit")
    losses = []
    batch: Any
    # A step over several batches would need the sum of their losses over the number of all their response tokens.
    for batch in fabric.setup_dataloaders(data.train_dataloader()):
        loss = model(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}).loss
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    save_adapter(model.module, options.output, base=options.model, overwrite=True)

    fresh: Any = AutoModelForCausalLM.from_pretrained(options.model)
    load_adapter(fresh.to(fabric.device), options.output)
    with torch.no_grad():
        trained, loaded = (
            float(m(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}).loss) for m in (model, fresh)
        )
    print(
        f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; last batch {trained:.4f}, loaded from {options.output} {loaded:.4f}"
    )
    return {"first": losses[0], "last": losses[-1], "trained": trained, "loaded": loaded}


if __name__ == "__main__":
    main()
