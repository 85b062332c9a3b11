"""Script of the tests of launchers: ``python -m tests.callbacks.launched FOLDER STRATEGY DEVICES late|early``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from lightning_pmss import PMSSCallback, PMSSLinear, merge, save_adapter
from tests.callbacks.toys import LateToy, Toy, inputs, plain_loader, trainer


class Random(LateToy):
    """Its weights are other ones in every process; the first one's are those that train."""

    def configure_model(self) -> None:
        if self.net is None:
            super().configure_model()
            for parameter in self.net.parameters():
                torch.nn.init.normal_(parameter, std=0.3)


def main(folder: Path, strategy: str, devices: int, late: bool) -> None:
    module: Any = Random() if late else Toy()
    callback = PMSSCallback(rank=6, output_dir=folder / "out")
    options: dict[str, Any] = {"strategy": strategy, "devices": devices}
    runner = trainer(folder, callback, **options)
    runner.fit(module, plain_loader(), plain_loader())
    assert isinstance(module.net[0], PMSSLinear)
    x = inputs().tensors[0]
    record = {
        "v": float(module.net[0].core.weight.detach().norm()),
        "converted": len(callback.report.layers) if callback.report else 0,
        "output": module.net(x).tolist(),
        "fit": float(runner.callback_metrics["val_loss"]),
        "validate": runner.validate(module, plain_loader(), verbose=False)[0]["val_loss"],
        "other trainer": trainer(folder, PMSSCallback(rank=6)).test(module, plain_loader(), verbose=False)[0][
            "test_loss"
        ],
        "loss": float((module.net(x) - x.flip(-1)).square().mean(-1).mean()),
    }
    save_adapter(module, folder / "again")
    merge(module)
    record["merged"] = module.net(x).tolist()
    (folder / "record.json").write_text(json.dumps(record))
    torch.save(module.net.state_dict(), folder / "base.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "late")
