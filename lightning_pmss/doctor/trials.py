"""Trials: each runs in a process of its own (``python -m lightning_pmss.doctor.trials NAME``), which may crash or hang."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

MISSING = 3  # exit code of a trial whose library or compiler is not there


class NotThereError(Exception):
    """Something that the trial needs is not installed; the text says what, and the command that installs it."""


def devices() -> dict[str, Any]:
    """Accelerators that torch can use, with their memory in bytes."""
    import torch

    found = []
    for number in range(torch.accelerator.device_count() if torch.accelerator.is_available() else 0):
        device = torch.device(torch.accelerator.current_accelerator().type, number)  # type: ignore[union-attr]
        entry: dict[str, Any] = {"device": str(device)}
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            entry |= {"name": torch.cuda.get_device_name(device), "free": free, "total": total}
        found.append(entry)
    return {"accelerators": found, "threads": torch.get_num_threads()}


def imports() -> dict[str, Any]:
    """Import every library that is installed."""
    from lightning_pmss.doctor.installed import LIBRARIES, installed

    broken = []
    for name in LIBRARIES:
        if installed(name) is not None and name != "deepspeed":  # it has a trial of its own
            try:
                importlib.import_module(name)
            except Exception as error:
                broken.append(f"{name} ({type(error).__name__}: {error})")
    if broken:
        raise ImportError(f"installed, but cannot be imported: {'; '.join(broken)}")
    return {}


def bf16() -> dict[str, Any]:
    """A step forward and backward in bfloat16, beside float32."""
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    weight, rows = torch.randn(256, 256, device=device), torch.randn(64, 256, device=device)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        w, x = weight.detach().to(dtype, copy=True).requires_grad_(), rows.to(dtype)
        torch.nn.functional.linear(x, w).float().square().mean().backward()
        assert w.grad is not None
        found.append(w.grad.float())
    error = float((found[0] - found[1]).norm() / found[0].norm())
    if not error < 0.05:
        raise ArithmeticError(f"gradients in bfloat16 are {error:.3f} of their norm off those in float32")
    return {"device": str(device), "error": error}


def compile() -> dict[str, Any]:
    """A compiled layer, forward and backward, beside the layer itself."""
    import torch

    _need_compiler("torch.compile")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.GELU()).to(device)
    rows = torch.randn(8, 32, device=device)
    found = []
    for run in (layer, torch.compile(layer)):
        layer.zero_grad()
        run(rows).square().mean().backward()
        found.append([parameter.grad.clone() for parameter in layer.parameters()])  # type: ignore[union-attr]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    return {"device": str(device)}


def deepspeed() -> dict[str, Any]:
    """One step under ZeRO-2, on one device."""
    import socket

    import torch

    _need("deepspeed", "pip install -c constraints.txt -e '.[deepspeed]'")
    _need_compiler("DeepSpeed")
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ.update(alone)
    import deepspeed as library

    layer = torch.nn.Linear(16, 16)
    before = layer.weight.detach().clone()
    library.init_distributed(dist_backend="nccl" if on_gpu else "gloo")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = library.initialize(model=layer, optimizer=torch.optim.AdamW(layer.parameters(), lr=0.1), config=config)
    engine.backward(engine(torch.randn(1, 16, device=engine.device)).square().mean())
    engine.step()
    if torch.equal(layer.weight.detach().cpu(), before):
        raise RuntimeError("a step under ZeRO-2 has not changed the weights")
    torch.distributed.destroy_process_group()
    return {"device": str(engine.device)}


def bitsandbytes() -> dict[str, Any]:
    """A layer in 4 bits, beside the layer itself."""
    import torch

    _need("bitsandbytes", "pip install -c constraints.txt -e '.[quantised]'")
    import bitsandbytes as library

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    dense = torch.nn.Linear(64, 64, bias=False)
    coded = library.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    coded.load_state_dict(dense.state_dict())
    rows = torch.randn(8, 64)
    wanted, found = dense(rows), coded.to(device)(rows.to(device)).cpu()
    error = float((found - wanted).detach().norm() / wanted.detach().norm())
    if not error < 0.2:
        raise ArithmeticError(f"a product with 4-bit weights is {error:.2f} of its norm off")
    return {"device": device}


TRIALS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "imports": (imports, "import of the installed libraries"),
    "bf16": (bf16, "bfloat16, forward and backward"),
    "compile": (compile, "torch.compile"),
    "deepspeed": (deepspeed, "DeepSpeed, a step under ZeRO-2"),
    "bitsandbytes": (bitsandbytes, "bitsandbytes, 4-bit weights"),
}


def _need(library: str, command: str) -> None:
    from lightning_pmss.doctor.installed import installed

    if installed(library) is None:
        raise NotThereError(f"{library} is not installed: {command}")


def _need_compiler(what: str) -> None:
    import shutil

    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        raise NotThereError(f"{what} needs a C++ compiler; on Debian: apt-get install g++")


def main(name: str) -> int:
    """Run one trial; its result, or what is missing, is the last line of stdout in JSON."""
    trial = devices if name == "devices" else TRIALS[name][0]
    try:
        found = trial()
    except NotThereError as error:
        print(f"\n{json.dumps({'missing': str(error)})}")
        return MISSING
    print(f"\n{json.dumps(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
