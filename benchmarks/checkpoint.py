"""What a checkpoint and an adapter weigh beside what is trained, and how long they take on bases of growing size.

    python -m benchmarks.checkpoint [--sizes 0 256 1024 2048] [--width 1024] [--layers 8] [--rank 256] [--repeats 5]
        [--folder DIR] [--json FILE]

Each model has the same converted layers, and frozen float32 weights of SIZE MiB around them. One optimizer step with Adam is
trained, then in turn: a full checkpoint (``trainer.save_checkpoint``), one of the weights only, and the adapter
(`save_adapter`). "trained" counts V and, in a full checkpoint, Adam's two moments of it; the rest is rows, columns,
fingerprints and what Lightning adds. Wall times; nothing is flushed to the disk but by `save_adapter`, which always does.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.measure import interleaved, spread, table, write_result
from lightning_pmss import PMSSCallback, save_adapter

MIB = 2**20


class Model(L.LightningModule):
    """Converted layers between frozen ones that are there for their size."""

    def __init__(self, size: int, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        self.frozen = nn.ParameterList(
            nn.Parameter(torch.randn(16, MIB // 4), requires_grad=False) for _ in range(size // 16)
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        for layer in self.layers:
            batch = layer(batch)
        return batch.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def measure(size: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Bytes and seconds of one size of the base."""
    torch.manual_seed(0)
    model = Model(size, options.width, options.layers)
    callback = PMSSCallback(
        target_modules=[f"layers.{i}" for i in range(options.layers)],
        rank=options.rank,
        output_dir=folder / "out",
        merge_on_save=None,
    )
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(model, DataLoader(torch.randn(4, options.width), batch_size=4))  # type: ignore[arg-type]
    files = {"checkpoint": folder / "full.ckpt", "weights only": folder / "weights.ckpt", "adapter": folder / "adapter"}
    ways = {
        "checkpoint": lambda: trainer.save_checkpoint(files["checkpoint"]),
        "weights only": lambda: trainer.save_checkpoint(files["weights only"], weights_only=True),
        "adapter": lambda: save_adapter(model, files["adapter"], overwrite=True),
    }
    seconds = interleaved(ways, options.repeats)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    base = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    found: dict[str, Any] = {"base_bytes": base}
    for name, path in files.items():
        trained = parameters * (3 if name == "checkpoint" else 1)
        size_of = (path / "adapter_model.safetensors" if path.is_dir() else path).stat().st_size
        found[name] = {
            "bytes": size_of, "trained_bytes": trained, "above": size_of / trained - 1, "seconds": spread(seconds[name]),
        }  # fmt: skip
    return found


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 256, 1024, 2048], help="MiB of frozen weights")
    for name, default in (("width", 1024), ("layers", 8), ("rank", 256), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            results.append(measure(size, options, Path(temporary)))
    rows = [
        (f"{found['base_bytes'] / MIB:.0f} MiB", name, found[name]["bytes"], f"{found[name]['above']:+.2%}")
        + tuple(f"{1000 * found[name]['seconds'][key]:.1f}" for key in ("min", "median", "max"))
        for found in results
        for name in ("checkpoint", "weights only", "adapter")
    ]
    print(table(["base", "file", "bytes", "above what is trained", "ms min", "median", "max"], rows))
    about = {key: getattr(options, key) for key in ("width", "layers", "rank")}
    write_result(options.json, "checkpoint", {**about, "bases": results})


if __name__ == "__main__":
    main()
