"""Quantised bases: time of a converted layer by memory mode, and what training and merging over them gives.

    python -m benchmarks.quantised layer [--shape 1024 1024 1024 2816 2816 1024] [--rank 128] [--tokens 1024] [--json FILE]
    python -m benchmarks.quantised train [--model models/SmolLM2-135M-Instruct] [--steps 30] [--rank 64] [--json FILE]

``layer``: CPU seconds of forward and backward, one thread, of the frozen quantised layer and of the converted one with
``memory`` regather and keep; rivals in turn. ``train``: the response loss of each step on generated arithmetic, the same
examples and order for each form of the base, and the loss on held-out problems before and after; then the error of merging
into dense weights of the checkpoint's dtype, and (4-bit) into new codes, and the loss with the same update on the dense base.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from benchmarks.measure import interleaved, spread, table, write_result
from lightning_pmss import PMSSConfig, convert
from lightning_pmss.conversion.convert import adapted_layers
from lightning_pmss.datamodules import ArithmeticDataModule
from lightning_pmss.files.select import one_thread
from lightning_pmss.merging import merge, unmerge
from lightning_pmss.modules import CausalLMModule
from lightning_pmss.modules.quantisation import QUANTISATIONS

MEMORY = ("frozen", "regather", "keep")


def quantised_layer(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> nn.Module:
    """A layer of transformers' making, without its model."""
    layer = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    if kind == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(layer, Int8WeightOnlyConfig())
        return layer
    import bitsandbytes as bnb

    made: Any = (
        bnb.nn.Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False)
        if kind == "int8"
        else bnb.nn.Linear4bit(shape[1], shape[0], bias=False, compute_dtype=dtype, quant_type=kind)
    )
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")  # type: ignore[no-any-return]


def layer_case(kind: str, shape: tuple[int, int], rank: int, tokens: int, repeats: int) -> dict[str, Any]:
    """CPU seconds of each form, and their ratio to the frozen layer's."""
    torch.manual_seed(0)
    steps = {}
    for memory in MEMORY:
        net = nn.Sequential(quantised_layer(kind, shape, torch.float32))
        if memory != "frozen":
            convert(net, PMSSConfig(target_modules=["0"], rank=rank, selection="random", memory=memory))
        x = torch.randn(tokens, shape[1]).requires_grad_()
        gradient = torch.randn(tokens, shape[0])

        def step(net: nn.Module = net, x: torch.Tensor = x, gradient: torch.Tensor = gradient) -> None:
            net(x).backward(gradient)

        steps[memory] = step
    seconds = {
        name: spread(found) for name, found in interleaved(steps, repeats, warmup=2, clock=time.process_time).items()
    }
    base = seconds["frozen"]["median"]
    ratio = {name: found["median"] / base for name, found in seconds.items()}
    return {"kind": kind, "shape": list(shape), "rank": rank, "tokens": tokens, "seconds": seconds, "ratio": ratio}


def layers(args: argparse.Namespace) -> dict[str, Any]:
    shapes = list(zip(args.shape[::2], args.shape[1::2], strict=True))
    cases = [(kind, shape) for kind in args.kinds for shape in shapes]
    with one_thread():
        rows = [layer_case(k, s, args.rank, args.tokens, args.repeats) for k, s in tqdm(cases, desc="layers")]
    print(
        table(
            ["base", "out x in", "frozen, ms", "regather", "keep"],
            [
                [r["kind"], "x".join(map(str, r["shape"])), 1e3 * r["seconds"]["frozen"]["median"]]
                + [r["ratio"][m] for m in MEMORY[1:]]
                for r in rows
            ],
        )
    )
    return {"layers": rows}


def train_case(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Losses by step, held-out loss before and after, bytes of the weights, merge errors."""
    torch.manual_seed(0)
    module = CausalLMModule(args.model, quantisation=None if kind == "none" else kind, dtype="float32")  # type: ignore[arg-type]
    module.configure_model()
    data = ArithmeticDataModule(
        args.model, train_size=args.steps * args.batch, val_size=args.held_out, test_size=1, batch_size=args.batch,
        eval_batch_size=args.batch, seed=0,
    )  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    before = held_out(module, data)
    report = convert(module, PMSSConfig(rank=args.rank))
    module.train()  # int8 of bitsandbytes quantises activations in evaluation mode
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    losses: list[float] = []
    start = time.process_time()
    for batch in tqdm(data.train_dataloader(), desc=kind, total=args.steps):
        loss = module.response_loss(batch)[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    found: dict[str, Any] = {
        "kind": kind,
        "trainable": report.trainable,
        "losses": losses,
        "cpu_seconds": time.process_time() - start,
        "held_out_before": before,
        "held_out_after": held_out(module, data),
    }
    ways: dict[str, dict[str, bool]] = {"none": {"in its dtype": {}}}.get(kind, {"dequantise": {"dequantise": True}})  # type: ignore[arg-type]
    if kind in ("nf4", "fp4"):
        ways = {**ways, "requantise": {"requantise": True}}
    found["merge"] = {}
    for name, options in ways.items():
        drift = merge(module, **options)
        found["merge"][name] = drift.to_dict() | {"layers": len(drift.layers), "held_out": held_out(module, data)}
        unmerge(module)
    if kind != "none":
        found["update_on_the_dense_base"] = held_out(on_dense_base(module, args.model), data)
    return found


@torch.no_grad()
def on_dense_base(module: CausalLMModule, model: str) -> CausalLMModule:
    """The unquantised model with the same C U R added, as an exported LoRA on it would compute."""
    dense = CausalLMModule(model, dtype="float32")
    dense.configure_model()
    weights = dict(dense.model.named_parameters())
    for name, layer in adapted_layers(module).items():
        weights[f"{name}.weight"] += layer.weight_columns() @ layer.core_update() @ layer.weight_rows()
    return dense


@torch.no_grad()
def held_out(module: CausalLMModule, data: Any) -> float:
    """Mean response loss per token, with the product that training uses."""
    module.train()
    total = count = 0.0
    for batch in data.val_dataloader():
        loss, tokens = module.response_loss(batch)
        total, count = total + float(loss) * float(tokens), count + float(tokens)
    return total / count


def train(args: argparse.Namespace) -> dict[str, Any]:
    with one_thread():
        rows = [train_case(kind, args) for kind in ("none", *args.kinds)]
    head = [
        "base",
        "held out before",
        "after",
        "first step",
        "last 5 steps",
        "CPU s",
        "merged: held out (way)",
        "update on the dense base",
    ]
    body = [
        [
            r["kind"], r["held_out_before"], r["held_out_after"], r["losses"][0], sum(r["losses"][-5:]) / 5, r["cpu_seconds"],
            "; ".join(f"{m['held_out']:.4g} ({way})" for way, m in r["merge"].items()),
            r.get("update_on_the_dense_base", ""),
        ]
        for r in rows
    ]  # fmt: skip
    print(table(head, body))
    return {"options": {k: v for k, v in vars(args).items() if k not in ("run", "json", "model")}, "runs": rows}


def plot(args: argparse.Namespace) -> None:
    """Draw the training losses of an earlier ``train``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for run in json.loads(Path(args.results).read_text(encoding="utf-8"))["runs"]:
        name = "float32" if run["kind"] == "none" else run["kind"]
        axes.semilogy(range(1, len(run["losses"]) + 1), run["losses"], label=name, linewidth=1.3)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, title="base")
    figure.savefig(args.output, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.quantised", description=(__doc__ or "").partition("\n")[0])
    parts = parser.add_subparsers(required=True, dest="part")
    layer, training, drawing = (parts.add_parser(name) for name in ("layer", "train", "plot"))
    drawing.add_argument("results", help="JSON of `train`")
    drawing.add_argument("output", help="picture to write")
    layer.add_argument("--shape", nargs="+", type=int, default=[1024, 1024, 1024, 2816, 2816, 1024])
    layer.add_argument("--rank", type=int, default=128)
    layer.add_argument("--tokens", type=int, default=1024)
    layer.add_argument("--repeats", type=int, default=7)
    layer.set_defaults(run=layers)
    training.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    training.add_argument("--steps", type=int, default=30)
    training.add_argument("--batch", type=int, default=4)
    training.add_argument("--held-out", type=int, default=16)
    training.add_argument("--rank", type=int, default=64)
    training.add_argument("--lr", type=float, default=5e-3)
    training.set_defaults(run=train)
    for part in (layer, training):
        part.add_argument("--kinds", nargs="+", choices=QUANTISATIONS, default=list(QUANTISATIONS))
        part.add_argument("--json", metavar="FILE")
    args = parser.parse_args(arguments)
    if args.part == "plot":
        plot(args)
        return
    write_result(args.json, "quantised", args.run(args))


if __name__ == "__main__":
    main()
