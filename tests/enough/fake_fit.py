"""In the place of ``python -m lightning_pmss``: writes the record that a run of so many examples might have.

``FAKE`` names what some runs do, by their folder: ``{"n20-seed1": "crash"}``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

config = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
folder = Path(config["trainer"]["default_root_dir"])
with (folder.parent / "started.txt").open("a") as file:
    file.write(f"{folder.name} {Path(config['ckpt_path'] or 'anew').name}\n")
act = json.loads(os.environ.get("FAKE", "{}")).get(folder.name, "")
size, seed = config["data"]["init_args"]["train_limit"], config["seed_everything"]
steps = config["trainer"]["max_steps"] if config["trainer"]["max_steps"] > 0 else 12
print("training", folder.name, flush=True)
if act == "crash":
    sys.exit("ZeroDivisionError: no more")
if act == "refuse":
    sys.exit(print("python -m lightning_pmss fit: error: 'val/x' is not logged in validation.", file=sys.stderr) or 2)
if act == "memory":
    os.kill(os.getpid(), signal.SIGKILL)
if act == "wait":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from lightning_pmss.runs.process import stop_with_parent

    stop_with_parent()
    (folder / "progress").write_text("3 12")
    (folder / "checkpoints").mkdir(exist_ok=True)
    signal.signal(
        signal.SIGTERM, lambda *_: (folder / "checkpoints" / "last-interrupted.ckpt").touch() or sys.exit(143)
    )
    while True:
        time.sleep(0.02)
if act in ("validation", "after"):
    import torch
if act == "validation":  # interrupted in the last one
    real = 11  # steps; with equal epochs the command knows them about
    (folder / "checkpoints").mkdir(exist_ok=True)
    for age, (name, step) in enumerate([("last.ckpt", 8), ("last-interrupted.ckpt", real)]):
        torch.save({"global_step": step}, folder / "checkpoints" / name)
        os.utime(folder / "checkpoints" / name, (age, age))
    (folder / "record.json").write_text(json.dumps({"steps": real, "scores": []}))
    sys.exit("OSError: no space left")
score = None if act == "nan" else 1 + 4 * size**-0.5 + 0.01 * ((7 * seed + size) % 5)
early = {"step": 6, "metrics": {"val/loss": 0.5, "other": 2.0}}
last = {"step": 6 if act == "short" else steps, "metrics": {"val/loss": score, "other": 1.0}}
(folder / "record.json").write_text(json.dumps({"steps": steps, "scores": [early, last] if act != "short" else [last]}))
if act == "after":  # all scores are there, and something behind them fails
    (folder / "checkpoints").mkdir()
    torch.save({"global_step": steps - 2}, folder / "checkpoints" / "last.ckpt")
    sys.exit("OSError: no space left for the adapter")
