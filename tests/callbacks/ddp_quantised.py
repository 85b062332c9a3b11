"""Script of the two-process test: ``python -m tests.callbacks.ddp_quantised FOLDER MODEL QUANTISATION``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.layers.quantised import is_quantised
from tests.callbacks.test_quantised import run
from tests.leaving import leave

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    module, losses, trainer, _ = run(folder, sys.argv[2], sys.argv[3], devices=2, strategy="ddp")
    layers = adapted_layers(module)
    record = {
        "u": {n: layer.core.weight.tolist() for n, layer in layers.items()},
        "quantised": all(is_quantised(layer) for layer in layers.values()),
        "losses": losses,
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(record))
    leave()
