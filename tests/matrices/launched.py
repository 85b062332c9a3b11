"""Script: ``python -m tests.matrices.launched FOLDER`` trains experts and routers in processes that Lightning starts itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lightning_pmss import PMSSConfig
from lightning_pmss.conversion.convert import adapted_layers
from tests.experts.training import Mixture, batches, fit
from tests.leaving import leave

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    module = Mixture("qwen3_moe")
    config = PMSSConfig(rank=3, target_modules=["q_proj"], target_parameters=["down_proj", "gate.weight"])
    fit(folder, module, config, strategy="ddp_fork", devices=2, max_steps=2, loader=batches(4))
    layers = adapted_layers(module)
    numbers = {n: [t.double().sum().item() for t in x.core.trained().values()] for n, x in layers.items()}
    (folder / "numbers.json").write_text(json.dumps(numbers))
    leave()
