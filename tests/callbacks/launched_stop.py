"""Script of a test of launchers: a training that stops, and one that ends; ``python -m ... FOLDER STRATEGY``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_pmss import PMSSCallback
from tests.callbacks.test_nonfinite import Poisoned
from tests.callbacks.toys import Toy, plain_loader, trainer


def main(folder: Path, strategy: str) -> None:
    runner = trainer(folder, PMSSCallback(rank=6, output_dir=folder / "out"), strategy=strategy, devices=2)
    with pytest.raises(Exception, match="the loss of batch 1 in epoch 1 is NaN"):
        runner.fit(Poisoned((4,)), plain_loader())
    runner = trainer(folder, PMSSCallback(rank=6, output_dir=folder / "good"), strategy=strategy, devices=2)
    runner.fit(Toy(), plain_loader())
    with pytest.raises(Exception, match="neither steps nor optimizer states"):
        runner.save_checkpoint(folder / "main.ckpt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
